"""Step caching on every class that a bundled spec supports: the model's own bits where nothing is cached, cache-dit's
skips and bits where something is, and nothing left afterwards."""

import copy
import itertools
import re
import warnings

import pytest
import torch
from conftest import asked_for, skip_unless_installed

pytest.importorskip("cache_dit", reason="needs cache-dit")

import stepping

import dit_patch
from dit_patch import StepCacheError
from dit_patch.contribute import verify
from dit_patch.spec import mini
from dit_patch.spec.registry import Registry
from dit_patch.step_cache import requirements

pytestmark = pytest.mark.spread("name")

REGISTRY = Registry(plugins=False)
SUPPORTED = [spec.name for spec in REGISTRY if spec.step_cache and spec.step_cache.supported]
REFUSED = [spec.name for spec in REGISTRY if spec.step_cache and not spec.step_cache.supported]
VARIANTS = [
    (name, variant) for name in SUPPORTED for variant in (None, *REGISTRY.get(name).mini.variants)
]  # a spec put into specs/ is tested with no other change


# Every spec without a calibrator and with one of the three; Wan with each.
CALIBRATORS = ("taylorseer", "foca", "dmd")
CALIBRATED = [(name, None) for name in SUPPORTED]
CALIBRATED += [(name, each) for name, each in zip(SUPPORTED, itertools.cycle(CALIBRATORS)) if name != "diffusers/wan"]
CALIBRATED += [("diffusers/wan", each) for each in CALIBRATORS]


def twins(spec, case, count=2):
    return [mini.build(spec, case) for _ in range(count)]


def shape_of(model):
    """Everything that a removal must restore: attributes, modules, parameters, in their order."""
    return (
        [(name, list(vars(module))) for name, module in model.named_modules()],
        [name for name, _ in model.named_parameters()],
        list(model.state_dict()),
        [list(module._modules) for module in model.modules()],
        "forward" in vars(model),
    )


def test_every_spec_says_whether_steps_can_be_cached():
    assert all(spec.step_cache is not None for spec in REGISTRY)
    assert {"fastvideo/causal_wan", "fastvideo/matrixgame2"} <= set(REFUSED)
    assert {"diffusers/wan", "fastvideo/wan"} <= set(SUPPORTED)


NOTHING_CACHED = {
    "threshold 0": {"threshold": 0.0, "warmup": 0},
    "warmup as long as the run": {"threshold": 1.0, "warmup": 7},
    "max_cached 0": {"threshold": 1.0, "warmup": 2, "max_cached": 0},
}


@pytest.mark.parametrize(
    "name, variant, why",
    [(*each, why) for each, why in zip(VARIANTS, itertools.cycle(NOTHING_CACHED))],
)
def test_nothing_cached_is_the_models_own_output(name, variant, why):
    spec = REGISTRY.get(name)
    skip_unless_installed(spec)
    case = stepping.deep(spec, 3, variant)
    model, plain = twins(spec, case)
    calls = stepping.steps(spec, case)
    before = shape_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with dit_patch.apply(
            model, step_cache={"fn": 1, "min_steps": 0, "calibrator": "taylorseer", **NOTHING_CACHED[why]}
        ) as handle:
            ours = verify.run(model, calls)
            assert all(row.steps == 7 and not row.cached for row in handle.step_stats())
    assert verify.first_difference(ours, verify.run(plain, calls)) is None
    assert shape_of(model) == before


