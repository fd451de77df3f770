"""Each fact in `dit_patch.upstream` holds in the libraries that are installed: a test a fact, with the fact's name.

A test that fails here says which of upstream's private names has moved; the fact's docstring says what that breaks.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dit_patch
from dit_patch.rotary import rotary
from dit_patch.spec import mini
from dit_patch.spec.registry import Registry
from dit_patch.upstream import (
    accelerate_internals,
    cache_dit_internals,
    diffusers_internals,
    fastvideo_internals,
    peft_internals,
    torch_internals,
)

CPU = torch.device("cpu")


def module() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).eval()


def test_every_fact_has_a_test():
    classes = (TestTorch, TestAccelerate, TestDiffusers, TestPeft, TestFastVideo, TestCacheDit)
    tests = "".join(name for each in classes for name in vars(each))
    libraries = (
        torch_internals,
        accelerate_internals,
        diffusers_internals,
        peft_internals,
        fastvideo_internals,
        cache_dit_internals,
    )
    for library in libraries:
        facts = [name for name, value in vars(library).items() if getattr(value, "__module__", "") == library.__name__]
        for fact in (*facts, *getattr(library, "__all__", ())):
            assert fact.startswith("_") or f"test_{fact}" in tests, f"{library.__name__}.{fact}"


@pytest.mark.parametrize(
    "name", ["torch._C", "torch._guards", "_cdata", "tensor._version", "_forward_hooks", "_modules", "_current_context"]
)
def test_private_names_are_nowhere_else(name):
    """But for what runs at every call of a site, and says there which fact it reads."""
    package = Path(dit_patch.__file__).parent
    inline = [package / "memo" / f"{each}.py" for each in ("guards", "keys", "lookup", "store")]
    allowed = inline if name in ("_cdata", "tensor._version") else []
    for path in package.rglob("*.py"):
        if path.parent.name != "upstream" and path not in allowed:
            assert not re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")), path


class TestTorch:
    def test_lift_only_cpu_tensors(self):
        assert torch_internals.lift_only_cpu_tensors(True) is False
        assert torch_internals.lift_only_cpu_tensors(False) is True

    def test_no_torch_function(self):
        class Plain(torch.Tensor):
            __torch_function__ = torch_internals.no_torch_function()

        assert type(torch.zeros(2).as_subclass(Plain) + 1) is torch.Tensor

    def test_set_tensor_version(self):
        tensor = torch.zeros(2).add_(1)
        torch_internals.set_tensor_version(tensor, 7)
        assert tensor._version == 7

    def test_without_dispatch_key(self):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype is torch.bfloat16
            with torch_internals.without_dispatch_key("AutocastCPU"):
                assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype is torch.float32

    def test_tensor_version(self):
        tensor = torch.zeros(4)
        before = torch_internals.tensor_version(tensor)
        tensor[1:].add_(1)
        assert torch_internals.tensor_version(tensor) == before + 1
        tensor.data.add_(1)
        assert torch_internals.tensor_version(tensor) == before + 1
        with torch.inference_mode(), pytest.raises(RuntimeError):
            torch_internals.tensor_version(torch.zeros(4))

    def test_storage_id(self):
        tensor = torch.zeros(4)
        assert torch_internals.storage_id(tensor) == torch_internals.storage_id(tensor[1:].view(3, 1))
        assert torch_internals.storage_id(tensor) != torch_internals.storage_id(tensor.clone())
        assert torch_internals.storage_id(torch.empty(0)) != 0

    def test_StorageWeakRef(self):
        tensor = torch.zeros(4)
        view, followed = tensor[1:], torch_internals.StorageWeakRef(tensor.untyped_storage())
        del tensor
        assert not followed.expired()
        del view
        assert followed.expired()

    def test_children(self):
        model = module()
        other = torch_internals.children(model)["0"] = torch.nn.Identity()
        assert model[0] is other
        assert torch_internals.children(torch.nn.Module.__new__(torch.nn.Module)) == {}

    def test_parameters(self):
        linear = module()[0]
        torch_internals.parameters(linear)["bias"] = None
        assert [name for name, _ in linear.named_parameters()] == ["weight"]

    def test_buffers(self):
        norm = module()[1]
        other = torch_internals.buffers(norm)["running_mean"] = torch.ones(4)
        assert norm.running_mean is other

    def test_forward_hooks(self):
        model = module()
        hook = model.register_forward_hook(print)
        assert list(torch_internals.forward_hooks(model).values()) == [print]
        hook.remove()
        assert not torch_internals.forward_hooks(model)

    def test_forward_pre_hooks(self):
        model = module()
        hook = model.register_forward_pre_hook(print)
        assert list(torch_internals.forward_pre_hooks(model).values()) == [print]
        hook.remove()
        assert not torch_internals.forward_pre_hooks(model)

    def test_drop_forward_hooks(self):
        model, called = module(), []
        model.register_forward_pre_hook(lambda *given: called.append("dropped"), with_kwargs=True)
        model.register_forward_hook(lambda *given: called.append("dropped"), with_kwargs=True, always_call=True)
        known = set(map(id, (*model._forward_hooks.values(), *model._forward_pre_hooks.values())))
        model.register_forward_hook(lambda *given: called.append("kept"))
        torch_internals.drop_forward_hooks(model, lambda hook: id(hook) in known)
        model(torch.zeros(1, 4))
        assert called == ["kept"]
        left = {name: each for name, each in vars(model).items() if name.startswith("_forward_") and each}
        assert list(left) == ["_forward_hooks"], "torch has another dict that says how a hook is called"

    def test_compiled_from(self):
        model = module()
        assert torch_internals.compiled_from(torch.compile(model)) is model
        assert torch_internals.compiled_from(model) is None

    @pytest.mark.parametrize("compiled", ["wrapped", "in place", "forward"])
    def test_is_compiled(self, compiled):
        model = module()
        assert not torch_internals.is_compiled(model)
        if compiled == "wrapped":
            model = torch.compile(model)
        elif compiled == "in place":
            model.compile()
        else:
            model.forward = torch.compile(model.forward)
        assert torch_internals.is_compiled(model)

    def test_is_compiling_anywhere(self):
        answers = []

        def backend(graph, inputs):
            answers.append(torch_internals.is_compiling_anywhere())
            return graph.forward

        torch.compile(lambda tensor: tensor + 1, backend=backend)(torch.zeros(4))
        assert answers == [True]
        assert not torch_internals.is_compiling_anywhere()

    def test_count_function_modes(self):
        before = torch_internals.count_function_modes()
        with torch.device("cpu"):
            assert torch_internals.count_function_modes() == before + 1

    def test_count_dispatch_modes(self):
        class Mode(torch_internals.TorchDispatchMode):
            pass

        before = torch_internals.count_dispatch_modes()
        with Mode():
            assert torch_internals.count_dispatch_modes() == before + 1

    def test_TorchDispatchMode(self):
        class Mode(torch_internals.TorchDispatchMode):
            seen = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.seen += 1
                return function(*args, **(kwargs or {}))

        with Mode() as mode:
            torch.zeros(4)
        assert mode.seen == 1

    def test_tracing_state(self):
        states = []

        def traced(tensor):
            states.append(torch_internals.tracing_state())
            return tensor + 1

        torch.jit.trace(traced, torch.zeros(4), check_trace=False)
        assert None not in states and torch_internals.tracing_state() is None

    def test_is_functorch_active(self):
        answers = []

        def mapped(tensor):
            answers.append(torch_internals.is_functorch_active())
            return tensor + 1

        torch.vmap(mapped)(torch.zeros(4))
        assert answers == [True] and not torch_internals.is_functorch_active()

    def test_is_any_autocast_enabled(self):
        assert not torch_internals.is_any_autocast_enabled()
        with torch.autocast("cpu"):
            assert torch_internals.is_any_autocast_enabled()

    def test_numerics_switches(self):
        before = torch.get_float32_matmul_precision(), torch_internals.numerics_switches()
        try:
            found = set()
            for precision in ("medium", "high", "highest"):
                torch.set_float32_matmul_precision(precision)
                found.add(torch_internals.numerics_switches())
            assert len(found) == 3
            with torch.backends.mkldnn.flags(enabled=False):
                assert torch_internals.numerics_switches() not in found
        finally:
            torch.set_float32_matmul_precision(before[0])

    @pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch before 2.9 has no fp32_precision")
    def test_numerics_switches_by_the_names_that_torch_recommends(self):
        before = torch_internals.numerics_switches()
        old = torch.backends.mkldnn.matmul.fp32_precision
        try:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
            assert torch_internals.numerics_switches() != before
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = old
        assert torch_internals.numerics_switches() == before

    def test_module_call(self, monkeypatch):
        before = torch_internals.module_call()
        assert before == torch_internals.module_call()
        monkeypatch.setattr(torch.nn.Module, "__call__", lambda module, x: x)
        assert torch_internals.module_call() != before

    def test_global_hooks(self):
        called = []
        hooks = [
            torch.nn.modules.module.register_module_forward_hook(lambda *_: called.append("after")),
            torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: called.append("before")),
        ]
        try:
            assert [len(each) for each in torch_internals.global_hooks()] == [1, 1]
            module()[0](torch.zeros(1, 4))
            assert called == ["before", "after"]
        finally:
            for hook in hooks:
                hook.remove()
        assert not any(torch_internals.global_hooks())

    def test_move_pre_hook_to_end(self):
        model, called = module(), []
        first = model.register_forward_pre_hook(lambda *_: called.append("first"))
        model.register_forward_pre_hook(lambda *_: called.append("second"))
        torch_internals.move_pre_hook_to_end(model, first.id)
        model(torch.zeros(1, 4))
        assert called == ["second", "first"]

    def test_is_forward_ad_active(self):
        assert not torch_internals.is_forward_ad_active()
        with torch.autograd.forward_ad.dual_level():
            assert torch_internals.is_forward_ad_active()
        assert not torch_internals.is_forward_ad_active()

    def test_dispatch_modes(self):
        class Mode(torch_internals.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                return function(*args, **(kwargs or {}))

        assert torch_internals.dispatch_modes() == []
        with Mode() as outer, Mode() as inner:
            assert torch_internals.dispatch_modes() == [outer, inner]

    def test_function_modes(self):
        class Mode(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                return function(*args, **(kwargs or {}))

        with torch.device("cpu"):
            assert torch_internals.function_modes() == []
            with Mode() as mode:
                assert torch_internals.function_modes() == [mode]

    def test_is_compiled_forward(self):
        assert torch_internals.is_compiled_forward(torch.compile(module().forward))
        assert not torch_internals.is_compiled_forward(module().forward)

    def test_are_algorithms_deterministic(self):
        try:
            torch.use_deterministic_algorithms(True)
            assert torch_internals.are_algorithms_deterministic()
        finally:
            torch.use_deterministic_algorithms(False)
        assert not torch_internals.are_algorithms_deterministic()

    def test_is_fake_mode_active(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        assert not torch_internals.is_fake_mode_active()
        with FakeTensorMode():
            assert torch_internals.is_fake_mode_active()

    def test_asked_device(self):
        assert torch_internals.asked_device() is None
        with torch.device("meta"), torch.device("cpu"):
            assert torch_internals.asked_device() == CPU
        torch.set_default_device("meta")
        try:
            assert torch_internals.asked_device() == torch.device("meta")
        finally:
            torch.set_default_device(None)
        assert torch_internals.asked_device() is None

    def test_leave_function_mode(self):
        class Mode(torch.overrides.TorchFunctionMode):
            seen = 0

            def __torch_function__(self, function, types, args=(), kwargs=None):
                self.seen += 1
                return function(*args, **(kwargs or {}))

        lower, upper = Mode(), Mode()
        lower.__enter__()
        with upper:
            torch_internals.leave_function_mode(lower)
            torch_internals.leave_function_mode(lower)  # is not there any more
            torch.zeros(4)
        assert (lower.seen, upper.seen) == (0, 1)

    def test_is_capturing(self):
        assert not torch_internals.is_capturing()

    @pytest.mark.gpu
    def test_is_capturing_on_a_gpu(self):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assert torch_internals.is_capturing()
        assert not torch_internals.is_capturing()

    def test_raw_stream_is_there_where_cuda_is(self):
        assert (torch_internals.raw_stream is None) == (torch.version.cuda is None and torch.version.hip is None)

    @pytest.mark.gpu
    def test_raw_stream(self):
        with torch.cuda.stream(torch.cuda.Stream()) as stream:
            current = torch.cuda.current_stream().cuda_stream
            assert torch_internals.raw_stream(torch.cuda.current_device()) == current, stream

    def test_fsdp2_modules(self, tmp_path, monkeypatch):
        from torch.distributed import _composable_state, destroy_process_group, init_process_group, is_initialized
        from torch.distributed.fsdp import fully_shard

        alone = not is_initialized()
        if alone:
            init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        try:
            sharded = fully_shard(module())
            assert any(each is sharded for each in torch_internals.fsdp2_modules())
            monkeypatch.delattr(_composable_state, "_module_state_mapping")
            assert torch_internals.fsdp2_modules() is None
        finally:
            if alone:
                destroy_process_group()

    def test_average_into(self):
        averages = [torch.zeros(2), torch.ones(3)]
        torch_internals.average_into(averages, [torch.ones(2), torch.zeros(3)], 0.25)
        assert [each.tolist() for each in averages] == [[0.25] * 2, [0.75] * 3]

    def test_copy_into(self):
        targets = [torch.zeros(2), torch.zeros(3)]
        torch_internals.copy_into(targets, [torch.ones(2), torch.ones(3)])
        assert all(each.eq(1).all() for each in targets)


class TestAccelerate:
    def test_saved_forward(self):
        from accelerate.hooks import ModelHook, add_hook_to_module

        model = module()[0]
        before = model.forward
        assert accelerate_internals.saved_forward(model, before) is None
        add_hook_to_module(model, ModelHook())
        assert accelerate_internals.saved_forward(model, model.forward) == (model, "_old_forward")
        assert model._old_forward == before


class TestDiffusers:
    def test_hooks(self):
        from diffusers.hooks import HookRegistry, ModelHook

        model, hook = module()[0], ModelHook()
        assert diffusers_internals.hooks(model) == []
        HookRegistry.check_if_exists_or_initialize(model).register_hook(hook, "one")
        assert diffusers_internals.hooks(model) == [hook]

    def test_is_neutral(self):
        from diffusers.hooks import (
            FirstBlockCacheConfig,
            apply_first_block_cache,
            apply_layerwise_casting,
            group_offloading,
            layerwise_casting,
        )

        context_parallel = pytest.importorskip("diffusers.hooks.context_parallel")  # since diffusers 0.36
        model = module()
        apply_layerwise_casting(model, torch.float16, torch.float32)
        hooks = [hook for each in model.modules() for hook in diffusers_internals.hooks(each)]
        assert hooks and all(map(diffusers_internals.is_neutral, hooks))
        defined = {name for each in (context_parallel, group_offloading, layerwise_casting) for name in vars(each)}
        assert defined >= diffusers_internals._NEUTRAL
        registry = Registry()
        spec = registry.get("diffusers/wan")
        model = mini.build(spec, spec.mini.case())
        apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.1))
        hooks = [hook for each in model.modules() for hook in diffusers_internals.hooks(each)]
        assert hooks and not any(map(diffusers_internals.is_neutral, hooks))

    @pytest.mark.parametrize("before", [{}, {"ncols": 40}, {"disable": True}])
    def test_labelled_progress(self, before, capsys):
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

        pipeline = DDPMPipeline(UNet2DModel(sample_size=4, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                            up_block_types=("UpBlock2D",)), DDPMScheduler())  # fmt: skip
        if before:
            pipeline.set_progress_bar_config(**before)
        for label, is_shown in ((None, False), ("what for", not before.get("disable"))):
            with diffusers_internals.labelled_progress(pipeline, label):
                list(pipeline.progress_bar([1, 2]))
            assert ("what for" in capsys.readouterr().err) == is_shown
        list(pipeline.progress_bar([1, 2]))
        said = capsys.readouterr().err
        assert "what for" not in said and bool(said) != before.get("disable", False)

    @pytest.mark.parametrize("replacing", [False, True])
    def test_saved_forward(self, replacing):
        from diffusers.hooks import HookRegistry, ModelHook

        class Replacing(ModelHook):
            def new_forward(self, module, *args, **kwargs):
                return self.fn_ref.original_forward(*args, **kwargs)

        model = module()[0]
        before = model.forward
        assert diffusers_internals.saved_forward(before) is None
        registry = HookRegistry.check_if_exists_or_initialize(model)
        registry.register_hook(Replacing() if replacing else ModelHook(), "test")
        holder, attribute = diffusers_internals.saved_forward(model.forward)
        assert attribute == ("original_forward" if replacing else "forward")
        assert getattr(holder, attribute) == before

    def test_prefetches(self, monkeypatch):
        from diffusers.hooks import apply_group_offloading

        blocks = torch.nn.ModuleList(module() for _ in range(2))
        assert not diffusers_internals.prefetches(blocks)
        try:
            apply_group_offloading(
                blocks, onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
            )
        except AttributeError as error:
            pytest.skip(f"this diffusers offloads groups only beside an accelerator: {error}")
        assert not diffusers_internals.prefetches(blocks)
        groups = [hook.group for each in blocks.modules() for hook in registered(each)]
        groups[0].stream = object()  # is made by torch's accelerator where there is one
        assert diffusers_internals.prefetches(blocks)

    def test_cache_config_name(self):
        from diffusers import FirstBlockCacheConfig
        from diffusers.models.cache_utils import CacheMixin

        class Model(torch.nn.Module, CacheMixin):
            pass

        model = Model()
        assert diffusers_internals.cache_config_name(model) == "NoneType"
        model._cache_config = FirstBlockCacheConfig()
        assert model.is_cache_enabled
        assert diffusers_internals.cache_config_name(model) == "FirstBlockCacheConfig"

    def test_RESET_STATE(self):
        from diffusers import DiffusionPipeline
        from diffusers.models.cache_utils import CacheMixin

        called = []
        assert callable(getattr(CacheMixin, diffusers_internals.RESET_STATE))
        model = SimpleNamespace(**{diffusers_internals.RESET_STATE: lambda: called.append(True)})
        pipeline = SimpleNamespace(components={"transformer": model}, _all_hooks=[])
        pipeline.enable_model_cpu_offload = lambda **_: None
        DiffusionPipeline.maybe_free_model_hooks(pipeline)
        assert called == [True]

    def test_is_parallel(self):
        pytest.importorskip("diffusers.models._modeling_parallel", reason="came with a later diffusers")
        from diffusers import ModelMixin, ParallelConfig

        model = SimpleNamespace(_parallel_config=ModelMixin._parallel_config)
        assert not diffusers_internals.is_parallel(model)
        model._parallel_config = ParallelConfig()
        assert diffusers_internals.is_parallel(model)

    @pytest.mark.parametrize("kind", ["context", "tensor"])
    def test_parallel_groups(self, kind):
        pytest.importorskip("diffusers.models._modeling_parallel", reason="came with a later diffusers")
        from diffusers import ContextParallelConfig, ParallelConfig
        from diffusers.models._modeling_parallel import TensorParallelConfig

        mesh = Mesh()
        if kind == "context":
            config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
        else:
            config = ParallelConfig(tensor_parallel_config=TensorParallelConfig(tp_degree=2))
        config.setup(0, 2, CPU, mesh=mesh)
        assert list(diffusers_internals.parallel_groups(SimpleNamespace(_parallel_config=config))) == [mesh]

    def test_attention_backend(self):
        from diffusers.models.attention_dispatch import attention_backend

        before = diffusers_internals.attention_backend()
        with attention_backend("_native_math"):
            assert diffusers_internals.attention_backend() != before
        assert diffusers_internals.attention_backend() == before

    def test_t5_embeddings(self):
        from diffusers import WanPipeline

        pipeline = SimpleNamespace(_get_t5_prompt_embeds=lambda *given, **named: None)
        signature = inspect.signature(WanPipeline._get_t5_prompt_embeds)
        assert diffusers_internals.t5_embeddings(pipeline, ["a cat"], 8) is None
        assert list(signature.parameters)[1] == "prompt" and "max_sequence_length" in signature.parameters


class Mesh:
    """A device mesh of two ranks, each part of which is itself."""

    ndim = 1

    def __getitem__(self, names):
        return self

    def _flatten(self):
        return self

    def get_local_rank(self):
        return 0

    def get_group(self, dimension=0):
        return self

    def size(self):
        return 2


def registered(each: torch.nn.Module) -> list:
    from diffusers.hooks import HookRegistry

    return [
        hook
        for hook in HookRegistry.check_if_exists_or_initialize(each).hooks.values()
        if getattr(hook, "group", None) is not None
    ]


def lora() -> torch.nn.Module:
    """A linear layer with one adapter, `style`."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
    return inject_adapter_in_model(config, module(), adapter_name="style")[0]


