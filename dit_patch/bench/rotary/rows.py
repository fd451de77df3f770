"""A row of the benchmark, and how it reads: as a line of a table, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_COLUMNS = "  {:<22}  {:>11}  {:>11}  {:>11}  {:>8}  {:>11}  {:>8}  {:>8}  {:>9}"
HEAD = _COLUMNS.format("", "us", "20 %", "80 %", "speedup", "exact", "GB/s", "of clone", "peak MB")


@dataclass(frozen=True)
class Row:
    """What one contestant did in one case; None is what was not measured, and `note` says why it was not.

    `us` is the median time for one tensor, or one forward; `speedup` is over the eager function, or the forward without
    `rotary`. `differing` is the share of elements that are not the same bits as its results, `of_clone` that of a
    clone's bandwidth, and `peak_bytes` the most memory that a call takes beyond its inputs.
    """

    part: str
    case: str
    contestant: str = ""
    dtype: str = ""
    shape: str = ""
    us: float | None = None
    us_20: float | None = None
    us_80: float | None = None
    speedup: float | None = None
    differing: float | None = None
    gb_per_s: float | None = None
    of_clone: float | None = None
    peak_bytes: int | None = None
    note: str = ""

    @property
    def exact(self) -> str:
        if self.differing is None:
            return "-"
        return f"no, {self.differing:.2g}" if self.differing else "yes"

    def line(self) -> str:
        """The row in the table under `HEAD`."""
        if self.us is None:
            return f"  {self.contestant:<22}  {self.note}" if self.contestant else f"  {self.note}"
        times = (f"{each:,.1f}" for each in (self.us, self.us_20, self.us_80))
        speedup, speed = _shown(self.speedup, ".2f", "x"), _shown(self.gb_per_s, ".1f")
        peak = None if self.peak_bytes is None else self.peak_bytes / 1e6
        return _COLUMNS.format(
            self.contestant, *times, speedup, self.exact, speed, _shown(self.of_clone, ".0%"), _shown(peak, ",.1f")
        )


def write_json(path: Path, rows: Sequence[Row], surroundings: Mapping[str, str]) -> None:
    """The environment, and every row."""
    content = {"environment": dict(surroundings), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
