"""Binds a site of a spec to a model: looks its names up there, checks its replacement, and makes its patches.

Changes nothing yet; installing the patches does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..errors import SiteError, suggest
from ..findings import Finding, FindingKind, warn
from ..spec.address import Address, SpanAddress, StageAddress
from ..spec.fingerprint import fingerprint
from ..spec.model import Site, Spec
from ..upstream import torch_internals
from . import resolve, scope
from .binding import Attribute, Binding
from .memoised import MemoisedSite
from .patch import Patch
from .replaced import ReplacedSite
from .resolve import Place
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
    label, model, address = spec.label(site), binding.model, site.address
    has_own_forward = scope.has_own_forward(model, spec.classes)
    if has_own_forward and _counts_on_the_forward(site):
        return [], Finding(FindingKind.NEEDS_FORWARD, site.at, type(model).__name__)
    try:
        if isinstance(address, SpanAddress):
            spans = resolve.spans(address, model, label)
        else:
            places = resolve.places(address, model, label, pipeline)
        leftovers = _leftovers(model, site.clears, label)
    except SiteError:
        if site.optional:
            return [], Finding(_kind_of_absence(site), site.at)
        if not has_own_forward:
            raise
        return [], Finding(FindingKind.OTHER_FORWARD, site.at, type(model).__name__)
    if isinstance(address, SpanAddress):
        return [Span(site, label, binding, ends) for ends in spans], None
    attributes = _attributes(site, model, label, places, leftovers)
    foreign = {type(each.owner).__name__: None for each in attributes if each.is_foreign}
    attributes = [each for each in attributes if not each.is_foreign]
    finding = Finding(FindingKind.FOREIGN_LAYER, site.at, ", ".join(foreign)) if foreign else None
    if not attributes:
        return [], finding
    if site.then:
        function = resolve.function(Address.parse(site.then), label)
        return [ResultFilter(binding, each, function) for each in attributes], finding
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


def _attributes(
    site: Site, model: torch.nn.Module, label: str, places: Iterable[Place], leftovers: Sequence[tuple[Any, str]]
) -> list[Attribute]:
    """Return the attributes that the site stands for, with what it reads; the first with what it clears."""
    values = [resolve.function(address, label) for address in site.functions_read]
    attributes: list[Attribute] = []
    package = type(model).__module__.partition(".")[0]
    for owner, name, stars in places:
        paths = [resolve.fill_stars(path, stars) for path in site.paths_read]
        weights = {path: found for path in paths if (found := _parameter(model, path)) is not None}
        modules = [each for path in paths if path not in weights for each in resolve.submodules(model, path, label)]
        first = () if attributes else leftovers
        attributes.append(Attribute(site, label, owner, name, modules, tuple(weights.values()), values, first, package))
    return attributes


def _kind_of_absence(site: Site) -> FindingKind:
    return FindingKind.ABSENT_STAGE if isinstance(site.address, StageAddress) else FindingKind.ABSENT


def _counts_on_the_forward(site: Site) -> bool:
    """Return whether the site is right only inside the forward that its spec was written for.

    A span is not such a site: each of its functions is known by what it is called with.
    """
    is_span = isinstance(site.address, SpanAddress)
    borrows = not is_span and site.borrows
    return bool(site.unused or site.unused_with or borrows)


def _parameter(model: torch.nn.Module, path: str) -> tuple[dict, str] | None:
    """Return the parameter at a path without `*`, as its owner's parameters and its name there; None if it is none."""
    parent, _, name = path.rpartition(".")
    try:
        parameters = torch_internals.parameters(model.get_submodule(parent))
    except AttributeError:
        return None
    return (parameters, name) if parameters.get(name) is not None else None


def _leftovers(model: torch.nn.Module, paths: Iterable[str], label: str) -> list[tuple[torch.nn.Module, str]]:
    """Return the attributes at these paths, as (owner, name)."""
    attributes = []
    for path in paths:
        parent, _, name = path.rpartition(".")
        for owner in resolve.submodules(model, parent, label):
            if not hasattr(owner, name):
                near = suggest(name, vars(owner))
                raise SiteError(f"{label}: a {type(owner).__name__} has no attribute `{name}`{near}")
            attributes.append((owner, name))
    return attributes


def _replacement(attribute: Attribute) -> Callable | None:
    """Return the function that `use:` names; None, with a warning, where the original is not the one it replaces."""
    site, label = attribute.site, attribute.label
    replacement = resolve.function(Address.parse(site.use), label)
    try:
        actual = fingerprint(attribute.original)
    except (OSError, TypeError):
        actual = "unreadable"
    if actual in site.source:
        return replacement
    source = f"{actual}, and {site.use} was written for {', '.join(site.source)}"
    warn(Finding(FindingKind.OTHER_SOURCE, label, source), stacklevel=5)
    return None
