"""Which calls of a model's submodules could be kept: it is run, unpatched, and what repeats is looked at.

A key is proposed where the calls that were seen do not contradict it. That is no proof: on one device, in one dtype,
with one configuration much stays the same that may change elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from .. import scope
from ..cache import Budget
from ..check import blocks, probe
from ..errors import SiteError
from ..patch import Means, Patch
from ..source import fingerprint
from ..spec import Site, Spec

METADATA = ("shape", "dtype", "device")
SINUSOID = "dit_patch.functions.sinusoid:timesteps"
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
    source: str | None = None


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
    first = next(iter(scope.parameters(model)), "")
    found: list[Proposal] = []
    for patch in patches:
        path = patch.site.at.rpartition(".")[0]
        if any(path.startswith(f"{each.at.rpartition('.')[0]}.") for each in found):
            continue
        [calls] = recorded[patch.site.at]
        proposal = _propose(patch, calls, f"model.{first}")
        if proposal is not None:
            found.append(proposal)
    return found


def _patch(model: torch.nn.Module, path: str, lists: Sequence[str]) -> Patch | None:
    """A site on the forward of the submodule, not installed; None inside a block list, and where it has none."""
    module = model.get_submodule(path)
    if any(f"{path}.".startswith(f"{each}.") for each in lists) or type(module).__module__ in _TRIVIAL:
        return None
    site = Site(at=f"{path}.forward", kind="context")
    means = Means(parameters=scope.parameters(model), open_ended=True)
    try:
        return Patch(site, model, module, "forward", means, where=path, budget=Budget(1), check="never")
    except (SiteError, ValueError):
        return None


def _propose(patch: Patch, calls: list[probe.Call], latents: str) -> Proposal | None:
    if len(calls) < 2 or len({call.result for call in calls}) == len(calls):
        return None
    own = sorted({name for call in calls for name in call.parts if "." not in name and name not in call.plain})
    ours = any(_same(call, name, latents) for call in calls for name in own)  # called with the latents themselves
    borrowed = sorted({name for call in calls for name in call.parts if name.startswith("model.")} - {latents})
    for key in _keys(own, borrowed):
        hits = len(calls) - probe.distinct(calls, key)
        content = any("identity" in facets for facets in key.values())
        if not hits or (content and ours) or probe.contradicted(calls, key):
            continue
        module = patch.owner
        lent = [name for name in key if name.startswith("model.")]
        timed = any("time" in name for name in lent) or any("time" in name for name in own)
        kind = "timestep" if timed and content else "context" if content or not _ROPE.search(_words(patch)) else "rope"
        about = f"a {type(module).__name__}; {'depends on sizes alone' if not content else 'kept while its inputs are'}"
        facets = {name: list(each) for name, each in key.items()}
        return Proposal(patch.site.at, kind, facets, len(calls), hits, about, _sinusoid(module))
    return None


def _keys(own: Sequence[str], borrowed: Sequence[str]) -> Iterator[dict[str, tuple[str, ...]]]:
    """Keys from coarse to fine: sizes alone, own content, sizes with one or two of the model's arguments."""
    sizes = dict.fromkeys(own, METADATA)
    yield sizes
    for count in range(1, len(own) + 1):
        for chosen in combinations(own, count):
            yield {**sizes, **dict.fromkeys(chosen, ("identity",))}
    for count in (1, 2):
        for chosen in combinations(borrowed, count):
            yield {**sizes, **dict.fromkeys(chosen, ("identity",))}


def _same(call: probe.Call, name: str, other: str) -> bool:
    both = name in call.parts and other in call.parts
    return both and call.parts[name]["identity"] == call.parts[other]["identity"]


def _words(patch: Patch) -> str:
    return f"{patch.site.at} {type(patch.owner).__name__}"


def _sinusoid(module: torch.nn.Module) -> str | None:
    """The fingerprint of a `Timesteps` of diffusers', which dit_patch has a replacement for."""
    if type(module).__name__ != "Timesteps" or not type(module).__module__.startswith("diffusers."):
        return None
    return fingerprint(type(module).forward)
