"""What a step cache did, as rows and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

from ..findings import Finding, FindingKind
from ..spec.model import Spec
from .config import StepCache


@dataclass(frozen=True)
class StepStats:
    """One block list in one pass of the last generation.

    `steps` is how many steps ran, `cached` the numbers (from 0) of those whose middle blocks were skipped, `diffs` the
    relative L1 difference that each step's decision went by, `nbytes` what is held now. `findings` is what was noticed,
    among it why nothing was cached, and `notes` the same in words. Without a pass (`label` "") nothing has run yet.
    """

    model: str
    label: str
    blocks: str
    count: int
    fn: int
    bn: int
    steps: int = 0
    cached: tuple[int, ...] = ()
    diffs: Mapping[int, float] = field(default_factory=dict)
    nbytes: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was noticed, in words."""
        return tuple(finding.note for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON can hold it."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        findings = [each.as_dict() for each in self.findings]
        return {**plain, "diffs": dict(self.diffs), "findings": findings, "notes": list(self.notes)}

    @property
    def skipped(self) -> float:
        """The share of all block calls that was left out."""
        if not self.steps:
            return 0.0
        return len(self.cached) * (self.count - self.fn - self.bn) / (self.steps * self.count)


def why_nothing(config: StepCache, steps: int, diffs: Mapping[int, float]) -> Finding:
    """Return why no step of a pass was cached, and which threshold would have.

    `diffs` are those of each step to the one before.
    """
    return Finding(FindingKind.NOTHING_CACHED, detail=_reason(config, steps, diffs))


def too_few(config: StepCache, spec: Spec, steps: int | None) -> Finding | None:
    """Return why a generation of so many steps is left alone; None if it is not, or if nobody said how many."""
    if steps is None:
        return None
    least = config.min_steps
    if least is None:
        least = spec.step_cache.min_steps or 0
    if steps < least:
        return Finding(
            FindingKind.LEFT_UNCACHED,
            detail=f"{steps} steps are fewer than the {least} from which there is something to skip "
            f"({spec.name}); min_steps= in the step cache sets another limit",
        )
    if steps <= config.warmup and config.warmup_interval == 1:
        return Finding(FindingKind.LEFT_UNCACHED, detail=why_nothing(config, steps, {}).note)
    return None


def _reason(config: StepCache, steps: int, diffs: Mapping[int, float]) -> str:
    if config.max_cached == 0:
        return "max_cached is 0"
    if config.threshold <= 0:
        return "the threshold is 0"
    if steps <= config.warmup:
        return f"{steps} steps, all within the warm-up of {config.warmup}; a smaller warmup= would"
    found = measured(diffs)
    if not found:
        return "the mask has all steps computed"
    return (
        f"the smallest difference was {found[0]:.3g}, not below the threshold of {config.threshold:g}; "
        f"{_above(found[0])} would have cached a step, {_above(median(found))} about every second"
    )


def measured(diffs: Mapping[int, float]) -> list[float]:
    """The differences in order, without what cache-dit notes where it has measured none (0, -1 and -2)."""
    return sorted(diff for diff in diffs.values() if diff > 0)


def _above(difference: float) -> str:
    return f"{difference * 1.01:.3g}"


def text(config: StepCache, rows: Sequence[StepStats]) -> list[str]:
    """The report's lines on it."""
    lines = [f"step cache  {config}  (cache-dit's DBCache, which changes the output where it skips blocks)"]
    for row in rows:
        if not row.label:
            lines.append(f"  {row.model}  {row.blocks}  nothing has run yet")
            lines += [f"    {note}" for note in row.notes]
            continue
        diffs = measured(row.diffs)
        spread = f"  differences {diffs[0]:.3g} to {diffs[-1]:.3g}, median {median(diffs):.3g}" if diffs else ""
        steps = f": {ranges(row.cached)}" if row.cached else ""
        lines.append(
            f"  {row.model}  {row.label}  {row.blocks}: {row.count} (always run: {_computed(row)})  "
            f"{len(row.cached)} of {row.steps} steps cached{steps}  ({row.skipped:.0%} of its blocks' calls)"
            f"{spread}  held {row.nbytes / 2**20:.2f} MiB"
        )
        lines += [f"    {note}" for note in row.notes]
    return lines


def _computed(row: StepStats) -> str:
    """Return in words which blocks a cached step still computes."""
    return f"first {row.fn}" + (f", last {row.bn}" if row.bn else "")


def ranges(numbers: Sequence[int]) -> str:
    """Step numbers as one writes them: 3-5, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
