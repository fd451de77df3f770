"""`dit-patch bench here`: what patching brings on this machine, in a few minutes, the most telling part first.

`parts` are what is measured, each in a process of its own, see `child`: it is bounded in time, and one that fails
stops no other. `targets` are the models at real size, `whole_forwards` measures them, `captured_forward` one as a CUDA
graph, and `rotation` the rotation alone. `results` holds the figures, and writes them as they come.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ...errors import DitPatchError, quote, suggest
from ..surroundings import environment
from .parts import PARTS
from .results import FAILED, SKIPPED, Results, Row, read_rows

MINUTES = 8.0
_LEAST = 5.0  # seconds, in which no part gets anywhere


def run_benchmark(
    minutes: float = MINUTES,
    device: str | None = None,
    out: Path | None = None,
    only: Sequence[str] | None = None,
    *,
    tiny: bool = False,
) -> int:
    """Measure part after part, print each row, and write all of them to `out` (JSON) whenever a part has ended.

    Args:
        minutes: what all parts may take together.
        device: by default cuda.
        only: names of parts; all by default.
        tiny: run the tiny models of the specs instead of real sizes, on any device: figures then say nothing.

    Returns:
        The exit status: 1 where a part failed, a patched output differs from the plain one, or nothing could be
        measured at all; else 0.

    Raises:
        DitPatchError: an option cannot be had; nothing is measured then.
    """
    chosen = _chosen(only)
    place = _device(device, tiny=tiny)
    results = Results(out, {**environment(str(place)), "minutes": f"{minutes:g}"})
    print("  ".join(f"{name} {value}" for name, value in results.surroundings.items()))
    print("Tiny models: the figures are of toys, and say nothing of real sizes." if tiny else "Real sizes.")
    end = time.monotonic() + 60 * minutes
    for number, name in enumerate(chosen):
        remaining = end - time.monotonic()
        # What a part leaves goes to those after it; a slow one may take half as much again as its share.
        limit = min(remaining, 1.5 * remaining / (len(chosen) - number))
        print(f"\n{name}: {PARTS[name].title}")
        for row in _run(name, place, limit, tiny=tiny):
            results.rows.append(row)
            print(row.line(), flush=True)
        results.write()
    if out is not None:
        print(f"\n{out}")
    if all(row.note.startswith(SKIPPED) for row in results.rows):
        print("nothing was measured: see the reasons above", file=sys.stderr)
        return 1
    return int(any(row.is_bad for row in results.rows))


def _chosen(names: Sequence[str] | None) -> list[str]:
    for name in names or ():
        if name not in PARTS:
            raise DitPatchError(f"--only: no part {quote(name)}{suggest(name, PARTS)} Parts: {', '.join(PARTS)}.")
    return [name for name in PARTS if not names or name in names]


def _device(name: str | None, *, tiny: bool) -> torch.device:
    try:
        device = torch.device(name or "cuda")
    except RuntimeError as error:
        raise DitPatchError(f"--device: torch knows no device {quote(str(name))}") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        there = f"there are {torch.cuda.device_count()}" if torch.cuda.is_available() else "torch finds no GPU here"
        raise DitPatchError(f"--device: no {quote(str(device))}; {there}. Without one: --tiny --device cpu")
    if device.type != "cuda" and not tiny:
        raise DitPatchError(f"--device: real sizes take hours on {quote(str(device))}; add --tiny for a dry run")
    return device


def _run(name: str, device: torch.device, limit: float, *, tiny: bool) -> Iterator[Row]:
    """Yield the rows of one part, which a process of its own measures within `limit` seconds."""
    if limit < _LEAST:
        yield Row(name, note=f"{SKIPPED}: no time is left")
        return
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder, "rows"), Path(folder, "log")
        command = [sys.executable, "-m", f"{__name__}.child", name, str(device), f"{limit:.1f}", str(rows)]
        with log.open("w") as output:
            process = subprocess.Popen([*command, *(["--tiny"] if tiny else [])], stdout=output, stderr=output)
            try:
                status = process.wait(limit)
                note = "" if status == 0 else f"{FAILED}: {_last_line(log) or f'exit status {status}'}"
            except subprocess.TimeoutExpired:
                note = f"{SKIPPED}: cut off after its {limit:.0f} s"
            finally:
                process.kill()
                process.wait()
        yield from read_rows(rows)
        if note:
            yield Row(name, note=note)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
