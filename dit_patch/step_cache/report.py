"""What a step cache has to report of one model: rows, what was noticed, and what is warned of at a generation's end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import torch

from ..findings import Finding, FindingKind, warn
from ..upstream.cache_dit_internals import held_bytes
from .block_list import CachedBlockList
from .config import StepCache
from .stats import StepStats, measured, why_nothing


class StepCacheReport:
    """Counts and notes what happens to the step cache of one model, and says what nobody should miss.

    Args:
        name: the model's name in the pipeline.
        label: what messages call the model.
    """

    def __init__(self, name: str, label: str, config: StepCache, block_lists: Sequence[CachedBlockList]) -> None:
        self.name, self.label, self.config, self.block_lists = name, label, config, block_lists
        #: How many steps the generation that is running, or about to begin, was said to have.
        self.announced_steps: int | None = None
        #: Forwards that did not come by our layer.
        self.unseen_forwards = 0
        #: Why the last generation was left alone, if it was.
        self._uncached: Finding | None = None
        self._findings: dict[Finding, None] = {}
        #: Rows of a generation whose memory was given up.
        self._kept_rows: list[StepStats] = []

    def __repr__(self) -> str:
        return f"<StepCacheReport of {self.label}: {len(self._findings)} findings>"

    def note(self, kind: FindingKind, detail: str = "") -> None:
        """Note something for the report, once."""
        self._findings[Finding(kind, self.label, detail)] = None

    def warn(self, kind: FindingKind, detail: str = "") -> None:
        """Warn of something."""
        warn(Finding(kind, self.label, detail), stacklevel=2)

    def begin(self, uncached: Finding | None) -> None:
        """Begin a generation, which is left alone for the reason that is given."""
        self._kept_rows, self._uncached = [], uncached
        if uncached is not None:
            self.warn(uncached.kind, uncached.detail)

    def check_displaced(self) -> None:
        """Warn if forwards did not come by our layer."""
        if self.unseen_forwards > 0:
            self.warn(FindingKind.FORWARD_REPLACED)
        self.unseen_forwards = 0

    def finish(self, *, is_uncached: bool) -> None:
        """End a generation: warn if nothing of it was cached, though it was asked for."""
        self.announced_steps = None
        rows = [row for row in self.rows() if row.steps]
        is_asked_for = self.config.threshold and self.config.max_cached != 0
        if rows and is_asked_for and not is_uncached and not any(row.cached for row in rows):
            nearest = min(rows, key=lambda row: min(measured(row.diffs), default=inf))
            self.warn(nearest.findings[0].kind, nearest.findings[0].detail)

    def forget_forwards(self) -> None:
        """Forget what was announced and counted: the generation has failed."""
        self.announced_steps, self.unseen_forwards = None, 0

    def keep_rows(self) -> None:
        """Keep the rows of what is about to be given up."""
        self._kept_rows = [replace(row, nbytes=0) for row in self.rows()]

    def note_memory(self, device: torch.device) -> None:
        """Note what the step cache will hold, and warn if two passes are more than is free on the device."""
        estimate = sum(each.estimate(self.config) for each in self.block_lists)
        self.note(FindingKind.MEMORY, f"{estimate / 2**20:.1f} MiB")
        if device.type == "cuda" and 2 * estimate > torch.cuda.mem_get_info(device)[0]:
            self.warn(FindingKind.LITTLE_MEMORY, f"{2 * estimate / 2**30:.1f} GiB")

    def rows(self) -> list[StepStats]:
        """Return a row per block list and pass of the last generation."""
        rows = [self._row(each, label) for each in self.block_lists for label in each.contexts]
        return rows or self._kept_rows or [self._row(each, "") for each in self.block_lists]

    def _row(self, block_list: CachedBlockList, label: str) -> StepStats:
        context = block_list.contexts.get(label)
        fn, bn = self.config.blocks(len(block_list.blocks), block_list.label)
        row = StepStats(self.name, label, block_list.name, len(block_list.blocks), fn, bn)
        if context is None:
            findings = [self._uncached] if self._uncached else []
            if not findings and self.unseen_forwards > 0:
                findings = [Finding(FindingKind.FORWARD_REPLACED, self.label)]
            return replace(row, findings=(*findings, *self._findings))
        steps, cached = context.executed_steps, tuple(context.cached_steps)
        diffs = {int(step): diff for step, diff in context.residual_diffs.items()}
        findings = [] if cached else [why_nothing(self.config, steps, diffs)]
        return replace(
            row,
            steps=steps,
            cached=cached,
            diffs=diffs,
            nbytes=held_bytes(context),
            findings=(*findings, *self._findings),
        )
