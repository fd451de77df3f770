"""What a handle did, as rows and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

from ..step_cache import StepCache
from ..step_cache.stats import StepStats
from ..step_cache.stats import text as step_text

_NEVER_HIT = {
    "timestep": "never hit: the timestep is a new tensor at each forward, as it is without CFG",
    "context": "never hit: the conditioning is a new tensor at each forward",
}


@dataclass(frozen=True)
class SiteStats:
    """One site of one model.

    `targets` is the number of attributes it stands for, `bypassed` counts calls passed through by reason, `nbytes` is
    what its results hold now, `seconds_saved` is hits times the shortest host time of computing
    one (on a GPU: of launching it). `fixed` says that an upstream mistake is corrected, which may change results.
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
    notes: tuple[str, ...] = ()
    fixed: bool = False


@dataclass(frozen=True)
class Rows:
    """All that a handle reports, as data that outlives it."""

    sites: tuple[SiteStats, ...] = ()
    steps: tuple[StepStats, ...] = ()

    @classmethod
    def of(cls, handle: Any) -> Rows:
        return cls(tuple(handle.stats()), tuple(handle.step_stats()))

    def of_rank(self, rank: int) -> Rows:
        """The same, with the rank in each row."""

        def named(rows: Iterable) -> tuple:
            return tuple(replace(row, model=f"rank {rank}: {row.model}") for row in rows)

        return Rows(named(self.sites), named(self.steps))

    def since(self, before: Rows) -> Rows:
        """Only what has come after `before`."""
        known = {(row.model, row.at): row for row in before.sites}
        sites = (_difference(row, known.get((row.model, row.at))) for row in self.sites)
        return Rows(tuple(sites), tuple(row for row in self.steps if row not in before.steps))

    @property
    def anything(self) -> bool:
        """Whether the model was called at all."""
        return bool(self.steps) or any(row.hits or row.misses or row.bypassed for row in self.sites)

    @property
    def nbytes(self) -> int:
        """Bytes that the results of all sites hold."""
        return sum(row.nbytes for row in self.sites)


def site_stats(
    model: str, module: Any, spec: str, site: Any, patches: Sequence, notes: Mapping[str, str], *, ran: bool
) -> SiteStats:
    """The row of one site, summed over the attributes that it stands for; `ran`: the model has been called."""
    memos = [patch.memo for patch in patches]
    hits, misses = sum(memo.cache.hits for memo in memos), sum(memo.cache.misses for memo in memos)
    bypassed = sum((memo.bypassed for memo in memos), Counter())
    fixed = any(patch.fixes for patch in patches)
    said = [notes[site.at]] if site.at in notes else []
    said += [f"fix on: {name} is the forward's {of.partition('.')[2]}" for name, of in site.bind.items() if fixed]
    said += [f"switched off: {memo.off}" for memo in memos if memo.off][:1]
    said += _bypassed(bypassed)
    if site.key and misses > 1 and not hits:
        said.append(_NEVER_HIT.get(site.kind, "never hit: something in its key differs at each call"))
    if site.unused:
        said.append("never read: a stand-in is handed out")
    if patches and ran and not said and not (hits or misses):
        said.append("not called so far")
    evictions = sum(memo.cache.evictions for memo in memos)
    if evictions:
        said.append(f"{evictions} results given up for others; a larger max_bytes would keep them")
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
        notes=tuple(said),
        fixed=fixed,
    )


def _bypassed(reasons: Counter[str]) -> list[str]:
    return [f"bypassed {count}: {reason}" for reason, count in reasons.most_common()]


def _difference(row: SiteStats, before: SiteStats | None) -> SiteStats:
    if before is None:
        return row
    bypassed, earlier = Counter(row.bypassed), Counter(before.bypassed)
    return replace(
        row,
        hits=row.hits - before.hits,
        misses=row.misses - before.misses,
        bypassed=dict(bypassed - earlier),
        evictions=row.evictions - before.evictions,
        seconds_saved=row.seconds_saved - before.seconds_saved,
        notes=(*(note for note in row.notes if note not in _bypassed(bypassed)), *_bypassed(bypassed - earlier)),
    )


def text(
    rows: Sequence[SiteStats],
    max_bytes: int,
    nbytes: int,
    step_cache: StepCache | None = None,
    steps: Sequence[StepStats] = (),
) -> str:
    """The report: a row per site, its notes below it; and what the step cache did."""
    width = max((len(_short(row.at)) for row in rows), default=4)
    fixed = any(row.fixed for row in rows)
    kind = "fixes on (where they apply, results differ from upstream's)" if fixed else "lossless"
    if step_cache is not None:
        kind = f"step caching on (the output is another); all else {kind}"
    lines = [f"dit_patch: {kind}, {_mib(nbytes)} cached of {_mib(max_bytes)}"]
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        lines.append(f"{model}  {own[0].model_class}  spec {own[0].spec}")
        lines.append(
            f"  {'kind':<8}  {'site':<{width}}  {'hits':>6}  {'misses':>6}  {'bypassed':>8}  {'held':>10}  saved"
        )
        for row in own:
            count = sum(row.bypassed.values())
            lines.append(
                f"  {row.kind:<8}  {_short(row.at):<{width}}  {row.hits:>6}  {row.misses:>6}  {count or '-':>8}  "
                f"{_mib(row.nbytes):>10}  {row.seconds_saved * 1e3:.1f} ms"
            )
            lines += [f"  {'':<8}    {note}" for note in row.notes]
    if step_cache is not None:
        lines += step_text(step_cache, steps)
    return "\n".join(lines)


def _short(at: str) -> str:
    """The address as a row shows it: of a function inside a method, without the path to it."""
    module, _, path = at.partition(":")
    if "<locals>" not in path:
        return at
    return f"{module.rpartition('.')[2]}:{path.partition('.')[0]}...{path.rpartition('.')[2]}"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f} MiB"
