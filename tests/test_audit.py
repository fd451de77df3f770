"""`dit-patch audit` finds what repeats, and calls nothing invariant that is not."""

from __future__ import annotations

import json

import other_homes
import pytest
import torch
from conftest import skip_unless_installed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted import MINI, Planted, reads_before, truly_depends

from dit_patch.contribute.audit import transfers
from dit_patch.contribute.audit.accelerator import DEVICE, SUPPORTED, Accelerator, to_accelerator
from dit_patch.contribute.audit.audit import audit, joined, observe
from dit_patch.contribute.audit.devices import DEVICES, device
from dit_patch.contribute.audit.document import as_dict
from dit_patch.contribute.audit.live import moments_of
from dit_patch.contribute.audit.page import audit_page
from dit_patch.contribute.audit.recorder import Recorder
from dit_patch.contribute.audit.repeats import Moment, Repeats, repeats
from dit_patch.contribute.audit.shapes import NoNumbersError
from dit_patch.contribute.audit.subject import from_mini, from_spec
from dit_patch.contribute.audit.summary import Category, summary
from dit_patch.contribute.audit.text import audit_text
from dit_patch.contribute.audit.worth import by_worth
from dit_patch.contribute.new.draft import draft
from dit_patch.spec import mini
from dit_patch.spec.recipe import Mini
from dit_patch.spec.registry import Registry

pytestmark = [
    pytest.mark.usefixtures("first_checks_only"),
    pytest.mark.skipif(not SUPPORTED, reason="this torch has no device types written in Python"),
]

SPECS = Registry(plugins=False)
H100 = device("H100")
SMALL = {"config": {"num_layers": 2}, "size": {"f": 2, "h": 16, "w": 16}}


@pytest.fixture(scope="module")
def wan():
    return audit(from_spec(SPECS.get("diffusers/wan"), **SMALL))


# What repeats


def stages(plan):
    """The operations of each stage's own layer in the last forward, each with its category."""
    own = Mini.model_validate({**MINI, "config": {"plan": plan}})
    subject = from_mini(f"{Planted.__module__}.Planted", own)
    observed = observe(subject)
    found = {}
    with Accelerator() as accelerator, torch.no_grad():
        model = to_accelerator(mini.build(subject.spec, subject.toy))
        accelerator.observer = recorder = Recorder(model)
        for arguments in mini.forwards(subject.toy, subject.size, steps=2, device=DEVICE):
            recorder.begin(arguments)
            model(**arguments)
            operations = recorder.end()
        for cost in joined(operations, observed, is_first_pass=False):
            if cost.operation.module.startswith("stages."):
                found.setdefault(int(cost.operation.module.rpartition(".")[2]), []).append(cost)
    return found


SOURCES = st.sampled_from(["latents", "timestep", "prompt", "sizes", "before"])
WAYS = st.sampled_from(["tensor", "item", "count", "branch", "buffer"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(SOURCES, WAYS).map(list), min_size=1, max_size=4))
def test_what_depends_on_a_step_is_never_called_invariant_and_what_does_not_is_found(plan):
    found = stages(plan)
    for number in range(len(plan)):
        depends, read = truly_depends(plan, number), reads_before(plan, number)
        for cost in found[number]:
            if depends & {"hidden_states", "timestep"}:
                assert cost.known.steps == 0.0, (number, plan)
            elif not read & {"hidden_states", "timestep"}:
                assert cost.known.steps == 1.0, (number, plan)
            else:
                assert cost.seen.steps == 1.0, (number, plan)
            if "prompt" in depends:
                assert cost.known.passes == cost.known.generations == 0.0, (number, plan)


@pytest.mark.parametrize(
    ("plan", "category"),
    [
        ([["sizes", "tensor"]], Category.SIZES),
        ([["prompt", "tensor"]], Category.STEPS),
        ([["prompt", "item"]], Category.STEPS),
        ([["timestep", "tensor"]], Category.PASSES),
        ([["latents", "tensor"]], Category.PASSES),  # the passes of a step share the latents, too
        ([["latents", "item"], ["sizes", "tensor"]], Category.PASSES),
        ([["latents", "count"], ["sizes", "tensor"]], Category.PASSES),
        ([["prompt", "count"], ["sizes", "tensor"]], Category.STEPS),
    ],
)
def test_each_kind_of_dependence_has_its_category(plan, category):
    found = stages(plan)
    assert {Category.of(cost) for cost in found[len(plan) - 1]} == {category}


def test_a_branch_that_did_not_turn_is_not_proved():
    # Every timestep that is tried is on one side of it.
    [cost] = stages([["timestep", "branch"]])[0]
    assert cost.seen.steps == 1.0
    assert cost.known.steps == 0.0
    assert Category.of(cost) in (Category.PASSES, Category.PERHAPS)


