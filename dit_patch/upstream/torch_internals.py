"""What dit_patch knows of torch beyond its documented interface.

Seen in torch 2.13, if a fact says nothing else. A fact without a word on what it falls back to has nothing to fall
back to: where the name is gone, importing or calling it raises AttributeError or ImportError with that name.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.modules.module as _modules
from torch.autograd import forward_ad as _forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import _get_current_function_mode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

__all__ = ["StorageWeakRef", "TorchDispatchMode"]  # undocumented as they are, with nothing to add

# Tensors


def tensor_version(tensor: torch.Tensor) -> int:
    """Return the number that every write into the tensor or a view of it counts up: `_version`.

    The only way to notice a write in place; without it, keys and stored results would have to compare contents. Writes
    through `.data` and by some fused kernels do not count. Raises RuntimeError for inference tensors, which have none.

    Read inline in `memo.guards`, `memo.keys`, `memo.lookup` and `memo.store`, which run at every call of a site.
    """
    return tensor._version


def storage_id(tensor: torch.Tensor) -> int:
    """Return the address of the tensor's storage object: `_cdata`, one number for all views of one storage.

    `data_ptr()` is 0 for every empty storage, and changes when FSDP resizes one. The address may be reused once the
    storage is gone: whoever keeps it follows the storage with `StorageWeakRef`.

    Read inline in `memo.guards` and `memo.keys`, which run at every call of a site.
    """
    return tensor.untyped_storage()._cdata


# `StorageWeakRef(storage).expired()` tells whether a storage is gone, without keeping it: a weak reference to the
# tensor would not do, as views are new tensors at each call. It is in torch.multiprocessing.reductions, undocumented.


# Modules


def children(module: torch.nn.Module) -> dict[str, torch.nn.Module | None]:
    """Return the dict in which a module has its submodules: `_modules`, to be looked at again and to be written to.

    `setattr` would run torch's registration hooks and the model's own `__setattr__`; `named_children()` gives no dict
    whose later changes show. Empty where `nn.Module.__init__` has not run.
    """
    return module.__dict__.get("_modules", {})


def parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """Return the dict in which a module has its own parameters: `_parameters`.

    Held and read again at every call, since `module.weight` costs a microsecond, and a tensor that was kept
    is not the one that the module has now.
    """
    return module.__dict__["_parameters"]


def buffers(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the dict in which a module has its own buffers: `_buffers`; held as that of its parameters is."""
    return module.__dict__["_buffers"]


def forward_hooks(module: torch.nn.Module) -> dict[int, Callable]:
    """Return the module's forward hooks by number: `_forward_hooks`. Nothing public says whether there are any."""
    return module.__dict__["_forward_hooks"]


def forward_pre_hooks(module: torch.nn.Module) -> dict[int, Callable]:
    """Return the hooks before the module's forward by number: `_forward_pre_hooks`."""
    return module.__dict__["_forward_pre_hooks"]


def drop_forward_hooks(module: torch.nn.Module, unwanted: Callable[[Callable], bool]) -> None:
    """Remove the forward hooks of a module for which there is no handle, as after it was copied or unpickled.

    How a hook is called stands in further dicts by its number: `..._with_kwargs`, `..._always_called`. Left there, a
    number that is given out again would call another hook that way.
    """
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = getattr(module, kind)
        for number, hook in list(hooks.items()):
            if unwanted(hook):
                for name in (kind, f"{kind}_with_kwargs", f"{kind}_always_called"):
                    getattr(module, name, {}).pop(number, None)


# Compiled code


def compiled_from(module: torch.nn.Module) -> torch.nn.Module | None:
    """Return the module that `torch.compile(module)` wraps: its child `_orig_mod`; None if this is no such wrapper.

    Sites are found by the model's own class and paths, which the wrapper has not.
    """
    return children(module).get("_orig_mod")


def is_compiled(module: torch.nn.Module) -> bool:
    """Return whether calls of the module run compiled code.

    `torch.compile(module)` has a child `_orig_mod`, `module.compile()` sets `_compiled_call_impl`, and a forward that
    was replaced by a compiled one, as FastVideo does with blocks, has `_torchdynamo_orig_callable`. Unnoticed, a mode
    or an exchanged block would have the compiled function compiled again at each forward.
    """
    own = module.__dict__
    if own.get("_compiled_call_impl") is not None or "_orig_mod" in own["_modules"]:
        return True
    return is_compiled_forward(own.get("forward"))


