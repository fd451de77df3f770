"""On an accelerator: every bundled spec gives the same bits there, stays out of the way when the model moves, and asks
the device for less. The accelerator is simulated, so that this runs on every machine; its own promises come last.
"""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
import toys

from dit_patch.contribute import verify
from dit_patch.contribute.audit.accelerator import (
    DEVICE,
    NAME,
    SUPPORTED,
    Accelerator,
    AcceleratorTensor,
    Counts,
    numbers,
    to_accelerator,
    to_cpu,
)
from dit_patch.handle import apply
from dit_patch.memo import keys
from dit_patch.memo.keys import same_bits
from dit_patch.memo.lookup import Memo
from dit_patch.spec.registry import Registry

pytestmark = [
    pytest.mark.usefixtures("first_checks_only"),
    pytest.mark.spread("name"),
    pytest.mark.skipif(not SUPPORTED, reason="this torch has no device types written in Python"),
]

SPECS = {spec.name: spec for spec in Registry(plugins=False)}
CASES = [
    (name, variant)
    for name, spec in SPECS.items()
    for variant in (None, *spec.mini.variants)
    if variant != "no_cache"  # flex attention knows the devices it runs on by name
]
NEVER_TWICE = {
    # The sum of two embeddings, a new tensor each time.
    ("fastvideo/wan", "anyflow"): {"condition_embedder.time_modulation.forward"},
    # What it keeps makes the table, which is kept itself.
    ("fastvideo/matrixgame3", "no_memory"): {"..patch_embedding"},
    ("fastvideo/matrixgame3", "plain"): {"..patch_embedding"},
}
STEPS = 3  # of two passes each; in the last, everything but its own timestep has been seen and checked


@pytest.fixture
def accelerator():
    with Accelerator() as active:
        yield active


def assert_equal(ours, theirs, device):
    """The same bits from both, and all of it on the device."""
    assert {str(tensor.device) for outputs in (*ours, *theirs) for tensor in outputs} == {device}
    assert verify.first_difference(numbers(ours), numbers(theirs)) is None


def assert_hits(handle, before: Counter[str], but: set[str] = frozenset()) -> Counter[str]:
    """Each site that was ever called has more hits than before, and none was passed over; the hits so far."""
    rows = handle.stats()
    hits = Counter({row.at: row.hits for row in rows})
    called = {row.at for row in rows if row.hits + row.misses} - but
    assert called, "no site was called"
    assert {at for at in called if hits[at] <= before[at]} == set()
    assert {row.at: row.bypassed for row in rows if row.bypassed} == {}
    return hits


# Every bundled spec.


@pytest.mark.parametrize("name, variant", CASES)
def test_patched_equals_unpatched_on_the_accelerator(accelerator, tiny, name, variant):
    # Float32 is in the next tests. Two need autocast besides, which this device does not have.
    autocast = name in ("fastvideo/matrixgame2", "diffusers/kandinsky5")
    each = tiny(name, variant, dtype=torch.float32 if autocast else torch.bfloat16)
    for model in each.both:
        to_accelerator(model)
    handle = each.apply()
    calls = each.calls(2, device=DEVICE)
    assert_equal(verify.run(each.model, calls), verify.run(each.plain, calls), DEVICE)
    assert_hits(handle, Counter(), NEVER_TWICE.get((name, variant), set()))


@pytest.mark.parametrize("name", SPECS)
def test_a_model_may_move_to_the_accelerator_and_back_under_one_handle(accelerator, tiny, name):
    each = tiny(name)
    here, there = (to_cpu, each.calls(2), "cpu"), (to_accelerator, each.calls(STEPS, device=DEVICE), DEVICE)
    handle, hits = each.apply(), Counter()
    for move, calls, device in (here, there, here):
        for model in each.both:
            move(model)
            # The inputs of the first and the last round are the same tensors: results of other weights would show.
            for parameter in model.parameters():
                parameter.data = parameter.data * 0.9
        accelerator.take()
        ours, patched = verify.run(each.model, calls), accelerator.take()
        theirs, plain = verify.run(each.plain, calls), accelerator.take()
        assert_equal(ours, theirs, device)
        # What was kept on another device is not brought over again and again.
        assert len(patched.copies) <= len(plain.copies), f"on {device}\n  unpatched: {plain}\n  patched:   {patched}"
        idle = {site.at for site in each.spec.sites if site.accelerator} if device == "cpu" else set()
        hits = assert_hits(handle, hits, NEVER_TWICE.get((name, None), set()) | idle)


