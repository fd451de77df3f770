"""The pipeline that is running a model right now, found from inside the model's forward."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from ..sites.pipeline_models import find_models

_KEPT = sys.version_info < (3, 13)  # there Python keeps what it tells of a frame's variables, and their values with it
_READS_THEM = frozenset({"locals", "vars", "eval", "exec", "dir"})


def pipeline_of(model: torch.nn.Module) -> Any | None:
    """The innermost pipeline, as `find_models` knows it, with a method on the stack and `model` in its parts."""
    seen: list[Any] = []
    for owner in _owners(sys._getframe(1)):
        if any(owner is each for each in seen) or isinstance(owner, torch.nn.Module):
            continue
        seen.append(owner)
        try:
            parts = find_models(owner)
        except Exception:  # no pipeline; or one that cannot say what is in it
            continue
        if any(module is model for part in parts.values() for module in part.modules()):
            return owner
    return None


def _owners(frame: FrameType | None) -> Iterator[Any]:
    """The `self` of every method on the stack, innermost first."""
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self" and code.co_flags & inspect.CO_OPTIMIZED:
            variables = frame.f_locals
            owner = variables.get("self")
            if _KEPT and not _READS_THEM & set(code.co_names):
                variables.clear()  # else tensors of a first step would live until the pipeline returns
            yield owner
        frame = frame.f_back
