"""Run an unpatched model, and propose sites for the calls of submodules whose results repeat.

A key is proposed if no recorded call contradicts it. That is no proof: with one device, dtype and configuration much
stays the same that may change elsewhere.
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
from ...sites.surroundings import model_guards
from ...spec.address import Address
from ...spec.fingerprint import fingerprint
from ...spec.model import Site, Spec
from ..check import blocks, probe

_SINUSOID = "dit_patch.functions.sinusoid:timesteps"
_TRIVIAL = {f"torch.nn.modules.{name}" for name in ("activation", "container", "dropout")}
_ROPE = re.compile(r"rope|rotary|pos_?emb|position", re.IGNORECASE)


@dataclass(frozen=True)
class Proposal:
    """A site to begin with: how often its key repeats in the recorded calls, and what it seems to be."""

    at: str
    kind: str
    key: dict[str, list[str]]
    calls: int
    hits: int
    about: str
    use: tuple[str, str] | None = None  # a replacement, and the fingerprint of the original
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockList:
    """A list of transformer blocks: the patterns that they may follow, and in words why."""

    at: str
    patterns: list[int]
    about: str


def block_lists(model: torch.nn.Module) -> Iterator[str]:
    """Yield the paths of lists of modules of one class, as blocks are; none inside another."""
    outer: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or any(path.startswith(f"{other}.") for other in outer):
            continue
        if len(module) > 1 and len({type(each) for each in module}) == 1 and any(True for _ in module[0].children()):
            outer.append(path)
            yield path


def find_block_lists(model: torch.nn.Module, forwards: Sequence[Mapping[str, Any]]) -> list[BlockList]:
    """Return the block lists that the first forward calls, in order, each with the patterns that fit."""
    lists = []
    for path in block_lists(model):
        calls = blocks.record_block_calls(model, model.get_submodule(path), forwards[:1])
        if calls:
            fitting, why = blocks.fitting_patterns(calls)
            lists.append(BlockList(path, fitting, why))
    return lists


def propose_sites(
    model: torch.nn.Module, forwards: Sequence[Mapping[str, Any]], moments: Sequence[tuple[int, int]]
) -> list[Proposal]:
    """Propose a site for each outermost submodule outside the block lists whose results repeat."""
    lists = list(block_lists(model))
    patches = [patch for path, _ in model.named_modules() if path and (patch := _site(model, path, lists)) is not None]
    spec = Spec.model_construct(parameters=())
    recorded = probe.record_calls(model, spec, patches, forwards, moments)
    nothing: dict[str, dict[str, tuple[str, ...]]] = {patch.site.at: {} for patch in patches}
    causes = probe.missing_from_keys(model, spec, patches, forwards[0], nothing)
    latents = f"model.{next(iter(scope.parameters(model)), '')}"
    found: list[Proposal] = []
    for patch in patches:
        path = patch.site.address.path
        if any(path.startswith(f"{Address.parse(each.at).path}.") for each in found):
            continue
        [calls] = recorded[patch.site.at]
        model_arguments = [name for name in causes.get(patch.site.at, ()) if name.startswith("model.")]
        proposal = None if latents in model_arguments else _propose(patch, calls, model_arguments)
        if proposal is not None:
            found.append(proposal)
    keys = {each.at: {name: tuple(facets) for name, facets in each.key.items()} for each in found}
    chosen = [patch for patch in patches if patch.site.at in keys]
    reads = probe.missing_from_keys(model, spec, chosen, forwards[0], keys)
    return [replace(each, reads=tuple(reads.get(each.at, ()))) for each in found]


def _site(model: torch.nn.Module, path: str, lists: Sequence[str]) -> MemoisedSite | None:
    """Return a site, not installed, on the submodule's forward; None inside a block list, or if it cannot be one."""
    module = model.get_submodule(path)
    if any(f"{path}.".startswith(f"{each}.") for each in lists) or type(module).__module__ in _TRIVIAL:
        return None
    site = Site(at=f"{path}.forward", kind="context")
    binding = Binding(
        model, scope.parameters(model), takes_any=True, budget=Budget(1), check="never", guards=model_guards(model)
    )
    try:
        return MemoisedSite(binding, Attribute(site, path, module, "forward"))
    except (SiteError, ValueError):
        return None


def _propose(patch: MemoisedSite, calls: list[probe.Call], model_arguments: Sequence[str]) -> Proposal | None:
    """Propose the site with a key, if its results repeat; they change with these arguments of the model."""
    if len(calls) < 2 or len({call.result for call in calls}) == len(calls):
        return None
    own = sorted(
        {name for call in calls for name in call.facets if "." not in name and name not in call.without_tensors}
    )
    for key in _keys(own, model_arguments):
        hits = len(calls) - probe.count_keys(calls, key)
        if not hits or probe.is_contradicted(calls, key):
            continue
        timed = any("time" in name for name in (*own, *model_arguments))
        kind = "timestep" if timed and model_arguments else "rope" if _ROPE.search(_names(patch)) else "context"
        why = "kept while its inputs are" if model_arguments else "which depends on sizes alone"
        about = f"{type(patch.attribute.owner).__name__}, {why}"
        facets = {name: list(each) for name, each in key.items()}
        return Proposal(patch.site.at, kind, facets, len(calls), hits, about, _sinusoid(patch.attribute.owner))
    return None


def _keys(own: Sequence[str], model_arguments: Sequence[str]) -> Iterator[dict[str, tuple[str, ...]]]:
    """Yield keys from coarse to fine: sizes alone, the content of own arguments, sizes with the model's arguments."""
    sizes = dict.fromkeys(own, probe.METADATA)
    if not model_arguments:
        yield sizes
    for count in range(1, len(own) + 1):
        for chosen in combinations(own, count):
            yield {**sizes, **dict.fromkeys(chosen, ("identity",))}
    yield {**sizes, **dict.fromkeys(model_arguments, ("identity",))}


def _names(patch: MemoisedSite) -> str:
    return f"{patch.site.at} {type(patch.attribute.owner).__name__}"


def _sinusoid(module: torch.nn.Module) -> tuple[str, str] | None:
    """Return our replacement for diffusers' `Timesteps`, and the fingerprint of the original; else None."""
    if type(module).__name__ != "Timesteps" or not type(module).__module__.startswith("diffusers."):
        return None
    return _SINUSOID, fingerprint(type(module).forward)
