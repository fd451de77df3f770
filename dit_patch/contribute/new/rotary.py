"""Which functions that rotate queries and keys a model calls, of those that the specs here have a replacement for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import FunctionType, ModuleType
from typing import Any

import torch

from ...sites import layers
from ...sites.inner_functions import InnerFunctions
from ...spec.address import GlobalAddress
from ...spec.fingerprint import fingerprint
from ...spec.registry import Registry
from .observe import Proposal


def sites(model: torch.nn.Module, arguments: Mapping[str, Any]) -> list[Proposal]:
    """A site for each that one forward calls; known by its source, wherever it is defined."""
    known, places = _known()
    calls: Counter[str] = Counter()
    uses: dict[str, tuple[str, str]] = {}
    with ExitStack() as undo, torch.no_grad():
        for at, owner, name in _functions(model, places):
            try:
                source = fingerprint(layers.innermost(owner, name))
            except (OSError, TypeError):
                continue
            if source not in known:
                continue
            uses[at] = known[source], source

            def note(original, instance, args, kwargs, at=at):
                calls[at] += 1
                return original(*args, **kwargs)

            undo.callback(layers.remove, layers.install(owner, name, note))
        model(**arguments)
    return [
        Proposal(at, "rotary", {}, number, 0, "Rotates queries and keys, for which there is one pass", uses[at])
        for at, number in calls.items()
    ]


def _known() -> tuple[dict[str, str], set[GlobalAddress]]:
    """By the fingerprint of an original what replaces it; and the addresses of those that are globals."""
    sites = [site for spec in Registry(plugins=False) for site in spec.sites if site.kind == "rotary" and site.use]
    places = {site.address for site in sites if isinstance(site.address, GlobalAddress)}
    return {source: site.use for site in sites for source in site.source}, places


def _functions(model: torch.nn.Module, places: set[GlobalAddress]) -> Iterator[tuple[str, Any, str]]:
    """What the modules that define the model's parts have: their functions, and those inside the classes' methods.

    And those at `places`, which are imported where they are called.
    """
    parts = [*model.modules(), *(part.processor for part in model.modules() if hasattr(part, "processor"))]
    modules = {type(part).__module__ for part in parts} - {"builtins"}
    for module in filter(None, map(sys.modules.get, sorted(modules))):
        if module.__name__.startswith("torch."):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, FunctionType):
                yield f"{module.__name__}:{name}", module, name
            elif isinstance(value, type) and value.__module__ == module.__name__:
                yield from _inside(module, value)
    for place in sorted(places, key=str):
        module = sys.modules.get(place.module)
        if place.module not in modules and isinstance(vars(module).get(place.name) if module else None, FunctionType):
            yield str(place), module, place.name


def _inside(module: ModuleType, cls: type) -> Iterator[tuple[str, Any, str]]:
    for method in vars(cls).values():
        if isinstance(method, FunctionType):
            for name in vars(InnerFunctions(method)):
                yield f"{module.__name__}:{method.__qualname__}.<locals>.{name}", InnerFunctions(method), name