def is_compiled_forward(forward: Any) -> bool:
    """Return whether a function is a compiled one: it has `_torchdynamo_orig_callable`."""
    return hasattr(forward, "_torchdynamo_orig_callable")


def is_compiling_anywhere() -> bool:
    """Return whether this thread is inside the compiler, in code that is not being traced itself.

    `torch.compiler.is_compiling()` answers for traced code; what it says in a garbage collection that runs while guards
    are written has changed between versions, and a layer that is removed there is one that the guards name.
    """
    return torch.compiler.is_compiling() or torch._guards.CompileContext.try_get() is not None


# Modes and switches. Bound names, since they are asked at every call of a site: the public questions, where there are
# any (`torch.jit.is_tracing`, `torch.is_autocast_enabled` for each kind of device), go through more Python.

count_function_modes = torch._C._len_torch_function_stack
"""Count the modes that see torch functions, among them `with torch.device(...)`: 0 saves asking for the device."""

count_dispatch_modes = torch._C._len_torch_dispatch_stack
"""Count the modes that see operators; 0 saves asking for fake tensors."""

tracing_state = torch._C._get_tracing_state
"""Return torch.jit's tracer, None if nothing is traced. A stored result would be a constant in the trace."""

is_functorch_active = torch._C._are_functorch_transforms_active
"""Return whether vmap, grad ... run: a result inside one is meaningless outside, and looks like any other."""

is_any_autocast_enabled = torch._C._is_any_autocast_enabled
"""Return whether autocast is on for any device; results under it have other dtypes."""

are_algorithms_deterministic = torch._C._get_deterministic_algorithms
"""Return what `torch.are_deterministic_algorithms_enabled()` does, without its detour through Python."""

_PRECISIONS = [
    *(("cuda", each) for each in ("matmul", "conv", "rnn", "all")),
    *(("mkldnn", each) for each in ("matmul", "conv", "rnn", "all")),
    ("generic", "all"),
]
_SWITCHES = """
    cublas_allow_fp16_reduced_precision_reduction cublas_allow_bf16_reduced_precision_reduction
    cublas_allow_fp16_accumulation cpu_allow_fp16_reduced_precision_reduction
    cudnn_enabled cudnn_benchmark cudnn_deterministic cudnn_sdp_enabled flash_sdp_enabled mem_efficient_sdp_enabled
    math_sdp_enabled math_sdp_allow_fp16_bf16_reduction mkldnn_enabled mkldnn_deterministic nnpack_enabled qengine
"""


def _readers() -> tuple[Callable[[], Any], ...]:
    precision = getattr(torch._C, "_get_fp32_precision_getter", None)
    if precision is None:  # before torch 2.9
        readers = [torch._C._get_float32_matmul_precision, torch._C._get_cudnn_allow_tf32]
    else:
        readers = [functools.partial(precision, *each) for each in _PRECISIONS]
    names = [f"_get_{each}" for each in _SWITCHES.split()]
    readers += [getattr(torch._C, name) for name in names if hasattr(torch._C, name)]
    return (*readers, torch.get_num_threads)


_numerics_readers = _readers()


def numerics_switches() -> tuple:
    """Return the process's switches that change the bits of an operation: TF32 and the like, backends, threads.

    The public `torch.backends.*` go through several objects each, and `torch.get_float32_matmul_precision()` raises
    RuntimeError once `torch.backends.*.fp32_precision` was set, the way that torch recommends since 2.9.

    A switch whose name is gone no longer counts.
    """
    return tuple([read() for read in _numerics_readers])


def module_call() -> tuple:
    """Return the functions that run when any module is called: some libraries replace them for all modules."""
    return torch.nn.Module.__call__, torch.nn.Module._call_impl


def global_hooks() -> tuple[dict, dict]:
    """Return the forward hooks and pre-hooks of all modules, by number; torch lists them nowhere in public."""
    return _modules._global_forward_hooks, _modules._global_forward_pre_hooks


def move_pre_hook_to_end(module: torch.nn.Module, number: int) -> None:
    """Have a forward pre-hook called after all others that are there; torch calls them in the order of the dict."""
    forward_pre_hooks(module).move_to_end(number)


