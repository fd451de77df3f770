"""Hooks of others that move or cast the weights: same results, nothing stale, nothing left behind."""

import gc
import warnings
import weakref

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch.multiprocessing.reductions import StorageWeakRef

from dit_patch.contribute import verify
from dit_patch.sites.layers import Wrapped

pytestmark = pytest.mark.spread()

CPU = torch.device("cpu")
ROPE = "rope.forward"


class Technique:
    """What somebody else does to a model, `on` and `off`."""

    moves_buffers = False

    def __init__(self, folder) -> None:
        self.folder = folder


class ModelOffload(Technique):
    """accelerate's, and what `pipe.enable_model_cpu_offload()` does."""

    def on(self, model):
        cpu_offload_with_hook(model, execution_device=CPU)

    def off(self, model):
        remove_hook_from_module(model, recurse=True)


class SequentialOffload(ModelOffload):
    """accelerate's, as `pipe.enable_sequential_cpu_offload()` does: weights are on the meta device between calls."""

    def on(self, model):
        cpu_offload(model, execution_device=CPU)


class SequentialOffloadWithBuffers(SequentialOffload):
    moves_buffers = True

    def on(self, model):
        cpu_offload(model, execution_device=CPU, offload_buffers=True)


class AlignEverything(ModelOffload):
    """A hook on each module by itself, `rope` and the sites' own modules included."""

    def on(self, model):
        for module in model.modules():
            add_hook_to_module(module, AlignDevicesHook(execution_device=CPU, io_same_device=True), append=True)


def offload_groups(model, **options):
    try:
        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **options)
    except AttributeError as error:
        if torch.accelerator.current_accelerator() is not None:
            raise
        pytest.skip(f"this diffusers offloads groups only beside an accelerator: {error}")


class GroupOffload(Technique):
    options: dict = {"offload_type": "block_level", "num_blocks_per_group": 1}

    def on(self, model):
        offload_groups(model, **self.options)

    def off(self, model):
        for module in model.modules():
            registry = vars(module).get("_diffusers_hook")
            hook = registry and registry.get_hook("group_offloading")
            if hook:
                hook.group.onload_()
        for name in ("lazy_prefetch_group_offloading", "layer_execution_tracker", "group_offloading"):
            HookRegistry.check_if_exists_or_initialize(model).remove_hook(name, recurse=True)


class GroupOffloadOfLeaves(GroupOffload):
    options = {"offload_type": "leaf_level"}


class GroupOffloadOfLeavesToDisk(GroupOffload):
    """Every weight has another storage at each forward, and uninitialised memory between them."""

    moves_buffers = True

    def on(self, model):
        folder = self.folder / str(id(model))
        offload_groups(model, offload_type="leaf_level", offload_to_disk_path=str(folder))


class LayerwiseCasting(Technique):
    """Cannot be taken off."""

    off = None

    def on(self, model):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


TECHNIQUES = [
    ModelOffload,
    SequentialOffload,
    SequentialOffloadWithBuffers,
    AlignEverything,
    GroupOffload,
    GroupOffloadOfLeaves,
    GroupOffloadOfLeavesToDisk,
    LayerwiseCasting,
]


def assert_nothing_is_left(model, plain) -> None:
    """In `model`, beyond what the technique alone has left in `plain`."""
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert set(vars(ours)) <= set(vars(theirs))
        assert not any(type(value) is Wrapped for value in vars(ours).values())
        assert not ours._forward_hooks and not ours._forward_pre_hooks


ORDERS = ["apply on remove off", "apply on off remove", "on apply remove off", "on apply off remove"]


MODELS = ["diffusers/wan", "diffusers/hunyuan_video"]
# Each technique in each order, on the two models by turns.
IN_TURNS = [
    (technique, order, MODELS[(one + other) % 2])
    for one, technique in enumerate(TECHNIQUES)
    for other, order in enumerate(ORDERS)
]


@pytest.mark.parametrize("technique, order, name", IN_TURNS)
def test_results_are_those_of_the_technique_alone_and_nothing_stays(tiny, technique, order, name, tmp_path):
    each = tiny(name)
    technique, calls, on, patched = technique(tmp_path), each.calls(), False, False
    sinusoid = next(site.at for site in each.spec.sites if site.use)
    tables = len(list(each.model.rope.buffers())) > 0
    for step in order.split():
        if step in ("apply", "remove"):
            patched = step == "apply"
            each.apply() if patched else each.handle.remove()
        elif getattr(technique, step) is not None:
            on = step == "on"
            for model in each.both:
                getattr(technique, step)(model)
        for _ in range(2):
            hits = each.agree(calls)
        assert bool(hits[sinusoid]) == patched, "no weights, no tables: nothing keeps it from hitting"
        if not (on and technique.moves_buffers and tables):
            assert hits[ROPE] == len(calls) * patched
    assert_nothing_is_left(*each.both)


