"""What step caching refuses, with reason and remedy, and that nothing is left of a refusal."""

import os
import subprocess
import sys
from importlib import metadata, util

import pytest
import torch
from conftest import skip_unless_installed

import dit_patch
from dit_patch import StepCacheError
from dit_patch.spec import mini
from dit_patch.spec.registry import Registry
from dit_patch.step_cache import requirements

needs_cache_dit = pytest.mark.skipif(util.find_spec("cache_dit") is None, reason="needs cache-dit")


@pytest.fixture
def model():
    spec = Registry(plugins=False).get("diffusers/wan")
    return mini.build(spec, spec.mini.case())


def refusal(model, step_cache="quality"):
    before = [(name, list(vars(module))) for name, module in model.named_modules()]
    with pytest.raises(StepCacheError) as caught:
        dit_patch.apply(model, step_cache=step_cache)
    assert [(name, list(vars(module))) for name, module in model.named_modules()] == before
    return str(caught.value)


@pytest.mark.skipif(util.find_spec("cache_dit") is not None, reason="cache-dit is installed")
def test_without_cache_dit_in_this_environment(model):
    assert refusal(model) == "step caching needs cache-dit: pip install 'dit-patch[cache]'"


def test_without_cache_dit(model, monkeypatch):
    def version(name):
        if name == "cache-dit":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    real = metadata.version
    monkeypatch.setattr(metadata, "version", version)
    assert "pip install 'dit-patch[cache]'" in refusal(model)


@pytest.mark.parametrize("found", ["1.3.12", "1.5.2", "1.6.0"])
def test_a_cache_dit_that_was_not_checked_with(model, monkeypatch, found):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: found if name == "cache-dit" else real(name))
    assert f"needs cache-dit >=1.5.3,<1.6, and {found} is installed" in refusal(model)


@needs_cache_dit
def test_the_distribution_is_asked_not_the_module(monkeypatch):
    import cache_dit

    monkeypatch.setattr(cache_dit, "__version__", "1.3.13.dev9")
    assert requirements.cache_dit().DBCacheConfig


@needs_cache_dit
def test_a_cache_dit_that_cannot_be_imported(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit.caching", None)
    assert "cannot be imported" in refusal(model)


@needs_cache_dit
def test_cache_dit_is_imported_only_when_asked_for(tmp_path):
    code = (
        "import sys, dit_patch, torch\n"
        "from dit_patch.spec import mini\n"
        "from dit_patch.spec.registry import Registry\n"
        "spec = Registry(plugins=False).get('diffusers/wan')\n"
        "model = mini.build(spec, spec.mini.case())\n"
        "with dit_patch.apply(model): pass\n"
        "assert 'cache_dit' not in sys.modules\n"
        "with dit_patch.apply(model, step_cache='quality'): pass\n"
        "assert 'cache_dit' in sys.modules\n"
        "import os; assert 'CACHE_DIT_LOG_LEVEL' not in os.environ\n"
    )
    surroundings = {name: value for name, value in os.environ.items() if name != "CACHE_DIT_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=surroundings)
    assert done.returncode == 0, done.stderr
    assert "Cache-DiT" not in done.stdout + done.stderr  # its chatter


@needs_cache_dit
def test_cache_dit_on_already(model):
    import stepping

    stepping.cache_dit_alone(model, Registry(plugins=False).get("diffusers/wan"), fn=1, bn=0, threshold=0.1, warmup=1)
    with pytest.raises(StepCacheError, match=r"cache-dit is on already.\n    Call cache_dit.disable_cache"):
        dit_patch.apply(model, step_cache="quality")


@needs_cache_dit
@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_model_compiled_as_a_whole(model, how):
    if how == "in place":
        model.compile(backend="eager")
        target = model
    else:
        target = torch.compile(model, backend="eager")
    with pytest.raises(StepCacheError, match="compiled as a whole.*always runs all blocks") as caught:
        dit_patch.apply(target, step_cache="quality")
    assert "compile_repeated_blocks()" in str(caught.value)


@needs_cache_dit
def test_offloading_that_prefetches(model):
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    with dit_patch.apply(model, step_cache={"fn": 1}):
        pass
    for block in model.blocks:  # as use_stream=True leaves them, for which there has to be a device with streams
        for hook in block._diffusers_hook.hooks.values():
            hook.group.stream = object()
    assert "offloaded with prefetching" in refusal(model, {"fn": 1})
    assert "use_stream=False" in refusal(model, {"fn": 1})


@needs_cache_dit
def test_fastvideos_layerwise_offload():
    spec = Registry(plugins=False).get("fastvideo/wan")
    skip_unless_installed(spec)
    model = mini.build(spec, spec.mini.case())
    from fastvideo.hooks.hooks import ModuleHookManager
    from fastvideo.hooks.layerwise_offload import LayerwiseOffloadHook

    class Still(LayerwiseOffloadHook):
        """Attached as the real one is, which needs a GPU to start with."""

        def __init__(self):
            pass

        def on_attach(self, module):
            pass

    for block in model.blocks:
        ModuleHookManager.get_from_or_default(block).append_forward_hook(Still())
    with pytest.raises(StepCacheError, match="dit_layerwise_offload=False"):
        dit_patch.apply(model, step_cache={"fn": 1})


@needs_cache_dit
def test_more_blocks_than_the_model_has(model):
    count = len(model.blocks)
    assert f"model (WanTransformer3DModel).blocks has {count} blocks, and fn=3 and bn=3" in refusal(
        model, {"fn": 3, "bn": 3}
    )


@needs_cache_dit
def test_a_spec_that_says_nothing_of_blocks(model, tmp_path):
    from diffusers import WanTransformer3DModel

    class Silent(WanTransformer3DModel):
        pass

    Silent.__module__, Silent.__qualname__ = "my.models", "Silent"
    model.__class__ = Silent
    (tmp_path / "silent.yaml").write_text(
        "model: my.models.Silent\nsites:\n  - at: rope.forward\n    kind: rope\n    key: {hidden_states: [shape]}\n"
    )
    with pytest.raises(StepCacheError, match="does not say what its blocks are"):
        dit_patch.apply(model, step_cache="quality", specs=[tmp_path])


@needs_cache_dit
def test_unknown_presets_are_refused_before_anything_else(model):
    assert "did you mean `quality`" in refusal(model, "qualty")
