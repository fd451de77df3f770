"""From what a user holds to what is patched: the models inside a pipeline, and the attribute behind a site's address.

Knows nothing about specs beyond the text of an address, and changes nothing.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import FunctionType
from typing import Any

import torch

from ..errors import SiteError, UnsupportedModelError, quote, suggest
from ..upstream.torch_internals import children, compiled_from, is_compiled
from .inner_functions import Locals


def models(target: Any) -> dict[str, torch.nn.Module]:
    """The modules of a pipeline by name (diffusers' `components`, FastVideo's `modules`), or the one module given.

    Wrappers are seen through, see `unwrap`. A module that stands under two names is listed under the first.

    Raises:
        UnsupportedModelError: if `target` is neither.
    """
    found: dict[str, torch.nn.Module] = {}
    for name, part in _parts(target).items():
        if isinstance(part, torch.nn.Module) and not any(unwrap(part) is other for other in found.values()):
            found[name] = unwrap(part)
    return found


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


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside torch.compile's, DistributedDataParallel's or FSDP1's wrapper; others wrap in place."""
    while True:
        inner = compiled_from(module)
        if inner is None and type(module).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = module.module
        if inner is None and type(module).__name__ == "FullyShardedDataParallel":
            inner = module.module
        if inner is None:
            return module
        module = inner


def stages(target: Any, model: torch.nn.Module) -> list[Any]:
    """The stages of a FastVideo pipeline that run `model`; none where `target` is something else."""
    found = getattr(target, "stages", None)
    if not isinstance(found, (list, tuple)):
        return []
    parts = ((stage, part) for stage in found for part in getattr(stage, "__dict__", {}).values())
    running = [stage for stage, part in parts if isinstance(part, torch.nn.Module) and unwrap(part) is model]
    return list({id(stage): stage for stage in running}.values())


def compiled_in(target: Any, model: torch.nn.Module) -> bool:
    """Whether `target`, a pipeline or a module, calls `model` as compiled code."""
    parts = [part for part in _parts(target).values() if isinstance(part, torch.nn.Module)]
    around = [part for part in parts if any(each is model for each in part.modules())]
    return any(map(is_compiled, (model, *around)))


def compiled_along(model: torch.nn.Module, path: str) -> bool:
    """Whether the submodule at `path`, or one on the way to it, runs compiled code or is gone."""
    module = model
    for step in path.split("."):
        module = children(module).get(step)
        if module is None or is_compiled(module):
            return True
    return False


def targets(model: torch.nn.Module, at: str, where: str, pipeline: Any = None) -> list[tuple[Any, str]]:
    """The attributes that an address names in `model`, or in the `pipeline` around it, as (owner, name).

    Raises:
        SiteError: if there is none, or what is there cannot be called; it says what there is instead.
    """
    if at.startswith("pipeline:"):
        return _of_stages(pipeline, model, at.partition(":")[2], where)
    if ":" in at:
        return [_global(model, at, where)]
    path, _, name = at.rpartition(".")
    found = []
    for owner in submodules(model, path, where):
        if not callable(getattr(owner, name, None)):
            near = suggest(name, [each for each in dir(owner) if callable(getattr(owner, each, None))])
            raise SiteError(f"{where}: a {type(owner).__name__} has no method `{name}`{near}")
        found.append((owner, name))
    return found


def submodules(model: torch.nn.Module, path: str, where: str) -> list[torch.nn.Module]:
    """The submodules at a dotted path; the model itself at the empty path.

    `*` stands for every child at its step that has the rest of the path, of which there must be one.
    """
    return [module for module, _ in branches(model, path, where)]


def branches(model: torch.nn.Module, path: str, where: str) -> list[tuple[torch.nn.Module, tuple[str, ...]]]:
    """As `submodules`, each with the names of the children that the path's `*` stand for."""
    here = [(model, type(model).__name__, ())]
    starred = False
    for step in path.split(".") if path else []:
        below, missing = [], None
        for module, called, stars in here:
            children = dict(module.named_children())
            if step == "*":
                chosen = {name: (child, (*stars, name)) for name, child in children.items()}
            else:
                chosen = {step: (children[step], stars)} if step in children else {}
            if not chosen:
                missing = missing or (
                    f"{where}: {called} has no submodule `{step}`{suggest(step, children)}\n"
                    f"    It has: {', '.join(children) or 'none'}."
                )
            below += [(unwrap(child), f"{called}.{name}", names) for name, (child, names) in chosen.items()]
        if missing and not (starred and below):
            raise SiteError(missing)
        starred = starred or step == "*"
        here = below
    return [(module, stars) for module, _, stars in here]


def filled_in(path: str, stars: tuple[str, ...]) -> str:
    """The path with its first `*` replaced by these names, as far as there are any."""
    for name in stars:
        path = path.replace("*", name, 1)
    return path


def function(address: str, where: str) -> Callable:
    """The function at `package.module:name`.

    Raises:
        SiteError: if it cannot be imported, or nothing there can be called.
    """
    place, _, name = address.partition(":")
    try:
        found = getattr(import_module(place), name)
    except (ImportError, AttributeError) as error:
        raise SiteError(f"{where}: `{address}` cannot be found: {error}") from error
    if not callable(found):
        raise SiteError(f"{where}: `{address}` is a {type(found).__name__}, which cannot be called")
    return found


def own_forward(model: torch.nn.Module, classes: tuple[str, ...]) -> bool:
    """Whether the model's class has a forward of its own, other than that of the class that the spec is for."""
    for base in type(model).__mro__:
        if f"{base.__module__}.{base.__qualname__}" in classes:
            return inspect.unwrap(type(model).forward) is not inspect.unwrap(base.forward)
    return False


def _of_stages(pipeline: Any, model: torch.nn.Module, name: str, where: str) -> list[tuple[Any, str]]:
    running = stages(pipeline, model)
    found = [(stage, name) for stage in running if callable(getattr(stage, name, None))]
    if not found:
        what = ", ".join(type(stage).__name__ for stage in running) or "none"
        raise SiteError(f"{where}: no stage that runs the model has a method `{name}`; the stages that do: {what}")
    return found


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
    if "<locals>" in name:
        return _inside(module, *name.split(".<locals>."), where)
    if not callable(vars(module).get(name)):
        raise SiteError(f"{where}: {module.__name__} has no function `{name}`{suggest(name, vars(module))}")
    return module, name


def _inside(module: Any, path: str, name: str, where: str) -> tuple[Any, str]:
    """The function `name` that the function at `path` defines."""
    outer = module
    for step in path.split("."):
        outer = vars(outer).get(step) if hasattr(outer, "__dict__") else None
    if not isinstance(outer, FunctionType):
        raise SiteError(f"{where}: {module.__name__} has no function `{path}` that is plain Python")
    functions = vars(Locals(outer))
    if name not in functions:
        raise SiteError(f"{where}: `{path}` defines no function `{name}` of its own{suggest(name, functions)}")
    return Locals(outer), name