@pytest.mark.parametrize("technique", [GroupOffload, GroupOffloadOfLeaves, LayerwiseCasting, ModelOffload])
def test_sites_whose_weights_stay_put_go_on_hitting(wan, technique, tmp_path):
    """Wan's condition embedder is not cast, and offloading from one place to the same place moves nothing."""
    calls, technique = wan.calls(), technique(tmp_path)
    wan.apply()
    for model in wan.both:
        technique.on(model)
    wan.agree(calls)
    hits = wan.agree(calls)
    assert hits["condition_embedder.text_embedder.forward"] == len(calls)


def test_sites_whose_weights_are_away_say_so(wan, tmp_path):
    for model in wan.both:
        SequentialOffload(tmp_path).on(model)
    wan.apply()
    wan.agree(wan.calls())
    assert wan.reasons() == {"weights on the meta device"}


@pytest.mark.parametrize("technique", [SequentialOffload, GroupOffloadOfLeavesToDisk])
@pytest.mark.parametrize("first", ["apply", "on"])
class TestWeightsThatMove:
    def test_edits_while_they_are_away_are_not_missed(self, each, technique, first, tmp_path):
        calls, technique = each.calls(), technique(tmp_path)
        if first == "apply":
            each.apply()
        for model in each.both:
            technique.on(model)
        if first == "on":
            each.apply()
        each.agree(calls)
        for model in each.both:
            technique.off(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5)
            technique.on(model)
        each.agree(calls)
        each.agree(calls)

    def test_old_weights_are_let_go(self, each, technique, first, tmp_path):
        """After each forward no more weights are in memory than in the unpatched model."""
        technique = technique(tmp_path)
        if first == "apply":
            each.apply()
        for model in each.both:
            technique.on(model)
        if first == "on":
            each.apply()
        call = each.calls()[0]
        seen = {model: [] for model in each.both}
        for model, storages in seen.items():
            for layer in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
                layer.register_forward_pre_hook(
                    lambda layer, _, seen=storages: seen.append(StorageWeakRef(layer.weight.untyped_storage()))
                )
        for _ in range(3):
            each.agree([call])
        gc.collect()
        ours, theirs = (sum(not storage.expired() for storage in seen[model]) for model in each.both)
        assert ours <= theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layerwise_casting_of_the_sites_themselves(hunyuan, dtype):
    """HunyuanVideo's `time_text_embed` is cast; between two calls its weights are another tensor's."""
    calls = hunyuan.calls(dtype=dtype)
    for model in hunyuan.both:
        model.to(dtype)
    hunyuan.apply()
    hunyuan.agree(calls)
    for model in hunyuan.both:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    for _ in range(2):
        hits = hunyuan.agree(calls)
    assert hits[ROPE] == len(calls)


class TestPipelines:
    @pytest.mark.parametrize("first", ["apply", "offload"])
    def test_offload_switched_on_by_the_pipeline(self, wan, first):
        """To "cpu:0", which is not "cpu": all weights move before each forward."""
        pipes = []
        for model in wan.both:
            pipes.append(WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(shift=7.0), transformer=model))
            pipes[-1].set_progress_bar_config(disable=True)

        def generated(pipe):
            prompts = [torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
            return pipe(
                prompt_embeds=prompts[0],
                negative_prompt_embeds=prompts[1],
                height=32,
                width=32,
                num_frames=5,
                num_inference_steps=3,
                output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).frames

        if first == "apply":
            wan.apply()
        for pipe in pipes:
            pipe.enable_model_cpu_offload(device="cpu")
        if first == "offload":
            wan.apply()
        for _ in range(2):
            assert torch.equal(*map(generated, pipes))
        assert wan.hits()["condition_embedder.timesteps_proj.forward"] == 2 * 3
        wan.handle.remove()
        assert torch.equal(*map(generated, pipes))
        for pipe in pipes:
            pipe.remove_all_hooks()
        assert torch.equal(*map(generated, pipes))
        assert_nothing_is_left(*wan.both)


def test_a_model_and_its_handle_are_freed_together(each):
    each.apply()
    verify.run(each.model, each.calls())
    gone = [weakref.ref(each.model), weakref.ref(each.handle)]
    del each.model, each.handle
    each.handle = None
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert not each.layers_on_globals()


def test_a_foreign_hook_that_drops_a_patch_is_reported_and_mended_by_applying_again(wan):
    """Somebody who saved `forward` before `apply` and puts it back after."""
    saved = wan.model.rope.forward
    wan.apply()
    wan.model.rope.forward = saved
    with pytest.warns(UserWarning, match=r"rope\.forward was not reached"):
        assert ROPE not in wan.agree(wan.calls())
    assert wan.apply() is wan.handle
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wan.agree(wan.calls())
    assert wan.hits()[ROPE]
    wan.handle.remove()
    assert not any(type(value) is Wrapped for module in wan.model.modules() for value in vars(module).values())
