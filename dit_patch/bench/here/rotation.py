"""The rotation beside the library's own function, and against a clone of the same tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..rotary.cases import CASES
from ..rotary.contestants import CLONE, CONTESTANTS, EAGER, OURS
from ..rotary.operations import measure as measure_operations
from .results import DIFFERS, FAILED, SKIPPED, Row

_TINY = (1, 64, 2, 16)
_NAMES = ("wan-1.3b-480p", "matrix-game-2")


def rotation(part: str, device: torch.device, seconds: float, *, tiny: bool) -> Iterator[Row]:
    """Yield for each case the library's function beside ours, and our bandwidth beside a clone's."""
    for name in _NAMES:
        case = replace(CASES[name], shape=_TINY) if tiny and name == _NAMES[0] else CASES[name]
        chosen = {each: CONTESTANTS[each] for each in (EAGER, OURS, CLONE)}
        rows = {row.contestant: row for row in measure_operations(case, device, seconds / (3 * len(_NAMES)), chosen)}
        ours, eager, clone = (rows.get(each) for each in (OURS, EAGER, CLONE))
        if ours is None or ours.us is None:
            note = next((row.note for row in rows.values() if row.note), "not measured")
            yield Row(part, name, note=note if note.startswith((FAILED, SKIPPED)) else f"{SKIPPED}: {note}")
            continue
        note = DIFFERS if ours.differing else "equal bits"
        yield Row(part, name, "us", eager.us, ours.us, note)
        if clone.gb_per_s and ours.gb_per_s:
            yield Row(part, f"{name}, a clone", "GB/s", clone.gb_per_s, ours.gb_per_s, f"{ours.of_clone:.0%} of it")
