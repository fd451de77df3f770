"""What is behind an address in one model: attributes, submodules, functions. Nothing is changed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

from ..errors import SiteError, suggest
from ..spec.address import (
    FORWARD,
    Address,
    AttributeAddress,
    GlobalAddress,
    InnerFunctionAddress,
    SpanAddress,
    StageAddress,
)
from ..upstream.torch_internals import children, is_compiled
from .inner_functions import InnerFunctions
from .pipeline_models import find_stages, unwrap


class Place(NamedTuple):
    """An attribute that an address names."""

    #: The module, Python module, stage of a pipeline or function that holds it.
    owner: Any
    name: str
    #: The names of the children that the `*` of the address stand for.
    stars: tuple[str, ...] = ()


class Ends(NamedTuple):
    """The two submodules that a span lies between."""

    #: None: the span begins where the forward does.
    start: torch.nn.Module | None
    end: torch.nn.Module
    #: The path of `end`, without `*`.
    path: str


def places(address: Address, model: torch.nn.Module, label: str, pipeline: Any = None) -> list[Place]:
    """Return the attributes that an address names in `model`, or in the `pipeline` around it.

    Raises:
        SiteError: there is none, or what is there cannot be called; it says what there is instead.
    """
    match address:
        case AttributeAddress(path, name):
            return [_method(owner, name, stars, label) for owner, stars in branches(model, path, label)]
        case GlobalAddress(module, name):
            return [_global(_python_module(module, model, label), name, label)]
        case InnerFunctionAddress(module, function, name):
            return [_inner_function(_python_module(module, model, label), function, name, label)]
        case StageAddress(name):
            return _methods_of_stages(pipeline, model, name, label)
    raise TypeError(f"{label}: {address} names no attribute")


def spans(address: SpanAddress, model: torch.nn.Module, label: str) -> list[Ends]:
    """Return the ends of the spans that an address names; SiteError if there is none."""
    ends = []
    for end, stars in branches(model, address.end, label):
        start = submodules(model, fill_stars(address.start, stars), label)[0] if address.start else None
        ends.append(Ends(start, end, fill_stars(address.end, stars)))
    return ends


def submodules(model: torch.nn.Module, path: str, label: str) -> list[torch.nn.Module]:
    """Return the submodules at a dotted path; the model itself at the empty path.

    `*` stands for every child at its step that has the rest of the path, of which there must be one.

    Raises:
        SiteError: there is none; it says what there is instead.
    """
    return [module for module, _ in branches(model, path, label)]


def branches(model: torch.nn.Module, path: str, label: str) -> list[tuple[torch.nn.Module, tuple[str, ...]]]:
    """Return what `submodules` does, each with the names of the children that the path's `*` stand for."""
    here = [(model, type(model).__name__, ())]
    starred = False
    for step in path.split(".") if path else []:
        below, missing = [], None
        for module, called, stars in here:
            names = dict(module.named_children())
            if step == "*":
                chosen = {name: (child, (*stars, name)) for name, child in names.items()}
            else:
                chosen = {step: (names[step], stars)} if step in names else {}
            if not chosen:
                missing = missing or (
                    f"{label}: {called} has no submodule `{step}`{suggest(step, names)}\n"
                    f"    It has: {', '.join(names) or 'none'}."
                )
            below += [(unwrap(child), f"{called}.{name}", found) for name, (child, found) in chosen.items()]
        if missing and not (starred and below):
            raise SiteError(missing)
        starred = starred or step == "*"
        here = below
    return [(module, stars) for module, _, stars in here]


def fill_stars(path: str, stars: tuple[str, ...]) -> str:
    """Return the path with its first `*` replaced by these names, as far as there are any."""
    for name in stars:
        path = path.replace("*", name, 1)
    return path


def function(address: GlobalAddress, label: str) -> Callable:
    """Return the function at `package.module:name`.

    Raises:
        SiteError: it cannot be imported, or what is there cannot be called.
    """
    try:
        found = getattr(import_module(address.module), address.name)
    except (ImportError, AttributeError) as error:
        raise SiteError(f"{label}: `{address}` cannot be found: {error}") from error
    if not callable(found):
        raise SiteError(f"{label}: `{address}` is a {type(found).__name__}, which cannot be called")
    return found


def is_compiled_along(model: torch.nn.Module, path: str) -> bool:
    """Return whether the submodule at `path`, or one on the way to it, runs compiled code or is gone."""
    module = model
    for step in path.split("."):
        module = children(module).get(step)
        if module is None or is_compiled(module):
            return True
    return False


def _method(owner: torch.nn.Module, name: str, stars: tuple[str, ...], label: str) -> Place:
    if not callable(getattr(owner, name, None)):
        near = suggest(name, [each for each in dir(owner) if callable(getattr(owner, each, None))])
        raise SiteError(f"{label}: a {type(owner).__name__} has no method `{name}`{near}")
    return Place(owner, name, stars)


def _methods_of_stages(pipeline: Any, model: torch.nn.Module, name: str, label: str) -> list[Place]:
    stages = find_stages(pipeline, model)
    found = [Place(stage, name) for stage in stages if callable(getattr(stage, name, None))]
    if not found:
        what = ", ".join(type(stage).__name__ for stage in stages) or "none"
        raise SiteError(f"{label}: no stage that runs the model has a method `{name}`; the stages that do: {what}")
    return found


def _python_module(name: str, model: torch.nn.Module, label: str) -> ModuleType:
    if name == FORWARD:
        # As the model's own forward sees it: a subclass in another module has other globals than its parent.
        return sys.modules[inspect.unwrap(type(model).forward).__globals__["__name__"]]
    try:
        return import_module(name)
    except ImportError as error:
        raise SiteError(f"{label}: cannot import `{name}`: {error}") from error


def _global(module: ModuleType, name: str, label: str) -> Place:
    if not callable(vars(module).get(name)):
        raise SiteError(f"{label}: {module.__name__} has no function `{name}`{suggest(name, vars(module))}")
    return Place(module, name)


def _inner_function(module: ModuleType, path: str, name: str, label: str) -> Place:
    outer: Any = module
    for step in path.split("."):
        outer = vars(outer).get(step) if hasattr(outer, "__dict__") else None
    if not isinstance(outer, FunctionType):
        raise SiteError(f"{label}: {module.__name__} has no function `{path}` that is plain Python")
    functions = vars(InnerFunctions(outer))
    if name not in functions:
        raise SiteError(f"{label}: `{path}` defines no function `{name}` of its own{suggest(name, functions)}")
    return Place(InnerFunctions(outer), name)
