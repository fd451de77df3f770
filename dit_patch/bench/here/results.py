"""The figures of `dit-patch bench here`: a row each, and the file that they are written to as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ...outputs import check_file, replacing, write_errors

FAILED, SKIPPED = "failed", "skipped"
DIFFERS = "NOT the bits of the plain model"

_LINE = "  {:<34}  {:>12}  {:>12}  {:<5} {:>7}  {}"


@dataclass(frozen=True)
class Row:
    """One figure, or why there is none.

    Attributes:
        part: its name.
        what: was measured.
        unit: of the two figures.
        plain: without patches, or what the other figure is held against.
        patched: with patches.
        note: what else there is to say.
    """

    part: str
    what: str = ""
    unit: str = ""
    plain: float | None = None
    patched: float | None = None
    note: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether something failed, or bits differ."""
        return self.note.startswith((FAILED, DIFFERS))

    def line(self) -> str:
        """Return the row of a table; of times, with plain over patched."""
        figures = ["-" if each is None else f"{each:,.3f}" for each in (self.plain, self.patched)]
        is_time = self.unit in ("ms", "us") and self.plain and self.patched
        ratio = f"{self.plain / self.patched:.2f}x" if is_time else ""
        if self.plain is None and self.patched is None:
            return f"  {self.what:<34}  {self.note}".rstrip()
        return _LINE.format(self.what, *figures, self.unit, ratio, self.note).rstrip()


class Results:
    """All rows so far, and the file that has them, if any.

    Raises:
        DitPatchError: the file cannot be written.
    """

    def __init__(self, out: Path | None, surroundings: Mapping[str, str]) -> None:
        check_file("--out", out)
        self.out, self.surroundings = out, dict(surroundings)
        self.rows: list[Row] = []

    def __repr__(self) -> str:
        return f"<Results: {len(self.rows)} rows>"

    def write(self) -> None:
        """Write everything as JSON; the file is always whole."""
        if self.out is None:
            return
        content = {"environment": self.surroundings, "rows": [asdict(row) for row in self.rows]}
        with write_errors("--out", self.out), replacing(self.out) as draft:
            draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def append_row(path: Path, row: Row) -> None:
    """Add a row to a file of one row a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of such a file; a last line that was cut off is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield Row(**json.loads(line))