@pytest.mark.parametrize("name, variant", CASES)
def test_a_warm_step_asks_less_of_the_device(accelerator, tiny, monkeypatch, name, variant):
    each = tiny(name, variant)
    for model in each.both:
        to_accelerator(model)
    calls = each.calls(STEPS, device=DEVICE)
    plain = last_step(accelerator, each.plain, calls)
    each.apply()
    if name == "diffusers/z_image":  # it makes a table at its first forward, and keeps it in an attribute
        verify.run(each.model, calls[:1])
    in_sites = count_in_sites(monkeypatch, accelerator)
    patched = last_step(accelerator, each.model, calls)

    both = f"a step of {name} {variant or ''}\n  unpatched: {plain}\n  patched:   {patched}"
    assert patched.operations.total() < plain.operations.total(), both
    assert waits(patched) <= waits(plain), both
    avoidable = waits(plain) & waits(in_sites)
    if avoidable:
        assert waits(patched).total() < waits(plain).total(), f"{both}\n  in sites: {avoidable}"


def last_step(accelerator, model, calls) -> Counts:
    """What the device was asked for by the last two of `calls`."""
    left = len(calls)

    def counted(**arguments):
        nonlocal left
        if left == 2:
            accelerator.take()
        left -= 1
        return model(**arguments)

    verify.run(counted, calls)
    return accelerator.take()


def waits(counts: Counts) -> Counter:
    """Copies and syncs by what they are and who asked for them."""
    return Counter((type(each).__name__, each.line) for each in (*counts.copies, *counts.syncs))


def count_in_sites(monkeypatch, accelerator) -> Counts:
    """What the device is asked for, from now on, by code whose results dit_patch keeps; it still counts as before."""
    timed, found = Memo.time, Counts()

    def counted(memo, compute):
        before = accelerator.take()
        result = timed(memo, compute)
        found.add(accelerator.counts)
        before.add(accelerator.take())
        accelerator.counts = before
        return result

    monkeypatch.setattr(Memo, "time", counted)
    return found


# What sites are for on a device, in small.


class Hesitant(torch.nn.Module):
    """Makes a table on the host at each forward, and waits for the device to tell it a length."""

    def __init__(self):
        super().__init__()
        self.table = HostTable()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x, mask):
        x = x * self.scale + self.table(x).to(x.device)
        return x[:, : self.length(mask)]

    def length(self, mask):
        return int(mask.sum())


class HostTable(torch.nn.Module):
    def forward(self, x):
        return torch.arange(x.shape[-1]).cos()


TABLE = """
    - at: table.forward
      kind: rope
      key: {x: [shape]}
"""
ON_DEVICE = f"{TABLE}      device: model\n"
LENGTH = """
    - at: length
      kind: mask
      key: {mask: [identity]}
"""


def hesitant_inputs(device=DEVICE):
    x, mask = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 1, 1, 1, 0, 0])
    return [{"x": (x + step).to(device), "mask": mask} for mask in [mask.to(device)] for step in range(3)]


@pytest.mark.parametrize(
    "sites, uploads, syncs",
    [("", 1, 1), (TABLE, 1, 1), (ON_DEVICE, 0, 1), (LENGTH, 1, 0), (ON_DEVICE + LENGTH, 0, 0)],
    ids=["unpatched", "table kept on the host", "table kept on the device", "length kept", "both"],
)
def test_what_a_site_keeps_on_the_device_is_neither_copied_nor_waited_for(accelerator, tmp_path, sites, uploads, syncs):
    model, twin = to_accelerator(Hesitant().eval()), to_accelerator(Hesitant().eval())
    calls = hesitant_inputs()
    with toys.patch(model, tmp_path, sites) if sites else contextlib.nullcontext():
        warming = verify.run(model, calls[:2])
        accelerator.take()
        warm = verify.run(model, calls[2:])
        counts = accelerator.take()
    assert_equal(warming + warm, verify.run(twin, calls), DEVICE)
    assert (len(counts.uploads), len(counts.downloads), len(counts.syncs)) == (uploads, 0, syncs), str(counts)


