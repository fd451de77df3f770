"""Rows of benchmarks, each a dataclass whose fields are the columns of the CSV in that order."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """One comparison. The order of the fields is that of the columns in the CSV.

    Attributes:
        part: of the benchmark.
        spec: the name of the spec.
        case: the sizes that were used.
        what: the site, or what else was measured.
        unit: of the three figures.
        plain: the median without patches.
        patched: the median with patches.
        spread: the interquartile range of `patched`.
    """

    part: str
    spec: str
    case: str
    what: str
    unit: str
    plain: float
    patched: float
    spread: float = 0.0


def write_csv(path: Path, kind: type, rows: Iterable[Any], surroundings: Mapping[str, str]) -> None:
    """Write rows of that dataclass; the columns are its fields in their order, then the surroundings."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(kind)), *surroundings])
        writer.writeheader()
        writer.writerows({**asdict(row), **surroundings} for row in rows)
