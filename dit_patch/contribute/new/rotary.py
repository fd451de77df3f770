"""Find the functions that a model rotates queries and keys with, if the bundled specs have replacements for them."""

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


def propose_rotary_sites(model: torch.nn.Module, arguments: Mapping[str, Any]) -> list[Proposal]:
    """Propose a site for each such function that one forward calls; it is recognised by its source."""
    replacements, addresses = _replacements()
    calls: Counter[str] = Counter()
    uses: dict[str, tuple[str, str]] = {}
    with ExitStack() as undo, torch.no_grad():
        for at, owner, name in _functions(model, addresses):
            try:
                source = fingerprint(layers.innermost(owner, name))
            except (OSError, TypeError):
                continue
            if source not in replacements:
                continue
            uses[at] = replacements[source], source

            def note(original, instance, args, kwargs, at=at):
                calls[at] += 1
                return original(*args, **kwargs)

            undo.callback(layers.remove, layers.install(owner, name, note))
        model(**arguments)
    return [
        Proposal(at, "rotary", {}, number, 0, "Rotates queries and keys, for which there is one pass", uses[at])
        for at, number in calls.items()
    ]


def _replacements() -> tuple[dict[str, str], set[GlobalAddress]]:
    """Return replacements by the fingerprints of their originals, and the addresses of originals that are globals."""
    sites = [site for spec in Registry(plugins=False) for site in spec.sites if site.kind == "rotary" and site.use]
    addresses = {site.address for site in sites if isinstance(site.address, GlobalAddress)}
    return {source: site.use for site in sites for source in site.source}, addresses


def _functions(model: torch.nn.Module, addresses: set[GlobalAddress]) -> Iterator[tuple[str, Any, str]]:
    """Yield the address, owner and name of functions that the model may call.

    These are the functions of the Python modules that define its submodules and processors, those inside the methods of
    their classes, and those at `addresses`, which are imported where they are called.
    """
    processors = (module.processor for module in model.modules() if hasattr(module, "processor"))
    modules = {type(each).__module__ for each in (*model.modules(), *processors)} - {"builtins"}
    for module in filter(None, map(sys.modules.get, sorted(modules))):
        if module.__name__.startswith("torch."):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, FunctionType):
                yield f"{module.__name__}:{name}", module, name
            elif isinstance(value, type) and value.__module__ == module.__name__:
                yield from _inner_functions(module, value)
    for address in sorted(addresses, key=str):
        module = sys.modules.get(address.module)
        function = vars(module).get(address.name) if module else None
        if address.module not in modules and isinstance(function, FunctionType):
            yield str(address), module, address.name


def _inner_functions(module: ModuleType, cls: type) -> Iterator[tuple[str, Any, str]]:
    for method in vars(cls).values():
        if isinstance(method, FunctionType):
            for name in vars(InnerFunctions(method)):
                yield f"{module.__name__}:{method.__qualname__}.<locals>.{name}", InnerFunctions(method), name
