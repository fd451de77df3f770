"""Every bundled spec on the real class that it names: the same bits, and the hits that they are for.

A new YAML file is tested by being there.
"""

import diffusers
import pytest
import torch
from conftest import asked_for, skip_unless_installed
from packaging.version import Version

import dit_patch
from dit_patch.contribute import verify
from dit_patch.memo.results import map_tensors
from dit_patch.spec import mini
from dit_patch.spec.registry import Registry

pytestmark = pytest.mark.spread("name")

SPECS = {spec.name: spec for spec in Registry(plugins=False)}
CASES = [(name, variant) for name, spec in SPECS.items() for variant in (None, *spec.mini.variants)]
STEPS = 3  # one that computes, one whose first hits are checked, one that hits
# FastVideo's stages keep some of what they pass on in float32, Kandinsky some weights; autocast sees to the rest.
AUTOCAST = ("fastvideo/", "diffusers/kandinsky5")

# Asked for by training alone, or once in a model's life: see test_fastvideo.py.
ELSEWHERE = {
    ("fastvideo/causal_wan", "_prepare_blockwise_causal_attn_mask"),
    ("fastvideo/causal_wan", "_prepare_teacher_forcing_mask"),
    ("fastvideo/matrixgame2", "_prepare_blockwise_causal_attn_mask_keyboard"),
}
if Version(diffusers.__version__) < Version("0.36"):  # before, SkyReels rotated in another way
    [rotary] = (site.at for site in SPECS["diffusers/skyreels_v2"].sites if site.kind == "rotary")
    ELSEWHERE.add(("diffusers/skyreels_v2", rotary))


def build(name, variant=None, dtype=torch.float32, seed=0):
    spec = SPECS[name]
    skip_unless_installed(spec)
    case = spec.mini.case(variant)
    return mini.build(spec, case, dtype=dtype, seed=seed), case


def generation(case, number=0, dtype=torch.float32, size=0, steps=2):
    return list(mini.forwards(case, case.sizes[size], steps=steps, dtype=dtype, generation=number))


def expect_hits(handle, case, forwards):
    """Each site hits whenever what it depends on has been seen: sizes, a prompt of a generation, or a step."""
    generations = len(case.sizes)
    sites = {site.at: site for member in handle.patched_models for site in member.spec.sites}
    for row in handle.stats():
        assert not row.bypassed, (row.at, row.bypassed)
        site, calls = sites[row.at], row.hits + row.misses
        if not calls:
            assert site.optional or site.accelerator, row
            continue
        per_forward = calls // forwards
        if site.use and not site.key:
            assert row.misses == 0, row
        elif site.unused or (site.unused_with and case.rollout):
            assert row.misses == 1, row
        elif row.kind in ("rope", "rotary"):
            fewest = tables(row, case, calls)
            assert fewest <= row.misses <= fewest * (1 if ":" in row.at else max(1, per_forward)), row
        elif case.config.get("r_embedder") and row.at == "condition_embedder.time_modulation.forward":
            assert row.hits == 0, row  # gets the sum of two embeddings, a new tensor each time
        elif row.kind == "timestep":
            assert row.hits == row.misses == calls // 2, row
        elif row.kind == "context":
            assert row.misses <= 2 * generations * per_forward, row
            assert row.hits >= calls - 2 * generations * per_forward > 0, row
        else:
            assert row.kind == "mask"
            assert row.misses <= 2 * generations * per_forward and row.hits > row.misses, row


def tables(row, case, calls):
    """How many different tables a rope site has to make."""
    blocks = sum(size.get("blocks", 1) for size in case.sizes)
    if row.at == "forward:get_rotary_pos_embed":
        one_table = not case.rollout or case.config.get("rope_cache_policy") == "relativistic"
        return len(case.sizes) if one_table else blocks
    if row.at == "..patch_embedding":  # MatrixGame 3's numbers of frames, some of them by layer and size
        return row.misses if row.misses <= 5 else 0
    if row.at == "dit_patch.functions.matrixgame:expansion":
        if row.spec == "fastvideo/matrixgame2":  # whose layers have a table each
            return case.config["num_layers"] * (blocks if case.rollout else 1)
        # Without memory, each block makes its own numbers, for queries and keys to share.
        return 2 * len(case.sizes) if "x_memory" in case.inputs else calls // 2
    return 1 if ":" in row.at else len(case.sizes)


# Every mini in float32, the first of each spec in bfloat16, too; test_device.py has all of them in bfloat16.
IN_BOTH = [(*case, torch.float32) for case in CASES] + [(name, None, torch.bfloat16) for name in SPECS]


@pytest.mark.parametrize("name, variant, dtype", IN_BOTH, ids=lambda value: str(value).removeprefix("torch."))
def test_patched_equals_unpatched_over_sizes_prompts_and_steps_with_the_hits_due(name, variant, dtype):
    model, case = build(name, variant, dtype)
    assert len(case.sizes) >= 3
    generations = [generation(case, number, dtype, number, STEPS) for number in range(len(case.sizes))]
    forwards = sum(generations, [])
    with torch.autocast("cpu", torch.bfloat16, enabled=name.startswith(AUTOCAST) and dtype is torch.bfloat16):
        plain = verify.run(model, forwards)
        with dit_patch.apply(model, only=asked_for(SPECS[name])) as handle:
            assert verify.first_difference(plain, verify.run(model, forwards)) is None
            expect_hits(handle, case, len(forwards))
        again = verify.run(model, generations[0])
    assert verify.first_difference(plain[: len(again)], again) is None