def test_what_depends_on_state_that_is_no_tensor_is_seen_to_change():
    [cost] = stages([["calls", "tensor"]])[0]
    assert not cost.operation.causes | cost.operation.reads
    assert Category.of(cost) is Category.CHANGING


def test_memory_that_is_written_into_twice_depends_on_both():
    recorder = Recorder(torch.nn.Identity())
    kept, one, other = torch.zeros(2, 3), torch.zeros(3), torch.zeros(3)
    recorder.begin({"one": one, "other": other})
    for number, source in enumerate((one, other)):
        part = kept[number]
        recorder.operation(torch.ops.aten.copy_.default, (part, source), {}, part.copy_(source), [], [])
    recorder.operation(torch.ops.aten.add.Tensor, (kept, 1), {}, kept + 1, [], [])
    assert recorder.end()[-1].causes == {"one", "other"}


def test_arguments_that_share_their_memory_are_both_causes():
    recorder = Recorder(torch.nn.Identity())
    both = torch.zeros(2, 3)
    recorder.begin({"one": both[0], "other": both[1]})
    result = both[0] + 1
    recorder.operation(torch.ops.aten.add.Tensor, (both[0], 1), {}, result, [], [])
    assert recorder.end()[0].causes == {"one", "other"}


def test_what_is_kept_in_a_buffer_is_known_of_in_the_next_forward():
    [cost] = stages([["latents", "buffer"]])[0]
    assert cost.operation.causes == {"hidden_states"}


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({Moment(0, 0, 0): 1, Moment(0, 1, 0): 1, Moment(0, 2, 0): 2}, Repeats(0.5, 0.0, 0.0)),
        ({Moment(0, 0, 0): 1, Moment(0, 0, 1): 1, Moment(1, 0, 0): 2, Moment(1, 0, 1): 1}, Repeats(0.0, 0.5, 0.5)),
        ({Moment(0, 1, 0): 1}, Repeats(0.0, 0.0, 0.0)),
        ({}, Repeats(0.0, 0.0, 0.0)),
    ],
)
def test_the_share_that_repeats(results, expected):
    assert repeats(results) == expected


def test_steps_passes_and_generations_are_told_from_timesteps():
    contents = [{"timestep": each} for each in (9, 9, 5, 5, 1, 1, 9, 9)]
    assert [tuple(each) for each in moments_of(contents)] == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0), (1, 0, 1),
    ]  # fmt: skip
    assert [each.step for each in moments_of([{"x": 1}, {"x": 1}])] == [0, 1]


# What it costs