class TestPeft:
    def test_is_adapter(self):
        layer = lora()
        assert peft_internals.is_adapter(vars(layer))
        assert not peft_internals.is_adapter(vars(module()[0]))

    def test_adapter_state(self):
        layer = lora()
        states = [peft_internals.adapter_state(vars(layer))]
        for change in (
            lambda: layer.set_scale("style", 0.5),
            lambda: layer.enable_adapters(False),
            lambda: layer.enable_adapters(True),
            lambda: layer.merge(adapter_names=["style"]),
            lambda: layer.unmerge(),
            lambda: layer.set_adapter([]),
        ):
            change()
            states.append(peft_internals.adapter_state(vars(layer)))
            assert states[-1] != states[-2]


class TestFastVideo:
    @pytest.fixture(autouse=True)
    def fastvideo(self):
        return pytest.importorskip("fastvideo")

    def test_is_hook(self):
        from fastvideo.hooks.hooks import ModuleHookManager

        model = module()[0]
        assert not fastvideo_internals.is_hook(model.forward)
        ModuleHookManager.get_from_or_default(model)
        assert fastvideo_internals.is_hook(model.forward)

    def test_is_adapter(self):
        assert fastvideo_internals.is_adapter(vars(their_lora()))
        assert not fastvideo_internals.is_adapter(vars(module()[0]))

    @pytest.mark.parametrize("name", ["lora_strength", "lora_alpha", "disable_lora", "merged"])
    def test_adapter_state(self, name):
        layer = their_lora()
        before = fastvideo_internals.adapter_state(vars(layer))
        assert name in vars(layer)
        setattr(layer, name, 7)
        assert fastvideo_internals.adapter_state(vars(layer)) != before

    def test_prefetches(self):
        from fastvideo.hooks.hooks import ModuleHookManager
        from fastvideo.hooks.layerwise_offload import LayerwiseOffloadHook

        block = module()
        assert not fastvideo_internals.prefetches(block)
        state = SimpleNamespace(on_init=lambda module: None)
        ModuleHookManager.get_from_or_default(block).append_forward_hook(LayerwiseOffloadHook(state))
        assert fastvideo_internals.prefetches(block)

    def test_parallel_groups(self):
        from dit_patch.hosts import fastvideo

        fastvideo.prepare()
        theirs = type("Theirs", (torch.nn.Module,), {"__module__": "fastvideo.models.dits.wanvideo"})()
        sequence, tensor = fastvideo_internals.parallel_groups(theirs)
        assert torch.distributed.get_world_size(sequence) == torch.distributed.get_world_size(tensor) == 1
        assert not list(fastvideo_internals.parallel_groups(module()))

    def test_rotary_function(self):
        x, angles = torch.randn(1, 5, 2, 8), torch.randn(5, 4)
        rotated = fastvideo_internals.rotary_function()(x, angles.cos(), angles.sin(), is_neox_style=False)
        assert torch.allclose(rotated, rotary(x, angles.cos(), angles.sin()))

    def test_is_streaming(self):
        from fastvideo.worker.multiproc_executor import MultiprocExecutor

        executor = MultiprocExecutor.__new__(MultiprocExecutor)
        executor._streaming_enabled, executor.collective_rpc = False, lambda *given: None
        assert not fastvideo_internals.is_streaming(executor)
        executor.enable_streaming()
        assert fastvideo_internals.is_streaming(executor)
        executor._streaming_enabled = False  # its end puts the workers away, of which there are none


