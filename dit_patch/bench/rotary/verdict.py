"""The targets that `rotary` was built to reach, held against the rows of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from .contestants import COMPILE, EAGER, FLASH, OURS
from .rows import Row

CPU_CASES = ("wan-1.3b-480p", "wan-1.3b-480p-fp32")
"""The cases that have a target on a CPU."""


def verdict_lines(rows: Sequence[Row], device: torch.device) -> Iterator[str]:
    """Yield a line for each target: how many cases reach it, and which do not."""
    by_case = {(row.case, row.contestant): row for row in rows if row.part == "ops" and row.us is not None}
    ours = {case: row for (case, contestant), row in by_case.items() if contestant == OURS}

    def speedup(over: str) -> dict[str, float]:
        return {case: by_case[case, over].us / row.us for case, row in ours.items() if (case, over) in by_case}

    if device.type == "cuda":
        bandwidth = {case: row.of_clone for case, row in ours.items() if row.of_clone is not None}
        yield _reached("70 % of a clone's bandwidth", bandwidth, 0.7)
        yield _reached("as fast as torch.compile", speedup(COMPILE), 1.0)
        yield _reached("1.25x as fast as flash-attn", speedup(FLASH), 1.25)
    else:
        asked = {case: value for case, value in speedup(EAGER).items() if case in CPU_CASES}
        yield _reached("3x as fast as eager at Wan 1.3B, 480p", asked, 3.0)


def _reached(words: str, values: Mapping[str, float], least: float) -> str:
    missed = [f"{case} ({value:.2f})" for case, value in values.items() if value < least]
    counted = f"{len(values) - len(missed)} of {len(values)} cases" if values else "not measured"
    return f"  at least {words}: {counted}" + (f"; not in {', '.join(missed)}" if missed else "")
