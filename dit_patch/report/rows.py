"""The rows of the report: data that outlives the handle which it is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import Any

from ..findings import Finding, FindingKind
from ..step_cache.stats import StepStats

_NEVER_HIT = {"timestep": FindingKind.NEVER_HIT_TIMESTEP, "context": FindingKind.NEVER_HIT_CONTEXT}


@dataclass(frozen=True)
class SiteStats:
    """One site of one model.

    `targets` is the number of attributes that the site stands for. `bypassed` counts the calls that were passed
    through, by reason. `nbytes` is what its results hold now. `seconds_saved` is hits times the shortest host time of
    computing one (on a GPU: of launching it). `findings` is what was noticed, and `notes` the same in words. `fixed`
    says that an upstream mistake is corrected, which may change results. `is_replacement` says that the site is no
    cache: a hit is a call of the replacement, and nothing is said of the time.
    """

    model: str
    model_class: str
    spec: str
    at: str
    kind: str
    targets: int
    hits: int
    misses: int
    bypassed: Mapping[str, int] = field(default_factory=dict)
    evictions: int = 0
    nbytes: int = 0
    seconds_saved: float = 0.0
    findings: tuple[Finding, ...] = ()
    fixed: bool = False
    is_replacement: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What was noticed, in words."""
        return tuple(finding.note for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON can hold it."""
        findings = [each.as_dict() for each in self.findings]
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**plain, "bypassed": dict(self.bypassed), "findings": findings, "notes": list(self.notes)}


@dataclass(frozen=True)
class Rows:
    """All rows of one handle: of its sites, and of its step caches."""

    sites: tuple[SiteStats, ...] = ()
    steps: tuple[StepStats, ...] = ()

    def with_rank(self, rank: int) -> Rows:
        """Return the same rows, with the rank in the name of each model."""

        def renamed(rows: Iterable) -> tuple:
            return tuple(replace(row, model=f"rank {rank}: {row.model}") for row in rows)

        return Rows(renamed(self.sites), renamed(self.steps))

    def since(self, before: Rows) -> Rows:
        """Return only what has come after `before`."""
        earlier = {(row.model, row.at): row for row in before.sites}
        sites = (_difference(row, earlier.get((row.model, row.at))) for row in self.sites)
        return Rows(tuple(sites), tuple(row for row in self.steps if row not in before.steps))

    @property
    def has_calls(self) -> bool:
        """Whether any site or block list was called."""
        return bool(self.steps) or any(row.hits or row.misses or row.bypassed for row in self.sites)

    @property
    def nbytes(self) -> int:
        """Bytes that the results of all sites hold."""
        return sum(row.nbytes for row in self.sites)


def site_stats(
    model: str,
    module: Any,
    spec: str,
    site: Any,
    patches: Sequence,
    noticed: Finding | None,
    *,
    was_called: bool,
) -> SiteStats:
    """Return the row of one site, summed over the attributes that it stands for.

    Args:
        patches: those of the site, one for each attribute.
        noticed: what was noticed when the site was bound, or in forwards.
        was_called: whether the model has been called at all.
    """
    memos = [patch.memo for patch in patches]
    hits, misses = sum(memo.cache.hits for memo in memos), sum(memo.cache.misses for memo in memos)
    evictions = sum(memo.cache.evictions for memo in memos)
    bypassed = sum((memo.bypassed for memo in memos), Counter())
    fixed = any(patch.fixes for patch in patches)
    findings = [] if noticed is None else [noticed]
    if fixed:
        bound = [f"{name} is the forward's {of.partition('.')[2]}" for name, of in site.bind.items()]
        findings += [Finding(FindingKind.FIXED, site.at, each) for each in bound]
    findings += [Finding(FindingKind.SWITCHED_OFF, site.at, memo.off.note) for memo in memos if memo.off][:1]
    findings += _bypassed(site.at, bypassed)
    if site.key and misses > 1 and not hits:
        findings.append(Finding(_NEVER_HIT.get(site.kind, FindingKind.NEVER_HIT), site.at))
    if site.unused:
        findings.append(Finding(FindingKind.STAND_IN, site.at))
    if patches and was_called and not findings and not (hits or misses):
        findings.append(Finding(FindingKind.NOT_CALLED, site.at))
    if evictions:
        findings.append(Finding(FindingKind.EVICTED, site.at, count=evictions))
    return SiteStats(
        model=model,
        model_class=type(module).__name__,
        spec=spec,
        at=site.at,
        kind=site.kind,
        targets=len(memos),
        hits=hits,
        misses=misses,
        bypassed=dict(bypassed),
        evictions=evictions,
        nbytes=sum(memo.cache.nbytes for memo in memos),
        seconds_saved=sum(memo.cache.hits * memo.seconds for memo in memos if isfinite(memo.seconds)),
        findings=tuple(findings),
        fixed=fixed,
        is_replacement=bool(site.use) and not site.key,
    )


def _bypassed(at: str, reasons: Counter[str]) -> list[Finding]:
    return [Finding(FindingKind.BYPASSED, at, reason, count) for reason, count in reasons.most_common()]


def _difference(row: SiteStats, before: SiteStats | None) -> SiteStats:
    if before is None:
        return row
    bypassed = Counter(row.bypassed) - Counter(before.bypassed)
    others = (each for each in row.findings if each.kind is not FindingKind.BYPASSED)
    return replace(
        row,
        hits=row.hits - before.hits,
        misses=row.misses - before.misses,
        bypassed=dict(bypassed),
        evictions=row.evictions - before.evictions,
        seconds_saved=row.seconds_saved - before.seconds_saved,
        findings=(*others, *_bypassed(row.at, bypassed)),
    )