@pytest.mark.parametrize("name", SPECS)
def test_each_site_of_a_spec_is_reached_and_hits_in_one_of_its_minis(name):
    hit = set()
    for variant in (None, *SPECS[name].mini.variants):
        model, case = build(name, variant)
        with dit_patch.apply(model, only=asked_for(SPECS[name])) as handle:
            verify.run(model, generation(case))
            hit |= {row.at for row in handle.stats() if row.hits}
    here = [site for site in SPECS[name].sites if not site.accelerator]
    expected = {site.at for site in here if not site.at.startswith("pipeline:")}
    assert hit == {at for at in expected if (name, at) not in ELSEWHERE}


def edit_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)


def replace_weights(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


def load(model):
    generator = torch.Generator().manual_seed(5)
    state = {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def cast(model):
    model.to(torch.bfloat16)


def add_lora(model):
    import peft

    linear = [name for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)]
    targets = [name for name in linear if "proj_out" not in name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    model.eval()


def scale_lora(model):
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.3)


def fuse_lora(model):
    model.fuse_lora(lora_scale=0.7)


def unload_lora(model):
    model.unload_lora()


def expect_changes_to_count(name, changes):
    """One change after the other on a patched model and its twin: each time both change, and in the same way."""
    (model, case), (twin, _) = build(name), build(name)
    forwards = generation(case)
    with dit_patch.apply(model, only=asked_for(SPECS[name])) as handle:
        first = verify.run(model, forwards)
        assert verify.first_difference(first, verify.run(twin, forwards)) is None
        for change in changes:
            change(model)
            change(twin)
            # Of the dtype that the change leaves: else, prompt and timestep are the very same tensors as before.
            forwards = generation(case, dtype=torch.bfloat16) if change is cast else forwards
            with torch.autocast("cpu", torch.bfloat16, enabled=change is cast and name.startswith(AUTOCAST)):
                after = verify.run(model, forwards)
                assert verify.first_difference(verify.run(twin, forwards), after) is None, change.__name__
            assert verify.first_difference(first, after) is not None, change.__name__
        assert sum(row.hits for row in handle.stats()) > 0


@pytest.mark.parametrize("name", SPECS)
def test_weights_that_change_between_generations_count(name):
    expect_changes_to_count(name, [edit_weights, replace_weights, load, cast])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.filterwarnings("ignore:::peft", "ignore:::diffusers")
def test_lora_that_comes_and_goes_between_generations_counts(name):
    pytest.importorskip("peft")
    model, _ = build(name)
    if not hasattr(model, "add_adapter"):
        pytest.skip("not a model that peft adds adapters to")
    fusing = [fuse_lora, unload_lora] if hasattr(model, "fuse_lora") else []
    expect_changes_to_count(name, [add_lora, scale_lora, *fusing])


@pytest.mark.parametrize("name", SPECS)
def test_a_prompt_that_is_replaced_or_rewritten_mid_run_counts(name):
    model, case = build(name)
    other = generation(case, number=1)
    forwards = generation(case)
    half = len(forwards) // 2
    prompts = [key for key, recipe in case.inputs.items() if recipe.new == "pass"] or ["encoder_hidden_states"]
    prompt = "encoder_hidden_states" if "encoder_hidden_states" in forwards[0] else prompts[0]
    replaced = forwards[:half] + [
        {**own, **{key: new[key] for key in prompts}} for own, new in zip(forwards[half:], other)
    ]
    rewritten = generation(case)

    def run(forwards, rewrite):
        if case.rollout and not rewrite:
            return verify.run(model, forwards)  # with the KV caches of the first half
        outputs = verify.run(model, forwards[:half])
        if rewrite:
            map_tensors(lambda tensor: tensor.mul_(2), forwards[0][prompt])
        return outputs + verify.run(model, forwards[half:])

    plain = run(replaced, False), [] if case.rollout else run(rewritten, True)
    rewritten = generation(case)
    with dit_patch.apply(model, only=asked_for(SPECS[name])):
        assert verify.first_difference(plain[0], run(replaced, False)) is None
        assert verify.first_difference(plain[1], [] if case.rollout else run(rewritten, True)) is None


@pytest.mark.parametrize("name", SPECS)
def test_two_generations_with_one_handle_equal_those_of_fresh_models(name):
    model, case = build(name)
    with dit_patch.apply(model, only=asked_for(SPECS[name])):
        for number in (0, 1, 0):
            forwards = generation(case, number, size=number)
            fresh, _ = build(name)
            assert verify.first_difference(verify.run(fresh, forwards), verify.run(model, forwards)) is None


@pytest.mark.parametrize("name", SPECS)
def test_only_the_kinds_asked_for_are_patched(name):
    model, case = build(name)
    with dit_patch.apply(model, only=asked_for(SPECS[name], "rope")) as handle:
        verify.run(model, generation(case))
        assert {row.kind for row in handle.stats()} == {"rope"}
        assert all(row.hits for row in handle.stats())


@pytest.mark.parametrize("name, variant", CASES)
def test_nothing_is_left_behind(name, variant):
    model, case = build(name, variant)

    def everything():
        return {
            path: {
                key: dict(value) if isinstance(value, dict) and "_hooks" in key else value
                for key, value in vars(module).items()
            }
            for path, module in model.named_modules()
        }

    before = everything()
    with dit_patch.apply(model, only=asked_for(SPECS[name])):
        assert everything() != before
        verify.run(model, generation(case))
    after = everything()
    names = [{path: set(values) for path, values in each.items()} for each in (before, after)]
    assert names[0] == names[1]
    for path, values in after.items():
        assert all(not value for key, value in values.items() if "_hooks" in key and "forward" in key), path