def their_lora() -> torch.nn.Module:
    from fastvideo.layers.lora.linear import BaseLayerWithLoRA

    return BaseLayerWithLoRA(torch.nn.Linear(4, 4), lora_rank=2, lora_alpha=2)


class TestCacheDit:
    def test_is_cached_forward(self):
        cache_dit = pytest.importorskip("cache_dit")
        spec = Registry().get("diffusers/wan")
        model = mini.build(spec, spec.mini.case())
        assert not cache_dit_internals.is_cached_forward(model.forward)
        adapter = cache_dit.BlockAdapter(
            transformer=model, blocks=model.blocks, forward_pattern=cache_dit.ForwardPattern.Pattern_3
        )
        assert not cache_dit_internals.is_on(model)
        cache_dit.enable_cache(adapter)
        assert cache_dit_internals.is_cached_forward(model.forward)
        assert cache_dit_internals.is_on(model)
        cache_dit.disable_cache(adapter)

    def test_is_on(self):
        assert not cache_dit_internals.is_on(module())

    def test_cached_steps(self):
        cache_dit = pytest.importorskip("cache_dit")
        spec = Registry().get("diffusers/wan")
        case = spec.mini.case()
        model = mini.build(spec, case)
        adapter = cache_dit.BlockAdapter(
            transformer=model, blocks=model.blocks, forward_pattern=cache_dit.ForwardPattern.Pattern_3
        )
        cache_dit.enable_cache(adapter, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))
        with torch.no_grad():
            for arguments in list(mini.forwards(case, case.sizes[0], steps=1))[:1]:
                model(**arguments)
        (name, cond, uncond), *others = cache_dit_internals.cached_steps(model)
        assert "blocks" in name and cond == uncond == () and not others
        cache_dit.disable_cache(adapter)

    @pytest.fixture
    def manager(self):
        pytest.importorskip("cache_dit")
        self.asked = []

        def is_similar(theirs, before, now, *, threshold, **options):
            self.asked.append(threshold)
            return theirs(before, now, threshold=threshold, **options)

        return cache_dit_internals.context_manager("test", is_similar)

    @pytest.fixture
    def context(self, manager):
        from cache_dit.caching import DBCacheConfig

        config = DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=0.5, max_warmup_steps=1
        )
        made = manager.new_context(name="pass", cache_config=config)
        manager.set_context(made)
        return made

    def test_context_manager(self, manager, context):
        for _ in range(3):
            manager.mark_step_begin()
            manager.can_cache(torch.ones(4), parallelized=False, prefix="blocks_Fn_residual")
            manager.set_Fn_buffer(torch.ones(4), prefix="blocks_Fn_residual")
        assert self.asked and set(self.asked) == {0.5}

    def test_first_residual(self, manager):
        owner = torch.nn.Module()
        owner.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        residual = cache_dit_internals.first_residual(manager, owner, "blocks", 3, "test")
        assert residual(torch.ones(1, 4), torch.full((1, 4), 3.0)).eq(2.0).all()

    def test_leave_context(self, manager, context):
        assert manager.get_context() is context
        cache_dit_internals.leave_context(manager)
        assert manager.get_context() is None

    def test_held_bytes(self, manager, context):
        empty = cache_dit_internals.held_bytes(context)
        manager.mark_step_begin()
        manager.set_Bn_buffer(torch.zeros(256), prefix="blocks_Bn_residual")
        assert cache_dit_internals.held_bytes(context) == empty + 1024