class Counted(torch.nn.Module):
    """One of everything that is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.linear(x).view(2, 4, 2, 16).transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return y * torch.ones(1, dtype=torch.float64).to(x.device)


def test_operations_flops_bytes_and_copies():
    with Accelerator() as accelerator, torch.no_grad():
        model = to_accelerator(Counted())
        x = torch.zeros(2, 4, 16).to(DEVICE)
        accelerator.observer = recorder = Recorder(model)
        recorder.begin({"x": x})
        model(x)
        operations = {each.name: each for each in recorder.end()}
    linear, attention, product = operations["addmm"], operations["scaled_dot_product_attention"], operations["mul"]
    assert (linear.module, linear.work.flops, linear.work.nbytes) == (
        "linear",
        2 * 8 * 16 * 32,
        4 * (8 * 16 + 16 * 32 + 32 + 8 * 32),
    )
    assert attention.work.flops == 2 * (2 * 2) * 4 * 4 * (16 + 16)
    assert attention.work.nbytes == 4 * 2 * 256  # of one tensor, which is queries, keys and values, and of the result
    assert attention.module == ""
    assert (product.work.flops, product.work.dtype) == (256, torch.float64)
    assert [(each.to_device, each.nbytes) for each in operations["_to_copy"].copies] == [(True, 8)]
    assert operations["_to_copy"].copies[0].line.startswith(__file__.rpartition("/")[0])
    assert not operations["_to_copy"].is_kernel
    assert not operations["ones"].on_device


def test_shapes_alone_keep_small_numbers_and_refuse_to_read_large_ones():
    with Accelerator(largest=100):
        small, large = torch.arange(10, device=DEVICE), torch.zeros(1000, device=DEVICE)
        assert small.tolist() == list(range(10))
        assert (small + 1).sum().item() == 55
        assert large.inner.device.type == (large + small[0]).inner.device.type == "meta"
        with pytest.raises(NoNumbersError, match=r"test_audit\.py:\d+ reads the content of a tensor of shape \(\)"):
            large.sum().item()
        with pytest.raises(NoNumbersError):
            large[:5].tolist()
        mask = torch.tensor([True, False] * 5, device=DEVICE)
        assert large.view(10, 100)[mask].shape == (5, 100)
        small.copy_(large[:10])
        with pytest.raises(NoNumbersError):
            small[3].item()  # what it holds came from what has no numbers


def test_attention_in_shapes_has_the_strides_of_flash_attention():
    with Accelerator(largest=1):
        q = torch.zeros(1, 2, 64, 8, device=DEVICE)
        result = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert result.shape == q.shape
        assert result.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", ["diffusers/wan", "diffusers/hunyuan_video15", "diffusers/z_image"])
def test_shapes_alone_count_what_numbers_count(name):
    spec = SPECS.get(name)
    skip_unless_installed(spec)
    counts = []
    for largest in (None, 512):
        case = spec.mini.case()
        with Accelerator(largest) as accelerator, torch.no_grad():
            model = to_accelerator(mini.build(spec, case))
            for arguments in mini.forwards(case, case.sizes[0], steps=2, device=DEVICE):
                accelerator.take()
                model(**arguments)
            counts.append(accelerator.take())
    assert counts[0].operations == counts[1].operations
    assert counts[0].copies == counts[1].copies
    assert counts[0].syncs == counts[1].syncs


def test_autocast_on_the_accelerator_is_that_of_cuda():
    with Accelerator():
        x, weight = (torch.ones(4, 4, device=DEVICE) for _ in range(2))
        double = torch.ones(4, 4, device=DEVICE, dtype=torch.float64)
        with torch.autocast("cuda", torch.bfloat16):  # as models say it
            assert torch.nn.functional.linear(x, weight).dtype == (x @ weight).dtype == torch.bfloat16
            assert torch.nn.functional.layer_norm((x @ weight), (4,)).dtype == torch.float32
            assert (double @ double).dtype == torch.float64
            with torch.autocast("cuda", torch.float32):
                assert (x.bfloat16() @ weight).dtype == torch.float32
    assert torch.autocast("cpu").device == "cpu"


def test_estimates_are_bound_by_what_is_slowest():
    assert set(DEVICES) >= {"H100", "H200", "A100", "RTX-4090"}
    with Accelerator(largest=1) as accelerator:
        model = torch.nn.Identity()
        accelerator.observer = recorder = Recorder(model)
        big, small = (torch.zeros(size, size, device=DEVICE, dtype=torch.bfloat16) for size in (16384, 8))
        line = torch.zeros(2**30, device=DEVICE)
        recorder.begin({})
        _ = big @ big, line + 1, small @ small
        product, sums, tiny = recorder.end()
    assert H100.milliseconds(product) == pytest.approx(2 * 16384**3 / 989e12 * 1e3)
    assert H100.milliseconds(sums) == pytest.approx(8 * 2**30 / 3350e9 * 1e3)
    assert H100.milliseconds(tiny) == 0.003


# Whole audits


def test_a_spec_plain_and_patched(wan):
    plain, patched = summary(wan.plain, H100), summary(wan.patched, H100)
    assert wan.is_full_size
    assert wan.weights > 50e6  # of two blocks at full width
    assert "condition_embedder.text_embedder" in {row.module.rpartition(".")[0] for row in plain.rows}
    assert plain.repeats.kernels > patched.repeats.kernels > 0
    assert patched.total.kernels < plain.total.kernels
    [keys] = [row for row in plain.rows if row.module == "blocks.*.attn2.to_k"]
    assert (keys.category, keys.causes, keys.amount.kernels) == (Category.STEPS, ("encoder_hidden_states",), 2)
    rope = [row for row in plain.rows if row.module == "rope"]
    assert {row.category for row in rope} == {Category.SIZES}
    assert not [row for row in patched.rows if row.module == "rope"]


def test_text_and_page_and_json_say_the_same(wan):
    text, page, content = audit_text(wan, H100), audit_page(wan, H100), as_dict(wan, H100)
    json.dumps(content)
    figures = f"{content['plain']['total']['kernels']:,.0f}"
    assert figures in text
    assert figures in page
    assert "blocks.*.attn2.to_k" in text
    assert "blocks.*.attn2.to_k" in page
    assert "http" not in page
    assert content["patched"]["total"]["kernels"] < content["plain"]["total"]["kernels"]


def test_a_model_that_cannot_run_at_full_size_is_counted_small_and_says_so():
    subject = from_spec(SPECS.get("diffusers/wan"), config={"num_layers": 2, "text_dim": 100})
    found = audit(subject, patch=False)
    assert not found.is_full_size
    assert any(note.startswith("NOT of full size") for note in found.notes)
    assert summary(found.plain, H100).total.kernels


def test_the_mask_of_hunyuan_video_15_is_found():
    spec = SPECS.get("diffusers/hunyuan_video15")
    skip_unless_installed(spec)
    subject = from_spec(spec, config={"num_layers": 4})
    plain = summary(audit(subject, patch=False).plain, H100)
    first = next(row for row in plain.rows if row.category.repeats)
    assert first.module == "transformer_blocks.*.attn"
    assert "bitwise_and" in first.operations
    assert first.causes == ("encoder_attention_mask", "encoder_attention_mask_2")
    assert first.amount.milliseconds > 0.05 * plain.total.milliseconds
    tokens = plain_tokens(subject)
    assert first.amount.nbytes >= 4 * tokens**2  # S x S numbers of one byte, read twice and written, in each layer


def plain_tokens(subject):
    return subject.size["f"] * subject.size["h"] * subject.size["w"]  # patches of one latent


def test_matrix_game_2_copies_and_waits_with_their_lines_and_none_patched():
    pytest.importorskip("fastvideo")
    found = audit(from_spec(SPECS.get("fastvideo/matrixgame2")))
    plain, patched = summary(found.plain, H100), summary(found.patched, H100)
    assert (plain.total.copies, plain.total.syncs) == (93, 126)
    lines = [line for cost in found.plain.costs for line in (*cost.operation.copies, *cost.operation.syncs)]
    assert all(each.line.startswith("fastvideo/") and each.line.rpartition(":")[2].isdigit() for each in lines)
    assert (patched.total.copies, patched.total.downloads, patched.total.syncs) == (0, 0, 0)


def homes(name):
    return load_own(f"minis/{name}.yaml")


def load_own(path):
    from pathlib import Path

    from dit_patch.spec.loading import load_mini

    return load_mini(Path(__file__).parent / path)


def test_the_camera_of_lingbot_world_2_is_what_repeats_most():
    pytest.importorskip("fastvideo")
    name = "fastvideo.models.dits.lingbotworld2.causal_fast.LingBotWorld2CausalFastTransformer3DModel"
    subject = from_mini(name, homes("lingbotworld2"), config={"num_layers": 4})
    plain = summary(audit(subject).plain, H100)
    worth = {}
    for row in plain.rows:
        if row.category is not Category.CHANGING:
            about = "camera" if "cam_" in row.module or row.causes == ("dit_cond_dict",) else row.stage
            worth[about] = worth.get(about, 0.0) + row.amount.flops
    assert max(worth, key=worth.get) == "camera"
    assert worth["camera"] > 0.12 * plain.total.flops
    assert plain.total.syncs >= 4 * 3  # KV indices and grids are read in every block


def test_the_float64_rotation_and_the_time_mlp_of_wan_22_are_found():
    if not other_homes.has_wan():
        pytest.skip("needs wan22, Wan 2.2's own repository")
    subject = from_mini("wan.modules.model.WanModel", homes("wan22"), config={"num_layers": 4})
    found = audit(subject)
    plain = summary(found.plain, H100)
    rows = {row.module: row for row in plain.rows if row.category.repeats}
    assert rows["time_projection.*"].category is Category.PASSES
    assert rows["time_projection.*"].amount.milliseconds > rows["text_embedding.*"].amount.milliseconds
    doubles = [cost for cost in found.plain.costs if cost.operation.work.dtype is torch.float64]
    assert {cost.operation.module.rpartition(".")[2] for cost in doubles} >= {"self_attn"}


def test_a_draft_has_the_sites_in_the_order_of_their_worth():
    name = "diffusers.AllegroTransformer3DModel"
    made = draft(name)
    from dit_patch.contribute.new.draft import guessed_mini, model_class

    subject = from_mini(
        model_class(name).__module__ + ".AllegroTransformer3DModel", guessed_mini(model_class(name)), **SMALL
    )
    plain = summary(audit(subject, patch=False).plain, H100)
    ordered = by_worth(made, plain)
    assert {each.at for each in ordered.sites} | set(ordered.refused) >= {each.at for each in made.sites}
    assert all("Worth " in each.about for each in ordered.sites if each.kind != "rotary")
    worths = [
        float(each.about.partition("Worth ")[2].partition("%")[0]) for each in ordered.sites if "Worth" in each.about
    ]
    assert worths == sorted(worths, reverse=True)


def test_copies_of_a_real_device_are_told_from_where_tensors_are():
    on_meta = torch.zeros(3, device="meta")
    assert not transfers.is_on_device(on_meta)
    assert transfers.copies("_to_copy", (torch.zeros(3),), on_device=False) == []
    [copy] = transfers.copies("_to_copy", (torch.zeros(3),), on_device=True)
    assert (copy.to_device, copy.nbytes) == (True, 12)
