"""What dit_patch knows of diffusers beyond its documented interface. Importing this does not import diffusers.

Seen in diffusers 0.42, if a fact says nothing else.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

RESET_STATE = "_reset_stateful_cache"
"""The method of a model that pipelines call when a generation is over: there is no public sign of that on the model."""


@contextmanager
def labelled_progress(pipeline: Any, label: str | None) -> Iterator[None]:
    """Have the pipeline's progress bar say what it is for, and be as it was afterwards; one that is off stays off.

    There is `set_progress_bar_config`, and no public way to read what was set: `_progress_bar_config`.
    """
    before = getattr(pipeline, "_progress_bar_config", None)
    if label is None or (before or {}).get("disable"):
        yield
        return
    pipeline.set_progress_bar_config(**{**(before or {}), "desc": label})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**(before or {}))


def saved_forward(forward: Any) -> tuple[Any, str] | None:
    """Return where a diffusers hook keeps the forward that it replaced, as (holder, attribute); None if it is no hook.

    `HookRegistry.register_hook` makes a function that calls what its closure's `function_reference` holds: `forward`,
    or `original_forward` if the hook has a `new_forward` of its own, which calls what it found when it was added. A
    layer of ours goes there: above the hook it would see weights that are still offloaded, and removing the hook would
    drop it.

    Where diffusers keeps the forward elsewhere, layers go above its hooks.
    """
    function = forward.func if isinstance(forward, functools.partial) else None
    if not getattr(function, "__qualname__", "").startswith("HookRegistry.register_hook."):
        return None
    for cell, variable in zip(function.__closure__ or (), function.__code__.co_freevars):
        if variable == "function_reference":
            reference = cell.cell_contents
            # A hook with a `new_forward` of its own calls what it found; removing the hook below takes it out.
            replaced = isinstance(getattr(reference.forward, "func", None), types.MethodType)
            return reference, "original_forward" if replaced else "forward"
    return None


_NEUTRAL = {
    "ContextParallelGatherHook",
    "ContextParallelSplitHook",
    "GroupOffloadingHook",
    "LayerExecutionTrackerHook",
    "LayerwiseCastingHook",
    "LazyPrefetchGroupOffloadingHook",
    "PeftInputAutocastDisableHook",
}


def hooks(module: torch.nn.Module) -> list[Any]:
    """Return the diffusers hooks on a module, which stand in its registry `_diffusers_hook`.

    They are around its forward, and some keep results of their own. Empty where the name is gone; the forward is then
    taken for one that was replaced.
    """
    return list(getattr(vars(module).get("_diffusers_hook"), "hooks", {}).values())


def is_neutral(hook: Any) -> bool:
    """Return whether a hook computes what the forward does, wherever its weights and tokens are.

    By the names of their classes, of which `diffusers.hooks` exports functions alone. Any other, such as the hooks of
    step caches, may hand out something else.
    """
    return type(hook).__name__ in _NEUTRAL


def prefetches(module: torch.nn.Module) -> bool:
    """Return whether the module or one below is group-offloaded with a stream, and so brings in the next one's weights.

    The hooks stand in the registry `_diffusers_hook`, their `group` has the `stream`. A block that is skipped would not
    bring in the next one, which then computes with weights that are not there. False where the names are gone.
    """
    for each in module.modules():
        registry = getattr(each, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}).values():
            if getattr(getattr(hook, "group", None), "stream", None) is not None:
                return True
    return False


def cache_config_name(model: torch.nn.Module) -> str:
    """Return the class of the configuration that `enable_cache` was called with, which is in `_cache_config` alone.

    "NoneType" where the name is gone; it only words a message.
    """
    return type(getattr(model, "_cache_config", None)).__name__


def is_parallel(model: torch.nn.Module) -> bool:
    """Return whether `enable_parallelism` was called on the model: it has a `_parallel_config`.

    False where the name is gone.
    """
    return getattr(model, "_parallel_config", None) is not None


def parallel_groups(model: torch.nn.Module) -> Iterator[Any]:
    """Yield the process groups that compute the model together, by context or tensor parallelism.

    Ranks that wait for each other inside a block have to skip the same blocks. The meshes are in the configurations'
    `_flattened_mesh` (ring and ulysses together) and `_mesh`; their public fields have only sizes.
    """
    config = getattr(model, "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    tensor = getattr(config, "tensor_parallel_config", None)
    if context is not None:
        yield context._flattened_mesh.get_group()
    if tensor is not None:
        for dimension in range(tensor._mesh.ndim):
            yield tensor._mesh.get_group(dimension)


def attention_backend() -> str:
    """Return the attention backend that is set for all models, in `_AttentionBackendRegistry`.

    `model.set_attention_backend()` sets it beside the model's own, and other kernels give other bits. There is a public
    way to set it, and none to ask.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return str(_AttentionBackendRegistry.get_active_backend()[0])


def t5_embeddings(pipeline: Any, prompts: list[str], length: int) -> torch.Tensor:
    """Return a Wan pipeline's embeddings of prompts: `_get_t5_prompt_embeds`, what `encode_prompt` does without CFG."""
    return pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=length)
