"""From what a user holds to what is patched: the models inside a pipeline, and the attribute behind a site's address.

Knows nothing about specs beyond the text of an address, and changes nothing.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from .errors import SiteError, UnsupportedModelError, quote, suggest


def models(target: Any) -> dict[str, torch.nn.Module]:
    """The modules of a pipeline by name (diffusers' `components`, FastVideo's `modules`), or the one module given.

    Wrappers are seen through, see `unwrap`. A module that stands under two names is listed under the first.

    Raises:
        UnsupportedModelError: if `target` is neither.
    """
    if isinstance(target, torch.nn.Module):
        return {"model": unwrap(target)}
    parts = getattr(target, "components", None)
    if not isinstance(parts, Mapping):
        parts = getattr(target, "modules", None)
    if not isinstance(parts, Mapping):
        raise UnsupportedModelError(
            f"expected a pipeline or a torch.nn.Module, got {quote(repr(target))} ({type(target).__qualname__})"
        )
    found: dict[str, torch.nn.Module] = {}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module) and not any(unwrap(part) is other for other in found.values()):
            found[name] = unwrap(part)
    return found


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside torch.compile's, DistributedDataParallel's or FSDP1's wrapper; others wrap in place."""
    while True:
        inner = module.__dict__.get("_modules", {}).get("_orig_mod")
        if inner is None and type(module).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = module.module
        if inner is None and type(module).__name__ == "FullyShardedDataParallel":
            inner = module.module
        if inner is None:
            return module
        module = inner


def compiled(module: torch.nn.Module) -> bool:
    """Whether calls of the module run compiled code."""
    return module.__dict__.get("_compiled_call_impl") is not None or "_orig_mod" in module.__dict__["_modules"]


def compiled_along(model: torch.nn.Module, path: str) -> bool:
    """Whether the submodule at `path`, or one on the way to it, runs compiled code or is gone."""
    module = model
    for step in path.split("."):
        module = module.__dict__["_modules"].get(step)
        if module is None or compiled(module):
            return True
    return False


def targets(model: torch.nn.Module, at: str, where: str) -> list[tuple[Any, str]]:
    """The attributes that an address names in `model`, as (owner, name).

    Raises:
        SiteError: if there is none, or what is there cannot be called; it says what there is instead.
    """
    if ":" in at:
        return [_global(model, at, where)]
    *path, name = at.split(".")
    found = []
    for owner in submodules(model, ".".join(path), where):
        if not callable(getattr(owner, name, None)):
            near = suggest(name, [each for each in dir(owner) if callable(getattr(owner, each, None))])
            raise SiteError(f"{where}: a {type(owner).__name__} has no method `{name}`{near}")
        found.append((owner, name))
    return found


def submodules(model: torch.nn.Module, path: str, where: str) -> list[torch.nn.Module]:
    """The submodules at a dotted path, `*` standing for every child at its step; the model itself at the empty path."""
    here = [(model, type(model).__name__)]
    for step in path.split(".") if path else []:
        below = []
        for module, called in here:
            children = dict(module.named_children())
            chosen = children if step == "*" else {step: children[step]} if step in children else None
            if not chosen:
                raise SiteError(
                    f"{where}: {called} has no submodule `{step}`{suggest(step, children)}\n"
                    f"    It has: {', '.join(children) or 'none'}."
                )
            below += [(unwrap(child), f"{called}.{name}") for name, child in chosen.items()]
        here = below
    return [module for module, _ in here]


def _global(model: torch.nn.Module, at: str, where: str) -> tuple[Any, str]:
    place, _, name = at.partition(":")
    if place == "forward":
        # As the model's own forward sees it: a subclass in another module has other globals than its parent.
        module = sys.modules[inspect.unwrap(type(model).forward).__globals__["__name__"]]
    else:
        try:
            module = import_module(place)
        except ImportError as error:
            raise SiteError(f"{where}: cannot import `{place}`: {error}") from error
    if not callable(vars(module).get(name)):
        raise SiteError(f"{where}: {module.__name__} has no function `{name}`{suggest(name, vars(module))}")
    return module, name
