"""Which sites the forwards of a model reach, so that a site at which nothing is cached is never silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..findings import Finding, FindingKind
from ..sites import resolve
from ..sites.patch import Patch
from ..sites.scope import Frame
from ..spec.address import Address, AttributeAddress, SpanAddress, StageAddress
from ..upstream.torch_internals import is_compiled


class Reach:
    """Which sites of one model its forwards have reached; `sites` has their patches, by address."""

    def __init__(self, model: torch.nn.Module, sites: Mapping[str, Sequence[Patch]]) -> None:
        self.model, self.sites = model, sites
        #: Sites that some forward has reached.
        self.reached: set[str] = set()
        #: Sites of which it was said that they were not reached.
        self.reported: set[str] = set()
        #: Whether a site that was not reached is inside compiled code.
        self.compiled: dict[str, bool] = {}

    def __repr__(self) -> str:
        return f"<Reach of {type(self.model).__name__}: {len(self.reached)} of {len(self.sites)} sites>"

    def findings(self, frame: Frame) -> list[Finding]:
        """Return what there is to say of the sites that the forward did not reach; what is warned of, once."""
        found = (self._finding(frame, at, patches) for at, patches in self.sites.items())
        return [each for each in found if each is not None]

    def forget(self) -> list[str]:
        """Begin anew after a repair; returns the addresses of the sites that were reported."""
        reported = list(self.reported)
        self.reported.clear()
        self.compiled.clear()
        return reported

    def _finding(self, frame: Frame, at: str, patches: Sequence[Patch]) -> Finding | None:
        if at in self.reported:
            return None
        if any(patch in frame.calls for patch in patches):
            self.reached.add(at)
            return None
        if isinstance(patches[0].site.address, StageAddress):  # the pipeline calls it, outside of forwards
            return None
        kind = FindingKind.UNREACHED
        if any(patch.is_displaced for patch in patches):
            kind = FindingKind.DISPLACED
        elif any(patch.is_replaced for patch in patches):
            kind = FindingKind.REPLACED
        elif at in self.reached:  # a site inside another is called only where that one has no result
            return None
        elif self._is_compiled(at):
            return Finding(FindingKind.COMPILED, at)
        elif patches[0].site.optional:
            return None
        self.reported.add(at)
        return Finding(kind, at, type(self.model).__name__)

    def _is_compiled(self, at: str) -> bool:
        """Return whether the site, which was not reached, is inside compiled code; looked up once."""
        if at not in self.compiled:
            self.compiled[at] = _is_inside_compiled_code(self.model, Address.parse(at))
        return self.compiled[at]


def _is_inside_compiled_code(model: torch.nn.Module, address: Address) -> bool:
    match address:
        case AttributeAddress(path=path) | SpanAddress(start=path):
            pass
        case _:
            # Who calls a global cannot be told from outside.
            return any(map(is_compiled, model.modules()))
    if "*" in path:
        owners = resolve.branches(model, path, str(address))
        return all(resolve.is_compiled_along(model, resolve.fill_stars(path, stars)) for _, stars in owners)
    return bool(path) and resolve.is_compiled_along(model, path)
