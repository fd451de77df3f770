"""What a step cache did, as rows and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from .config import StepCache


@dataclass(frozen=True)
class StepStats:
    """One block list in one pass of the last generation.

    `steps` is how many steps ran, `cached` the numbers (from 0) of those whose middle blocks were skipped, `diffs` the
    relative L1 difference that each step's decision went by, `nbytes` what is held now. `notes` says what there is to
    say, among it why nothing was cached. Without a pass (`label` "") nothing has run yet.
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
    notes: tuple[str, ...] = ()

    @property
    def skipped(self) -> float:
        """The share of all block calls that was left out."""
        if not self.steps:
            return 0.0
        return len(self.cached) * (self.count - self.fn - self.bn) / (self.steps * self.count)


def why_nothing(config: StepCache, steps: int, diffs: Mapping[int, float]) -> str:
    """Why no step of a pass was cached, and which threshold would have; `diffs` of each step to the one before."""
    if config.max_cached == 0:
        return "nothing cached: max_cached is 0"
    if config.threshold <= 0:
        return "nothing cached: the threshold is 0"
    if steps <= config.warmup:
        return f"nothing cached: {steps} steps, all within the warm-up of {config.warmup}; a smaller warmup= would"
    found = measured(diffs)
    if not found:
        return "nothing cached: the mask has all steps computed"
    return (
        f"nothing cached: the smallest difference was {found[0]:.3g}, not below the threshold of "
        f"{config.threshold:g}; {_above(found[0])} would have cached a step, {_above(median(found))} about "
        "every second"
    )


def measured(diffs: Mapping[int, float]) -> list[float]:
    """The differences in order, without what cache-dit notes where it has measured none (0, -1 and -2)."""
    return sorted(diff for diff in diffs.values() if diff > 0)


def _above(difference: float) -> str:
    return f"{difference * 1.01:.3g}"


def text(config: StepCache, rows: Sequence[StepStats]) -> list[str]:
    """The report's lines on it."""
    lines = [f"step cache  {config}  (cache-dit's DBCache; the output differs from the uncached one)"]
    for row in rows:
        if not row.label:
            lines.append(f"  {row.model}  {row.blocks}  nothing has run yet")
            lines += [f"    {note}" for note in row.notes]
            continue
        diffs = measured(row.diffs)
        spread = f"  differences {diffs[0]:.3g} to {diffs[-1]:.3g}, median {median(diffs):.3g}" if diffs else ""
        steps = f": {ranges(row.cached)}" if row.cached else ""
        lines.append(
            f"  {row.model}  {row.label}  {row.blocks} F{row.fn}B{row.bn} of {row.count}  "
            f"{len(row.cached)} of {row.steps} steps cached{steps}  ({row.skipped:.0%} of its blocks' calls)"
            f"{spread}  held {row.nbytes / 2**20:.2f} MiB"
        )
        lines += [f"    {note}" for note in row.notes]
    return lines


def ranges(numbers: Sequence[int]) -> str:
    """Step numbers as one writes them: 3-5, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
