"""Find the pipeline that is running a model, from inside the model's forward: it is on Python's call stack."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from ..sites.pipeline_models import find_models

# Before Python 3.13 a frame keeps the dict that `f_locals` returned, and so the values of its variables alive.
_FRAME_KEEPS_LOCALS = sys.version_info < (3, 13)
_READS_LOCALS = frozenset({"locals", "vars", "eval", "exec", "dir"})


def pipeline_of(model: torch.nn.Module) -> Any | None:
    """Return the innermost pipeline that has a method on the call stack and `model` among its components, or None."""
    seen: list[Any] = []
    for owner in _owners(sys._getframe(1)):
        if any(owner is each for each in seen) or isinstance(owner, torch.nn.Module):
            continue
        seen.append(owner)
        try:
            components = find_models(owner)
        except Exception:  # no pipeline; or one that cannot say what is in it
            continue
        if any(module is model for each in components.values() for module in each.modules()):
            return owner
    return None


def _owners(frame: FrameType | None) -> Iterator[Any]:
    """Yield the `self` of every method on the stack, innermost first."""
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self" and code.co_flags & inspect.CO_OPTIMIZED:
            variables = frame.f_locals
            owner = variables.get("self")
            if _FRAME_KEEPS_LOCALS and not _READS_LOCALS & set(code.co_names):
                variables.clear()  # else tensors of a first step would live until the pipeline returns
            yield owner
        frame = frame.f_back