def test_a_table_kept_for_the_device_is_not_handed_out_on_the_host(accelerator, tmp_path):
    model = Hesitant().eval()
    with toys.patch(model, tmp_path, ON_DEVICE) as handle:
        for move, device in (to_cpu, "cpu"), (to_accelerator, DEVICE), (to_cpu, "cpu"):
            calls = hesitant_inputs(device)
            assert_equal(verify.run(move(model), calls), verify.run(move(Hesitant().eval()), calls), device)
        assert toys.row(handle, "table.forward").hits >= 6


def test_wan_pipeline_has_the_same_latents_from_fewer_operations(accelerator, tiny):
    from diffusers import UniPCMultistepScheduler, WanPipeline

    each = tiny("diffusers/wan")
    prompts = {f"{kind}_embeds": torch.randn(1, 6, 16).to(DEVICE) for kind in ("prompt", "negative_prompt")}
    latents = torch.randn(1, 4, 2, 4, 4).to(DEVICE)

    def generate(model):
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=model)
        pipeline.set_progress_bar_config(disable=True)
        accelerator.take()
        output = pipeline(
            **prompts, latents=latents, height=32, width=32, num_frames=5, num_inference_steps=4, output_type="latent"
        )
        return output.frames, accelerator.take()

    for model in each.both:
        to_accelerator(model)
    handle = each.apply()
    (ours, patched), (theirs, plain) = map(generate, each.both)
    assert_equal([[ours]], [[theirs]], DEVICE)
    assert_hits(handle, Counter())
    (ours, patched), (theirs, plain) = map(generate, each.both)
    assert patched.operations.total() < plain.operations.total(), f"\n  unpatched: {plain}\n  patched:   {patched}"
    assert waits(patched) == waits(plain)


# What the simulation promises.


def test_numbers_on_the_accelerator_are_those_of_the_cpu(accelerator):
    x = torch.randn(2, 3, 4)
    for compute in (
        lambda x: x.softmax(-1) @ x.mT,
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
        lambda x: torch.cat([x, torch.ones_like(x), torch.arange(24.0, device=x.device).view_as(x)]),
        lambda x: torch.view_as_real(torch.polar(x, x).conj() * 1j),
        lambda x: x[x > 0],
        lambda x: x.clone().index_put_((x > 0,), torch.zeros((), device=x.device))[:, [0, 2]],
    ):
        there = compute(x.to(DEVICE))
        assert (type(there), str(there.device)) == (AcceleratorTensor, DEVICE)
        assert there.stride() == compute(x).stride()
        assert same_bits(there.cpu(), compute(x))


def test_copies_are_counted_with_their_bytes_and_who_asked(accelerator):
    there = torch.arange(6).to(DEVICE)
    torch.tensor([1.0, 2.0], device=DEVICE)
    there.copy_(torch.arange(6, dtype=torch.int32))
    there[torch.tensor([0, 1])]
    there.cpu()
    there.to(torch.float32), there.to(DEVICE), there.clone(), there + torch.tensor(1.0)
    assert [(copy.to_device, copy.nbytes) for copy in accelerator.copies] == [
        (True, 48),
        (True, 8),
        (True, 24),
        (True, 16),
        (False, 48),
    ]
    lines = [copy.line.rpartition(":") for copy in accelerator.copies]
    assert all(file.endswith("test_device.py") for file, _, _ in lines)
    assert [int(line) - int(lines[0][2]) for _, _, line in lines] == [0, 1, 2, 3, 4]
    assert str(accelerator).startswith("4 copies to the device (96 bytes), 1 back, 0 syncs")
    assert accelerator.take().operations["_to_copy"] == 4
    assert accelerator.take() == Counts()