@pytest.mark.parametrize("name, calibrator", CALIBRATED)
def test_same_skips_and_bits_as_cache_dit_alone(name, calibrator):
    spec = REGISTRY.get(name)
    skip_unless_installed(spec)
    case = stepping.deep(spec, 4)
    ours, theirs, plain = twins(spec, case, 3)
    calls = stepping.steps(spec, case)
    caching = requirements.cache_dit()
    config = {
        None: None,
        "taylorseer": caching.TaylorSeerCalibratorConfig(taylorseer_order=1),
        "foca": caching.FoCaCalibratorConfig(),
        "dmd": caching.DMDCalibratorConfig(dmd_history=6),
    }[calibrator]
    if name in stepping.FOR_CACHE_DIT:
        stepping.FOR_CACHE_DIT[name](theirs)
    knobs = {"fn": 1, "bn": 0, "threshold": 1.0, "warmup": 3}
    read = stepping.cache_dit_alone(theirs, spec, calibrator=config, **knobs)
    with dit_patch.apply(ours, step_cache={**knobs, "calibrator": calibrator, "min_steps": 0}) as handle:
        made = verify.run(ours, calls)
        assert sorted(stepping.cached(handle).values()) == sorted(map(tuple, read_after(read, theirs, calls)))
        assert all(row.cached == (3, 4, 5, 6) for row in handle.step_stats())
    assert verify.first_difference(made, read_after.outputs) is None
    assert verify.first_difference(made, verify.run(plain, calls)) == 6


def read_after(read, model, calls):
    read_after.outputs = verify.run(model, calls)
    return read()


@pytest.mark.parametrize("name", SUPPORTED)
def test_last_blocks_run_in_skipped_steps(name):
    spec = REGISTRY.get(name)
    skip_unless_installed(spec)
    case = stepping.deep(spec, 4)
    ours, theirs = twins(spec, case)
    calls = stepping.steps(spec, case)
    ran = []
    owner = getattr(ours, spec.blocks[0].at)
    for number, block in enumerate(owner):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    knobs = {"fn": 1, "bn": 1, "threshold": 1.0, "warmup": 2}
    with dit_patch.apply(ours, step_cache={**knobs, "min_steps": 0}) as handle:
        made = verify.run(ours, calls)
        assert all(row.cached == (2, 3, 4, 5, 6) for row in handle.step_stats())
    # Two computed steps and five skipped ones, twice each, and the proof of parity.
    assert [ran.count(number) for number in range(4)] == [15, 5, 5, 15]
    if name not in stepping.FOR_CACHE_DIT:
        stepping.cache_dit_alone(theirs, spec, **knobs)
        assert verify.first_difference(made, verify.run(theirs, calls)) is None


@pytest.mark.parametrize("name", SUPPORTED)
def test_exact_caches_keep_hitting(name):
    spec = REGISTRY.get(name)
    skip_unless_installed(spec)
    case = stepping.deep(spec, 3)
    model, alone = twins(spec, case)
    calls = stepping.steps(spec, case)
    with dit_patch.apply(alone) as handle:
        verify.run(alone, calls)
        expected = {row.at: row for row in handle.stats()}
    with dit_patch.apply(model, step_cache=stepping.ALWAYS) as handle:
        handle.step_caches[0].skip_proof()  # or the first forward would run twice
        made = verify.run(model, calls)
        rows = handle.stats()
        assert any(row.cached for row in handle.step_stats())
        assert "which changes the output" in str(handle).splitlines()[0] and "lossless" in str(handle).splitlines()[0]
    # Fewer calls where a site is in the blocks, but nothing is computed more often.
    assert all(row.misses <= expected[row.at].misses for row in rows)
    assert all(row.hits > 0 for row in rows if expected[row.at].hits)
    with dit_patch.apply(model, only=(), step_cache=stepping.ALWAYS):
        assert verify.first_difference(made, verify.run(model, calls)) is None


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_step_cached_refuse_and_say_why(name):
    spec = REGISTRY.get(name)
    skip_unless_installed(spec)
    model = mini.build(spec, spec.mini.case())
    before = shape_of(model)
    with pytest.raises(StepCacheError, match=re.escape(spec.step_cache.reason)) as caught:
        dit_patch.apply(model, only=asked_for(spec), step_cache="quality")
    assert type(model).__name__ in str(caught.value) and "Leave out step_cache" in str(caught.value)
    assert shape_of(model) == before


