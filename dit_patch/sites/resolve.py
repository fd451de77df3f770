"""What is behind a site's address in one model: submodules, attributes, functions; nothing is changed.

Knows nothing about specs beyond the text of an address.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import FunctionType
from typing import Any

import torch

from ..errors import SiteError, suggest
from ..upstream.torch_internals import children, is_compiled
from .inner_functions import Locals
from .pipeline_models import find_stages, unwrap


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


def _of_stages(pipeline: Any, model: torch.nn.Module, name: str, where: str) -> list[tuple[Any, str]]:
    running = find_stages(pipeline, model)
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
