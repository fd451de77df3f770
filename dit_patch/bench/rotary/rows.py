"""A row of the benchmark, as a line of a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...outputs import replacing

_COLUMNS = "  {:<22}  {:>11}  {:>11}  {:>11}  {:>8}  {:>11}  {:>8}  {:>8}  {:>9}"
HEAD = _COLUMNS.format("", "us", "20 %", "80 %", "speedup", "exact", "GB/s", "of clone", "peak MB")


@dataclass(frozen=True)
class Row:
    """What one contestant did in one case. The order of the fields is that of the columns in the CSV.

    Attributes:
        part: of the benchmark.
        case: the name of the case, or spec and size.
        contestant: what was measured.
        dtype: of the tensors.
        shape: of one tensor.
        us: the median time for one tensor or one forward, in microseconds; None here and below: not measured.
        us_20: the time that 20 % of the calls stay below.
        us_80: the time that 80 % of the calls stay below.
        speedup: over the eager function, or over the forward without `rotary`.
        differing: the share of elements with other bits than the eager function's.
        gb_per_s: the bandwidth.
        of_clone: the share of a clone's bandwidth.
        peak_bytes: the most memory that a call takes beyond its inputs.
        note: why it was not measured.
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
        """Whether all bits are the eager function's, for a table."""
        if self.differing is None:
            return "-"
        return f"no, {self.differing:.2g}" if self.differing else "yes"

    def line(self) -> str:
        """Return the row of the table under `HEAD`."""
        if self.us is None:
            return f"  {self.contestant:<22}  {self.note}" if self.contestant else f"  {self.note}"
        times = (f"{each:,.1f}" for each in (self.us, self.us_20, self.us_80))
        speedup, speed = _shown(self.speedup, ".2f", "x"), _shown(self.gb_per_s, ".1f")
        peak = None if self.peak_bytes is None else self.peak_bytes / 1e6
        return _COLUMNS.format(
            self.contestant, *times, speedup, self.exact, speed, _shown(self.of_clone, ".0%"), _shown(peak, ",.1f")
        )


def write_json(path: Path, rows: Sequence[Row], surroundings: Mapping[str, str]) -> None:
    """Write the environment and every row."""
    content = {"environment": dict(surroundings), "rows": [asdict(row) for row in rows]}
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
