"""A site of a spec bound to a model: its names looked up there, its replacement checked, its patches made.

Changes nothing yet; installing the patches does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any

import torch

from ..errors import SiteError, suggest
from ..findings import Finding, FindingKind, warn
from ..spec.fingerprint import fingerprint
from ..spec.model import Site, Spec
from ..upstream import torch_internals
from . import resolve, scope
from .binding import Attribute, Binding
from .memoised import MemoisedSite
from .patch import Patch
from .replaced import ReplacedSite
from .result_filter import ResultFilter
from .span import Span
from .stand_in import StandInSite


def bind(spec: Spec, site: Site, binding: Binding, pipeline: Any) -> tuple[list[Patch], Finding | None]:
    """Return the patches of one site, and what there is to say of it in the report.

    Args:
        pipeline: what was given to `apply`, a pipeline or the model itself.

    Raises:
        SiteError: the spec names something that is not there.
    """
    label, model = spec.label(site), binding.model
    has_own_forward = scope.has_own_forward(model, spec.classes)
    if has_own_forward and _counts_on_the_forward(site):
        return [], Finding(FindingKind.NEEDS_FORWARD, site.at, type(model).__name__)
    try:
        if site.is_span:
            ends = _ends(model, *site.span, label)
        else:
            attributes = _attributes(site, model, pipeline, label)
    except SiteError:
        if site.optional:
            return [], Finding(_kind_of_absence(site), site.at)
        if not has_own_forward:
            raise
        return [], Finding(FindingKind.OTHER_FORWARD, site.at, type(model).__name__)
    if site.is_span:
        return [Span(site, label, binding, *each) for each in ends], None
    if site.then:
        function = resolve.function(site.then, label)
        return [ResultFilter(binding, each, function) for each in attributes], None
    finding = None
    replacement = _replacement(attributes[0]) if site.use else None
    if site.use and replacement is None:
        finding = Finding(FindingKind.OTHER_SOURCE, site.at, site.use)
        if not site.key:
            return [], finding
    return [_patch(binding, each, replacement) for each in attributes], finding


def _patch(binding: Binding, attribute: Attribute, replacement: Callable | None) -> Patch:
    site = attribute.site
    if replacement is not None and not site.key:
        patch = ReplacedSite(binding, attribute, replacement)
    else:
        patch = MemoisedSite(binding, attribute, replacement)
    return StandInSite(binding, attribute, patch) if site.unused or site.unused_with else patch


def _attributes(site: Site, model: torch.nn.Module, pipeline: Any, label: str) -> list[Attribute]:
    """Return the attributes that the site stands for, with what it reads; the first with what it clears."""
    targets = resolve.targets(model, site.at, label, pipeline)
    leftovers = _leftovers(model, site.clears, label)
    values = [resolve.function(name, label) for name in site.reads if ":" in name]
    attributes: list[Attribute] = []
    for (owner, name), stars in zip(targets, _stars(model, site.at, label)):
        paths = [resolve.filled_in(path, stars) for path in site.reads if ":" not in path]
        weights = {path: found for path in paths if (found := _parameter(model, path)) is not None}
        modules = [each for path in paths if path not in weights for each in resolve.submodules(model, path, label)]
        first = () if attributes else leftovers
        attributes.append(Attribute(site, label, owner, name, modules, tuple(weights.values()), values, first))
    return attributes


def _kind_of_absence(site: Site) -> FindingKind:
    return FindingKind.ABSENT_STAGE if site.at.startswith("pipeline:") else FindingKind.ABSENT


def _counts_on_the_forward(site: Site) -> bool:
    """Whether the site is only right inside the forward that its spec was written for.

    A span is not: each of its steps is known by what it is called with.
    """
    borrows = not site.is_span and any(name.startswith("model.") for name in site.key)
    return bool(site.unused or site.unused_with or borrows)


def _ends(model: torch.nn.Module, start: str, end: str, label: str) -> list[tuple[Any, torch.nn.Module, str]]:
    """For each span of an address where it begins (None: with the forward), where it ends, and the path to there."""
    found = []
    for module, stars in resolve.branches(model, end, label):
        begin = resolve.submodules(model, resolve.filled_in(start, stars), label)[0] if start else None
        found.append((begin, module, resolve.filled_in(end, stars)))
    return found


def _stars(model: torch.nn.Module, at: str, label: str) -> Iterable[tuple[str, ...]]:
    """What the `*` of an address stand for, for each attribute that it names."""
    if ":" in at:
        return repeat(())
    return [stars for _, stars in resolve.branches(model, at.rpartition(".")[0], label)]


def _parameter(model: torch.nn.Module, path: str) -> tuple[dict, str] | None:
    """The parameter at a path without `*`, as its owner's parameters and its name among them; None if it is none."""
    place, _, name = path.rpartition(".")
    try:
        parameters = torch_internals.parameters(model.get_submodule(place))
    except AttributeError:
        return None
    return (parameters, name) if parameters.get(name) is not None else None


def _leftovers(model: torch.nn.Module, paths: Iterable[str], label: str) -> list[tuple[torch.nn.Module, str]]:
    """The attributes at these paths, as (owner, name)."""

    def found() -> Iterator[tuple[torch.nn.Module, str]]:
        for path in paths:
            place, _, name = path.rpartition(".")
            for owner in resolve.submodules(model, place, label):
                if not hasattr(owner, name):
                    near = suggest(name, vars(owner))
                    raise SiteError(f"{label}: a {type(owner).__name__} has no attribute `{name}`{near}")
                yield owner, name

    return list(found())


def _replacement(attribute: Attribute) -> Callable | None:
    """Return the function that `use:` names; None, with a warning, where the original is not the one it replaces."""
    site, label = attribute.site, attribute.label
    replacement = resolve.function(site.use, label)
    try:
        actual = fingerprint(attribute.original)
    except (OSError, TypeError):
        actual = "unreadable"
    if actual in site.source:
        return replacement
    source = f"{actual}, and {site.use} was written for {', '.join(site.source)}"
    warn(Finding(FindingKind.OTHER_SOURCE, label, source), stacklevel=5)
    return None