def test_syncs_are_counted(accelerator):
    there = torch.arange(6).to(DEVICE)
    for wait in (
        lambda: there[1].item(),
        lambda: bool(there[1]),
        lambda: there.tolist(),
        lambda: there.nonzero(),
        lambda: torch.equal(there, there),
        lambda: there[there > 2],
        lambda: torch.allclose(there, there),
    ):
        accelerator.take()
        wait()
        (sync,) = accelerator.syncs
        assert "test_device.py:" in sync.line
    accelerator.take()
    there.masked_fill(there > 2, 0), there.sum(), there.index_put_((there > 2,), torch.tensor(0).to(DEVICE)), there * 2
    assert accelerator.syncs == []


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: there.add_(here),
        lambda here, there: torch.cat([there, here]),
        lambda here, there: here[there],
        lambda here, there: torch.nn.functional.embedding(here, there),
        lambda here, there: there[0] * here,
    ],
)
def test_tensors_of_two_devices_do_not_mix(accelerator, mix):
    with pytest.raises(RuntimeError, match="same device"):
        mix(torch.arange(3), torch.arange(3).to(DEVICE))


def test_views_are_known_by_their_bases_storage_and_version(accelerator):
    base = torch.arange(6.0).to(DEVICE)
    other = torch.arange(6.0).to(DEVICE)
    views = [base[2:], base.view(2, 3), base.expand(3, 6), base.detach(), base.as_strided((2,), (3,), 1)]
    for view in views:
        assert view.untyped_storage()._cdata == base.untyped_storage()._cdata != other.untyped_storage()._cdata
    assert base[2:].storage_offset() == 2
    one, again = (keys._identity(base.expand(3, 6)) for _ in range(2))
    assert one == again != keys._identity(base[:5])
    writes = (lambda: views[0].mul_(2), lambda: torch.add(base, 1, out=base), lambda: base.zero_())
    for number, write in enumerate(writes):
        write()
        assert {view._version for view in (base, *views)} == {number + 1}
        assert keys._identity(base.expand(3, 6)) != one
    assert base.tolist() == views[1].flatten().tolist() == [0] * 6
    assert other._version == 0


def test_a_module_that_moves_keeps_its_parameters_with_other_storages(accelerator):
    model = torch.nn.Linear(2, 2)
    weight, storage, version = model.weight, model.weight.untyped_storage()._cdata, model.weight._version
    before = weight.detach().clone()
    to_accelerator(model)
    assert model.weight is weight and weight.device == torch.device(DEVICE)
    assert isinstance(weight, torch.nn.Parameter) and weight.requires_grad and weight._version == version
    there = weight.untyped_storage()._cdata
    weight.data = weight.data * 2
    assert len({storage, there, weight.untyped_storage()._cdata}) == 3
    to_cpu(model)
    assert model.weight is weight and type(weight) is torch.nn.Parameter
    assert torch.equal(weight, before * 2)


def test_a_shape_changed_in_place_and_use_after_the_end_are_refused():
    with Accelerator():
        there = torch.ones(2, 3).to(DEVICE)
        with pytest.raises(NotImplementedError, match="in place"):
            there.t_()
        with pytest.raises(RuntimeError, match="in use"), Accelerator():
            pass
    with pytest.raises(RuntimeError, match="outside"):
        there + 1


def test_the_accelerator_leaves_nothing_switched_on():
    def switches():
        return (
            set(keys.PLAIN),
            torch._C._only_lift_cpu_tensors(),
            torch.__future__.get_swap_module_params_on_conversion(),
            torch._C._len_torch_dispatch_stack(),
            torch.accelerator.is_available(),
            getattr(torch, NAME).device_count() if hasattr(torch, NAME) else 0,
        )

    before = switches()
    with pytest.raises(KeyError), Accelerator():
        assert AcceleratorTensor in keys.PLAIN and torch.accelerator.current_accelerator().type == NAME
        with torch.random.fork_rng():
            torch.rand(2, device=DEVICE)
        raise KeyError
    assert switches() == before
    with torch.random.fork_rng():
        torch.rand(2)
    assert torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 2)] * 3).shape == (1, 1, 2, 2)


def test_without_the_accelerator_its_tensors_would_be_bypassed(accelerator, tiny, monkeypatch):
    each = tiny("diffusers/wan")
    to_accelerator(each.model)
    handle = apply(each.model)
    keys.PLAIN.discard(AcceleratorTensor)
    verify.run(each.model, each.calls(1, device=DEVICE))
    assert all(row.hits == 0 and row.bypassed for row in handle.stats() if row.notes != ("not in this model",))
    handle.remove()
