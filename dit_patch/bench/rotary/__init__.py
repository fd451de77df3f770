"""`dit-patch bench rotary`: `rotary` beside what it replaces, at the shapes of real models, then whole forwards.

`plan` is what to measure, read from the command line's options.
`cases` are the shapes, with the libraries' functions; `contestants` the ways to rotate.
`operations` measures the contestants of a case; `forwards` measures whole models with rotary sites.
`checks` looks into what only a GPU can tell.
`timing` times several ways in turns; `rows` holds the figures, and `verdict` holds them against the targets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ...errors import DitPatchError
from ...extras import version
from ...outputs import check_file, write_errors
from ...upstream.verbosity import quiet_upstream
from ..rows import CsvFile
from ..surroundings import environment
from . import checks as gpu_checks
from . import forwards
from .contestants import CONTESTANTS, IN_PLACE, OURS, Maker
from .operations import FAILED, failure, measure
from .plan import Plan
from .rows import HEAD, Row, write_json
from .verdict import verdict_lines

_PACKAGES = ("triton", "transformers", "flash-attn", "liger-kernel")
_OWN = (OURS, IN_PLACE, forwards.WITH, *gpu_checks.OPS)


def run_benchmark(
    plan: Plan,
    *,
    csv: Path | None = None,
    json: Path | None = None,
    contestants: Mapping[str, Maker] = CONTESTANTS,
) -> int:
    """Measure, print tables, and write every row.

    Returns:
        The exit status: 1 where `rotary` failed or bits of its results differ, else 0.

    Raises:
        DitPatchError: a file cannot be written, before anything is measured; or nothing could be measured.
    """
    check_file("--json", json)
    surroundings, rows = _environment(plan.device), []
    file = CsvFile(csv, Row, surroundings)
    try:
        with _threads(plan.threads), torch.no_grad():
            print("  ".join(f"{name} {value}" for name, value in surroundings.items()))
            for row in _measure(plan, contestants):
                file.add(row)
                rows.append(row)
    finally:  # what is measured is kept, whatever comes after it
        if json is not None and rows:
            with write_errors("--json", json):
                write_json(json, rows, surroundings)
    if all(row.us is None for row in rows) and not any(row.note.startswith(FAILED) for row in rows):
        reasons = "; ".join(dict.fromkeys(row.note for row in rows)) or "no case and no spec is left"
        raise DitPatchError(f"nothing was measured: {reasons}")
    print("\nWhat is asked of dit_patch", *verdict_lines(rows, plan.device), sep="\n")
    for path in (csv, json):
        if path is not None:
            print(f"\n{path}")
    return int(any(row.differing or row.note.startswith(FAILED) for row in rows if row.contestant in _OWN))


def _measure(plan: Plan, contestants: Mapping[str, Maker]) -> Iterator[Row]:
    """Print and yield the rows of all parts."""
    yield from _operations(plan, contestants)
    yield from _forwards(plan)
    if plan.checks:
        yield from _checks(plan.device)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _environment(device: torch.device) -> dict[str, str]:
    versions = {name: version(name) or "not installed" for name in _PACKAGES}
    return {**environment(str(device)), "cuda": torch.version.cuda or "none", **versions}


def _operations(plan: Plan, contestants: Mapping[str, Maker]) -> Iterator[Row]:
    for case in plan.cases:
        print(f"\n{case.name}: {case.words}; {case.shape}, {str(case.dtype).removeprefix('torch.')}, time per tensor")
        rows = measure(case, plan.device, plan.seconds, contestants)
        _print(rows)
        yield from rows
        _forget(plan.device)


def _forwards(plan: Plan) -> Iterator[Row]:
    for spec in plan.specs:
        for name, case in forwards.sizes(spec, real=plan.real_sizes).items():
            print(f"\n{spec.name} {name}: time per forward")
            try:
                with quiet_upstream():
                    rows = forwards.measure(spec, name, case, plan.device, plan.seconds, plan.layers)
            except ImportError as error:
                rows = [Row("forwards", f"{spec.name} {name}", forwards.WITH, note=f"skipped: {error}")]
            except Exception as error:
                rows = [Row("forwards", f"{spec.name} {name}", forwards.WITH, note=failure(error))]
            _print(rows)
            yield from rows
            _forget(plan.device)


def _checks(device: torch.device) -> Iterator[Row]:
    print("\nOn a GPU")
    for row in gpu_checks.run_checks(device):
        print(f"  {row.case}, {row.contestant}: {row.note or row.exact}")
        yield row


def _print(rows: Sequence[Row]) -> None:
    if any(row.us is not None for row in rows):
        print(HEAD)
    print(*(row.line() for row in rows), sep="\n")


def _forget(device: torch.device) -> None:
    """Free what was compiled and allocated for one case before the next."""
    if "torch._dynamo" in sys.modules:  # not to be imported for this
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
