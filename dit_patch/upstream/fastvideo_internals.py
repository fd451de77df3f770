"""What dit_patch knows of FastVideo beyond its documented interface. Importing this does not import FastVideo.

Seen in FastVideo 0.2.1. Building its models and calling them alone is the business of `hosts.fastvideo`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch


def is_adapter(layer: dict) -> bool:
    """Return whether a module, given as its `__dict__`, is one of FastVideo's LoRA layers: it has `lora_strength`."""
    return "lora_strength" in layer


def adapter_state(layer: dict) -> Hashable:
    """Return what decides a LoRA layer's output besides weights: strength, alpha, whether it is disabled or merged.

    Nothing is said of a change to any of them. Where a name is gone, its part no longer counts.
    """
    return layer["lora_strength"], layer.get("lora_alpha"), layer.get("disable_lora"), layer.get("merged")


def is_hook(forward: Any) -> bool:
    """Return whether a module's forward is what `ModuleHookManager` puts there, to move weights or to write a trace.

    It is a partial of the inner function `forward_hook_wrapper`. Where the name is gone, it is taken for a forward that
    was replaced.
    """
    return getattr(getattr(forward, "func", None), "__name__", "") == "forward_hook_wrapper"


def prefetches(block: torch.nn.Module) -> bool:
    """Return whether the block is offloaded layer by layer, and so brings in the next one's weights.

    The hook `LayerwiseOffloadHook` stands in the block's `_hook_manager`. A skipped block would not bring in the next
    one. False where the names are gone.
    """
    return "LayerwiseOffloadHook" in getattr(getattr(block, "_hook_manager", None), "forward_hooks", {})


def parallel_groups(model: torch.nn.Module) -> Iterator[Any]:
    """Yield the process groups that compute a FastVideo model together, by sequence or tensor parallelism.

    They are global to the process, in `distributed.parallel_state`; other libraries' models do not take part in them.
    """
    state = sys.modules.get("fastvideo.distributed.parallel_state")
    ours = any(base.__module__.partition(".")[0] == "fastvideo" for base in type(model).__mro__)
    if state is not None and ours and state.model_parallel_is_initialized():
        yield state.get_sp_group().device_group
        yield state.get_tp_group().device_group


def rotary_function() -> Callable:
    """Return the function that applies rotary embeddings in all its models: `_apply_rotary_emb`, which specs replace.

    Raises:
        ImportError: FastVideo is not installed, or has it elsewhere.
    """
    from fastvideo.layers.rotary_embedding import _apply_rotary_emb

    return _apply_rotary_emb


def is_streaming(executor: Any) -> bool:
    """Return whether the workers of a generator are in their streaming loop: `_streaming_enabled`.

    There they answer no call: asking would wait for ever. False where the name is gone.
    """
    return getattr(executor, "_streaming_enabled", False)
