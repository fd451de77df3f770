"""What changes the result of a call without being an argument: autocast, default device, CUDA stream, modes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch

from ..upstream.torch_internals import (
    asked_device,
    count_dispatch_modes,
    count_function_modes,
    dispatch_modes,
    function_modes,
    is_any_autocast_enabled,
    is_capturing,
    is_cuda_initialized,
    is_fake_mode_active,
    is_forward_ad_active,
    is_functorch_active,
    raw_stream,
    tracing_state,
)
from .keys import Uncacheable

CAPTURING = "a CUDA graph is being captured"

transparent_modes: set[type] = set()
"""Modes that change no result, such as one that counts operations. Under any other, nothing is looked up."""


class _AnyStream:
    """Equal to every stream."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


_ANY_STREAM = _AnyStream()


def context_key(constant: bool = False) -> Hashable:
    """Return what goes into a key of the state around a call: autocast, default device, CUDA stream.

    Args:
        constant: the result depends on nothing that a tensor holds, and so may become a part of a CUDA graph.

    Raises:
        Uncacheable: results are no numbers (fake tensors, tracing, functorch), somebody's mode may change them, or a
            CUDA graph would replay them.
    """
    if count_dispatch_modes():
        if is_fake_mode_active():
            raise Uncacheable("fake tensors")
        _refuse_foreign(dispatch_modes())
    if tracing_state() is not None:
        raise Uncacheable("tracing")
    if is_functorch_active():
        raise Uncacheable("a functorch transform")
    if is_forward_ad_active():
        raise Uncacheable("forward-mode differentiation")
    has_function_modes = count_function_modes()
    if has_function_modes:
        _refuse_foreign(function_modes())
    if not is_any_autocast_enabled() and not is_cuda_initialized():
        return default_device() if has_function_modes else None
    stream = raw_stream(torch.cuda.current_device()) if is_cuda_initialized() else None
    if is_capturing():
        # A graph would replay what was found at capture, whatever is in its inputs by then.
        if not constant:
            raise Uncacheable(CAPTURING)
        stream = _ANY_STREAM  # a capture begins with all streams having ended their work
    autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in _kinds() if torch.is_autocast_enabled(kind))
    return autocast, stream, torch.cuda.current_device() if is_cuda_initialized() else None, default_device()


def default_device() -> torch.device | None:
    """Return where tensors are made if nobody says where; None for the CPU, and where it is the meta device.

    Under that, tables that are made without saying where would hold nothing: see `on_a_real_device`.
    """
    default = asked_device()
    return None if default is None or default.type in ("cpu", "meta") else default


def on_a_real_device() -> AbstractContextManager:
    """Make the CPU the default device where it is the meta device, as libraries have it while they load a model."""
    default = asked_device()
    return torch.device("cpu") if default is not None and default.type == "meta" else nullcontext()


def _refuse_foreign(modes: Iterable[object]) -> None:
    """Raise Uncacheable if there is a mode among these that may change results."""
    for mode in modes:
        if type(mode) not in transparent_modes:
            raise Uncacheable(f"a {type(mode).__name__}, which may change results, is on")


def _kinds() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
