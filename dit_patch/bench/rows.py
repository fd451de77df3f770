"""Rows of benchmarks, each a dataclass whose fields are the columns of the CSV in that order."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..outputs import check_file, write_errors


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


class CsvFile:
    """A CSV of rows of one dataclass, which has each row as soon as it is measured.

    The columns are the dataclass's fields in their order, then the surroundings. The file is begun with the first row.

    Args:
        path: of the file; None for no file.
        flag: that the user gave the path with, for messages.

    Raises:
        DitPatchError: the file cannot be written; here, or while rows are added.
    """

    def __init__(self, path: Path | None, kind: type, surroundings: Mapping[str, str], flag: str = "--csv") -> None:
        check_file(flag, path)
        self.path, self._flag, self._surroundings = path, flag, surroundings
        self._columns = [*(field.name for field in fields(kind)), *surroundings]
        self._is_begun = False

    def __repr__(self) -> str:
        return f"<CsvFile {self.path}>"

    def add(self, row: Any) -> None:
        """Write one row."""
        if self.path is None:
            return
        mode = "a" if self._is_begun else "w"
        with write_errors(self._flag, self.path), self.path.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            if not self._is_begun:
                writer.writeheader()
            writer.writerow({**asdict(row), **self._surroundings})
        self._is_begun = True