def is_forward_ad_active() -> bool:
    """Return whether a level of forward-mode differentiation is entered; a stored result has no tangent."""
    return _forward_ad._current_level >= 0


_FAKE = torch._C._TorchDispatchModeKey.FAKE


def is_fake_mode_active() -> bool:
    """Return whether tensors made now are fake: they have shapes and no numbers, and must not be stored."""
    return torch._C._get_dispatch_mode(_FAKE) is not None


def dispatch_modes() -> list[Any]:
    """Return the modes that see operators, innermost last; to be asked only where there are some."""
    return _get_current_dispatch_mode_stack()


def function_modes() -> list[Any]:
    """Return the modes that see torch functions, but for those of `with torch.device(...)`; innermost last."""
    return [mode for mode in _get_current_function_mode_stack() if type(mode) is not DeviceContext]


def asked_device() -> torch.device | None:
    """Return the device that `with torch.device(...)` or `set_default_device` asks for, None if neither is in force.

    `torch.get_default_device()` makes a tensor to find out, and cannot tell "nobody asked" from "cpu".
    """
    if not count_function_modes():
        return None
    modes = reversed(_get_current_function_mode_stack())
    return next((mode.device for mode in modes if type(mode) is DeviceContext), None)


def leave_function_mode(mode: Any) -> None:
    """Take a mode from torch's stack, from under others if need be; nothing happens if it is not there.

    A mode's own `__exit__` pops whatever is on top; after an interrupt that may be somebody else's.
    """
    above = []
    while (top := _get_current_function_mode()) not in (mode, None):
        above.append(_pop_mode())
    if top is mode:
        _pop_mode()
    for each in reversed(above):
        _push_mode(each)


# CUDA

is_cuda_initialized = torch.cuda.is_initialized
"""Return whether CUDA is in use by this process. Public; bound here, to be asked before what would initialise it."""

raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""Return the current stream of a device as a number; None where torch is built without CUDA.

`torch.cuda.current_stream()` makes an object at each call. A result is only sure to be finished on the stream that
computed it.
"""


def is_capturing() -> bool:
    """Return whether a CUDA graph is being captured: nothing can then be computed for later, or brought from the host.

    Public; here because several rooms need one answer. Where CUDA is not initialised nothing is captured, and asking
    must not initialise it: the process could not be forked any more.
    """
    return is_cuda_initialized() and torch.cuda.is_current_stream_capturing()


# FSDP2


def fsdp2_modules() -> list[torch.nn.Module] | None:
    """Return the modules that `fully_shard` was called on in this process, in this order; None if that cannot be told.

    Sharded parameters are filled anew at each forward, as the same tensors with the same versions: a stored result
    would outlive its weights. Which parameters that concerns stands in no public place. torch keeps the modules, and
    those of other composable parts, in `torch.distributed._composable_state._module_state_mapping`.

    Falls back to None, upon which whoever asks takes every weight of a distributed program for sharded.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError:
        return None
    return [each for each in _module_state_mapping if _is_sharded(each)]


def _is_sharded(module: torch.nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


# Lists of tensors


def average_into(averages: list[torch.Tensor], values: Iterable[torch.Tensor], weight: float) -> None:
    """Move each average towards its value by `weight`, in place: `_foreach_lerp_`, what torch's optimizers use.

    A loop over `lerp_` is the same, and slower by the number of parameters.
    """
    torch._foreach_lerp_(averages, list(values), weight)


def copy_into(targets: Iterable[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target: `_foreach_copy_`."""
    torch._foreach_copy_(list(targets), sources)


def lift_only_cpu_tensors(value: bool) -> bool:
    """Have `torch.tensor(..., device=)` make a CPU tensor first, for a simulated device; return how it was."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(value)
    return before


def no_torch_function() -> Any:
    """Return the `__torch_function__` of a subclass whose operations are seen by dispatch alone."""
    return torch._C._disabled_torch_function_impl


def set_tensor_version(tensor: torch.Tensor, version: int) -> None:
    """Set the version counter of a tensor: swapping a parameter counts as writing, and `.data =` does not."""
    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


def without_dispatch_key(name: str) -> Any:
    """Return a context in which kernels of that dispatch key are passed over, as its own kernels need."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)))
