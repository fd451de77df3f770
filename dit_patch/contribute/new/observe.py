"""Which calls of a model's submodules could be kept: it is run, unpatched, and what repeats is looked at.

A key is proposed where the calls that were seen do not contradict it. That is no proof: on one device, in one dtype,
with one configuration much stays the same that may change elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from ...errors import SiteError
from ...memo.store import Budget
from ...sites import scope
from ...sites.binding import Attribute, Binding
from ...sites.memoised import MemoisedSite
from ...spec.address import Address
from ...spec.fingerprint import fingerprint
from ...spec.model import Site, Spec
from ..check import blocks, probe

_SINUSOID = "dit_patch.functions.sinusoid:timesteps"
_TRIVIAL = {f"torch.nn.modules.{name}" for name in ("activation", "container", "dropout")}
_ROPE = re.compile(r"rope|rotary|pos_?emb|position", re.IGNORECASE)


@dataclass(frozen=True)
class Proposal:
    """A site to begin with: how often its key repeats in the calls seen, and what to look at before believing it."""

    at: str
    kind: str
    key: dict[str, list[str]]
    calls: int
    hits: int
    about: str
    use: tuple[str, str] | None = None  # a replacement, and the fingerprint of what it stands in for
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockList:
    """A list of transformer blocks: the patterns that it may follow, and what was seen of them."""

    at: str
    patterns: list[int]
    about: str


def block_lists(model: torch.nn.Module) -> Iterator[str]:
    """Paths of the lists of modules of one class, which blocks are; none inside another."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or any(path.startswith(f"{other}.") for other in found):
            continue
        if len(module) > 1 and len({type(each) for each in module}) == 1 and any(True for _ in module[0].children()):
            found.append(path)
            yield path


def patterns(model: torch.nn.Module, forwards: Sequence[Mapping[str, Any]]) -> list[BlockList]:
    """The block lists that the forwards call, in order, each with the patterns that fit."""
    found = []
    for path in block_lists(model):
        calls = blocks.calls(model, model.get_submodule(path), forwards[:1])
        if calls:
            fitting, why = blocks.fits(calls)
            found.append(BlockList(path, fitting, why))
    return found


def sites(
    model: torch.nn.Module, forwards: Sequence[Mapping[str, Any]], moments: Sequence[tuple[int, int]]
) -> list[Proposal]:
    """Outermost submodules outside the block lists whose results repeat, each with a key that no call contradicts."""
    lists = list(block_lists(model))
    patches = [patch for path, _ in model.named_modules() if path and (patch := _patch(model, path, lists)) is not None]
    spec = Spec.model_construct(parameters=())
    recorded = probe.record(model, spec, patches, forwards, moments)
    nothing: dict[str, dict[str, tuple[str, ...]]] = {patch.site.at: {} for patch in patches}
    causes = probe.uncounted(model, spec, patches, forwards[0], nothing)
    latents = f"model.{next(iter(scope.parameters(model)), '')}"
    found: list[Proposal] = []
    for patch in patches:
        path = patch.site.address.path
        if any(path.startswith(f"{Address.parse(each.at).path}.") for each in found):
            continue
        [calls] = recorded[patch.site.at]
        lent = [name for name in causes.get(patch.site.at, ()) if name.startswith("model.")]
        proposal = None if latents in lent else _propose(patch, calls, lent)
        if proposal is not None:
            found.append(proposal)
    keys = {each.at: {name: tuple(facets) for name, facets in each.key.items()} for each in found}
    chosen = [patch for patch in patches if patch.site.at in keys]
    reads = probe.uncounted(model, spec, chosen, forwards[0], keys)
    return [replace(each, reads=tuple(reads.get(each.at, ()))) for each in found]


def _patch(model: torch.nn.Module, path: str, lists: Sequence[str]) -> MemoisedSite | None:
    """A site on the forward of the submodule, not installed; None inside a block list, and where it has none."""
    module = model.get_submodule(path)
    if any(f"{path}.".startswith(f"{each}.") for each in lists) or type(module).__module__ in _TRIVIAL:
        return None
    site = Site(at=f"{path}.forward", kind="context")
    binding = Binding(model, scope.parameters(model), takes_any=True, budget=Budget(1), check="never")
    try:
        return MemoisedSite(binding, Attribute(site, path, module, "forward"))
    except (SiteError, ValueError):
        return None


def _propose(patch: MemoisedSite, calls: list[probe.Call], lent: Sequence[str]) -> Proposal | None:
    """A site with a key for it; `lent` are the model's arguments that its results change with."""
    if len(calls) < 2 or len({call.result for call in calls}) == len(calls):
        return None
    own = sorted({name for call in calls for name in call.parts if "." not in name and name not in call.plain})
    for key in _keys(own, lent):
        hits = len(calls) - probe.distinct(calls, key)
        if not hits or probe.contradicted(calls, key):
            continue
        timed = any("time" in name for name in (*own, *lent))
        kind = "timestep" if timed and lent else "rope" if _ROPE.search(_words(patch)) else "context"
        why = "kept while its inputs are" if lent else "which depends on sizes alone"
        about = f"{type(patch.attribute.owner).__name__}, {why}"
        facets = {name: list(each) for name, each in key.items()}
        return Proposal(patch.site.at, kind, facets, len(calls), hits, about, _sinusoid(patch.attribute.owner))
    return None


def _keys(own: Sequence[str], lent: Sequence[str]) -> Iterator[dict[str, tuple[str, ...]]]:
    """Keys from coarse to fine: sizes alone where no content counts, own content, sizes with the model's arguments."""
    sizes = dict.fromkeys(own, probe.METADATA)
    if not lent:
        yield sizes
    for count in range(1, len(own) + 1):
        for chosen in combinations(own, count):
            yield {**sizes, **dict.fromkeys(chosen, ("identity",))}
    yield {**sizes, **dict.fromkeys(lent, ("identity",))}


def _words(patch: MemoisedSite) -> str:
    return f"{patch.site.at} {type(patch.attribute.owner).__name__}"


def _sinusoid(module: torch.nn.Module) -> tuple[str, str] | None:
    """What makes the frequencies of a `Timesteps` of diffusers' once, and the fingerprint of that."""
    if type(module).__name__ != "Timesteps" or not type(module).__module__.startswith("diffusers."):
        return None
    return _SINUSOID, fingerprint(type(module).forward)
