"""The models inside what a user holds: a diffusers or FastVideo pipeline, or one model; nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UnsupportedModelError, quote
from ..upstream.torch_internals import compiled_from, is_compiled


def find_models(target: Any) -> dict[str, torch.nn.Module]:
    """Return the modules of a pipeline by name (diffusers' `components`, FastVideo's `modules`), or the one given.

    Wrappers are seen through, see `unwrap`. A module that stands under two names is listed under the first.

    Raises:
        UnsupportedModelError: `target` is neither a pipeline nor a module.
    """
    found: dict[str, torch.nn.Module] = {}
    for name, part in _parts(target).items():
        if isinstance(part, torch.nn.Module) and not any(unwrap(part) is other for other in found.values()):
            found[name] = unwrap(part)
    return found


def find_stages(target: Any, model: torch.nn.Module) -> list[Any]:
    """Return the stages of a FastVideo pipeline that run `model`; none if `target` is something else."""
    stages = getattr(target, "stages", None)
    if not isinstance(stages, (list, tuple)):
        return []
    parts = ((stage, part) for stage in stages for part in getattr(stage, "__dict__", {}).values())
    running = [stage for stage, part in parts if isinstance(part, torch.nn.Module) and unwrap(part) is model]
    return list({id(stage): stage for stage in running}.values())


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside torch.compile's, DistributedDataParallel's or FSDP1's wrapper; others wrap in place."""
    while True:
        inner = compiled_from(module)
        if inner is None and type(module).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = module.module
        if inner is None and type(module).__name__ == "FullyShardedDataParallel":
            inner = module.module
        if inner is None:
            return module
        module = inner


def is_compiled_in(target: Any, model: torch.nn.Module) -> bool:
    """Return whether `target`, a pipeline or a module, calls `model` as compiled code."""
    parts = [part for part in _parts(target).values() if isinstance(part, torch.nn.Module)]
    around = [part for part in parts if any(each is model for each in part.modules())]
    return any(map(is_compiled, (model, *around)))


def _parts(target: Any) -> Mapping[str, Any]:
    if isinstance(target, torch.nn.Module):
        return {"model": target}
    for name in ("components", "modules"):
        parts = getattr(target, name, None)
        if isinstance(parts, Mapping):
            return parts
    raise UnsupportedModelError(
        f"expected a pipeline or a torch.nn.Module, got {quote(repr(target))} ({type(target).__qualname__})"
    )