@pytest.mark.parametrize("name", SUPPORTED)
def test_generations_of_a_bare_model_are_told_apart_by_their_timesteps(name):
    spec = REGISTRY.get(name)
    skip_unless_installed(spec)
    case = stepping.deep(spec, 3)
    model, fresh = twins(spec, case)
    with dit_patch.apply(model, step_cache=stepping.EAGER), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for generation, count, passes in ((0, 5, 2), (1, 4, 2), (2, 5, 1), (0, 5, 2)):
            calls = stepping.steps(spec, case, count, generation)[:: 3 - passes]
            ours = verify.run(model, calls)
            with dit_patch.apply(fresh, step_cache=stepping.EAGER):
                theirs = verify.run(fresh, calls)
            assert verify.first_difference(ours, theirs) is None, (generation, count, passes)


def test_a_copy_is_the_plain_model():
    spec = REGISTRY.get("diffusers/wan")
    case = stepping.deep(spec, 3)
    model, plain = twins(spec, case)
    calls = stepping.steps(spec, case)
    with dit_patch.apply(model, step_cache=stepping.ALWAYS):
        verify.run(model, calls)
        copied = copy.deepcopy(model)
        assert verify.first_difference(verify.run(copied, calls), verify.run(plain, calls)) is None
    assert shape_of(copied)[1:4] == shape_of(plain)[1:4]


def test_memory_is_what_was_estimated_at_most():
    spec = REGISTRY.get("diffusers/hunyuan_video")
    skip_unless_installed(spec)
    case = stepping.deep(spec, 4)
    model = mini.build(spec, case)
    calls = stepping.steps(spec, case)
    for calibrator, knobs in ((None, {}), ("taylorseer", {}), ("taylorseer", {"order": 2}), ("foca", {}), ("dmd", {})):
        config = dit_patch.StepCache(fn=1, warmup=5, threshold=1.0, calibrator=calibrator, min_steps=0, **knobs)
        with dit_patch.apply(model, step_cache=config) as handle:
            verify.run(model, calls)
            [step_cache] = handle.step_caches
            held = sum(row.nbytes for row in handle.step_stats())
            estimate = 2 * sum(gates.estimate(config) for gates in step_cache.block_lists)
            assert 0.6 * estimate <= held <= estimate, (calibrator, held, estimate)
            handle.clear()
            assert sum(row.nbytes for row in handle.step_stats()) == 0
            assert all(row.cached for row in handle.step_stats())  # what was done is still told


def test_half_precision_and_autocast():
    spec = REGISTRY.get("diffusers/wan")
    case = stepping.deep(spec, 4)
    ours, theirs = (mini.build(spec, case, dtype=torch.bfloat16) for _ in range(2))
    calls = stepping.steps(spec, case, dtype=torch.bfloat16)
    knobs = {"fn": 1, "bn": 0, "threshold": 1.0, "warmup": 2}
    stepping.cache_dit_alone(theirs, spec, **knobs)
    with dit_patch.apply(ours, step_cache={**knobs, "min_steps": 0}):
        assert verify.first_difference(verify.run(ours, calls), verify.run(theirs, calls)) is None


def test_training_is_left_alone():
    spec = REGISTRY.get("diffusers/wan")
    case = stepping.deep(spec, 3)
    model, plain = twins(spec, case)
    calls = stepping.steps(spec, case)
    with dit_patch.apply(model, step_cache=stepping.ALWAYS) as handle:
        for arguments in calls:
            ours, theirs = model(**arguments)[0], plain(**arguments)[0]
            assert torch.equal(ours, theirs)
        ours.sum().backward()
        theirs.sum().backward()
        assert all(
            torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters()) if a.grad is not None
        )
        assert "autograd records" in str(handle)


def test_compiled_blocks():
    spec = REGISTRY.get("diffusers/wan")
    case = stepping.deep(spec, 4)
    model, plain = twins(spec, case)
    calls = stepping.steps(spec, case)
    with dit_patch.apply(plain, step_cache=stepping.ALWAYS):
        expected = verify.run(plain, calls)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    with dit_patch.apply(model, step_cache=stepping.ALWAYS) as handle:
        assert verify.first_difference(verify.run(model, calls), expected) is None
        assert all(row.cached for row in handle.step_stats())
    assert counter.frame_count == 1
    torch._dynamo.reset()
