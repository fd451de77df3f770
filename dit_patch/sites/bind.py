"""A site of a spec made live on a model: its names looked up there, its replacement checked, its patches made.

Changes nothing yet; installing the patches does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch

from ..errors import SiteError, suggest
from ..findings import Finding, FindingKind, warn
from ..memo.store import Budget
from ..spec.fingerprint import fingerprint
from ..spec.model import Site, Spec
from ..upstream import torch_internals
from . import layers, resolve, scope
from .patch import Means, Patch
from .span import Span


def live(
    spec: Spec,
    site: Site,
    model: torch.nn.Module,
    target: Any,
    *,
    budget: Budget,
    check: str,
    fixes: bool,
) -> tuple[list[Patch | Span], Finding | None]:
    """The patches of one site, and what there is to say of it in the report.

    Args:
        target: what was given to `apply`, a pipeline or the model itself.

    Raises:
        SiteError: where the spec names something that is not there.
    """
    where = spec.label(site)
    strange = resolve.own_forward(model, spec.classes)
    if strange and _counts_on_the_forward(site):
        return [], Finding(FindingKind.NEEDS_FORWARD, site.at, type(model).__name__)
    try:
        if site.is_span:
            ends = _ends(model, *site.span, where)
        else:
            targets = resolve.targets(model, site.at, where, target)
        leftovers = _leftovers(model, site.clears, where)
    except SiteError:
        if site.optional:
            return [], Finding(
                FindingKind.ABSENT_STAGE if site.at.startswith("pipeline:") else FindingKind.ABSENT, site.at
            )
        if not strange:
            raise
        return [], Finding(FindingKind.OTHER_FORWARD, site.at, type(model).__name__)
    parameters = (*scope.parameters(model), *spec.parameters)
    if site.is_span:
        return [Span(site, model, *each, parameters, where=where, budget=budget, check=check) for each in ends], None
    note = None
    replacement = _replacement(site, *targets[0], where) if site.use else None
    if site.use and replacement is None:
        note = Finding(FindingKind.OTHER_SOURCE, site.at, site.use)
        if not site.key:
            return [], note
    means = Means(
        parameters=parameters,
        open_ended=scope.takes_any(model),
        replacement=replacement,
        then=resolve.function(site.then, where) if site.then else None,
        values=[resolve.function(name, where) for name in site.reads if ":" in name],
        leftovers=leftovers,
    )
    patches: list[Patch | Span] = []
    for (owner, name), stars in zip(targets, _stars(model, site.at, where)):
        paths = [resolve.filled_in(path, stars) for path in site.reads if ":" not in path]
        weights = {path: found for path in paths if (found := _parameter(model, path)) is not None}
        modules = [each for path in paths if path not in weights for each in resolve.submodules(model, path, where)]
        first = () if patches else means.leftovers
        own = replace(means, modules=modules, weights=tuple(weights.values()), leftovers=first)
        patches.append(Patch(site, model, owner, name, own, where=where, budget=budget, check=check, fixes=fixes))
    return patches, note


def _counts_on_the_forward(site: Site) -> bool:
    """Whether the site is only right inside the forward that its spec was written for.

    A span is not: each of its steps is known by what it is called with.
    """
    borrows = not site.is_span and any(name.startswith("model.") for name in site.key)
    return bool(site.unused or site.unused_with or borrows)


def _ends(model: torch.nn.Module, start: str, end: str, where: str) -> list[tuple[Any, torch.nn.Module, str]]:
    """For each span of an address where it begins (None: with the forward), where it ends, and the path to there."""
    found = []
    for module, stars in resolve.branches(model, end, where):
        begin = resolve.submodules(model, resolve.filled_in(start, stars), where)[0] if start else None
        found.append((begin, module, resolve.filled_in(end, stars)))
    return found


def _stars(model: torch.nn.Module, at: str, where: str) -> Iterable[tuple[str, ...]]:
    """What the `*` of an address stand for, for each attribute that it names."""
    if ":" in at:
        return repeat(())
    return [stars for _, stars in resolve.branches(model, at.rpartition(".")[0], where)]


def _parameter(model: torch.nn.Module, path: str) -> tuple[dict, str] | None:
    """The parameter at a path without `*`, as its owner's parameters and its name among them; None if it is none."""
    place, _, name = path.rpartition(".")
    try:
        parameters = torch_internals.parameters(model.get_submodule(place))
    except AttributeError:
        return None
    return (parameters, name) if parameters.get(name) is not None else None


def _leftovers(model: torch.nn.Module, paths: Iterable[str], where: str) -> list[tuple[torch.nn.Module, str]]:
    """The attributes at these paths, as (owner, name)."""

    def found() -> Iterator[tuple[torch.nn.Module, str]]:
        for path in paths:
            place, _, name = path.rpartition(".")
            for owner in resolve.submodules(model, place, where):
                if not hasattr(owner, name):
                    near = suggest(name, vars(owner))
                    raise SiteError(f"{where}: a {type(owner).__name__} has no attribute `{name}`{near}")
                yield owner, name

    return list(found())


def _replacement(site: Site, owner: Any, name: str, where: str) -> Any:
    """The function that `use:` names; None, with a warning, where the original is not the one that it replaces."""
    replacement = resolve.function(site.use, where)
    try:
        actual = fingerprint(layers.innermost(owner, name))
    except (OSError, TypeError):
        actual = "unreadable"
    if actual in site.source:
        return replacement
    source = f"{actual}, and {site.use} was written for {', '.join(site.source)}"
    warn(Finding(FindingKind.OTHER_SOURCE, where, source), stacklevel=5)
    return None
