"""`dit-patch bench rotary`: `rotary` beside what it replaces, at the shapes of real models, then whole forwards.

`cases` are the shapes, with the libraries' functions; `contestants` the ways to rotate.
`operations` measures the contestants of a case; `forwards` measures whole models with rotary sites.
`checks` looks into what only a GPU can tell.
`timing` times several ways in turns; `rows` holds the figures, and `verdict` holds them against the targets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from ...errors import DitPatchError, quote, suggest
from ...pipelines import loading
from ...spec.model import Spec
from ...spec.registry import Registry
from ...upstream.verbosity import quiet_upstream
from ..rows import write_csv
from ..surroundings import choose, environment, installed, version
from . import checks as gpu_checks
from . import forwards
from .cases import CASES, Case
from .contestants import CONTESTANTS, IN_PLACE, OURS, Maker
from .operations import FAILED, failure, measure
from .rows import HEAD, Row, write_json
from .verdict import verdict_lines

PARTS = ("ops", "forwards")
_PACKAGES = ("triton", "transformers", "flash-attn", "liger-kernel")
_OWN = (OURS, IN_PLACE, forwards.WITH, *gpu_checks.OPS)


def run(
    names: Sequence[str] = (),
    *,
    parts: Sequence[str] = PARTS,
    everything: bool = False,
    device: str | None = None,
    threads: int | None = None,
    seconds: float = 0.5,
    layers: int | None = None,
    checks: bool = False,
    csv: Path | None = None,
    json: Path | None = None,
    cases: Mapping[str, Case] = CASES,
    contestants: Mapping[str, Maker] = CONTESTANTS,
) -> int:
    """Measure, print tables, and write every row; 1 where bits of `rotary` differ, or it failed, and 0 otherwise.

    Args:
        names: of cases, or of specs or libraries whose forwards to measure; by default all that the device is fit for.
        parts: which of PARTS.
        everything: also what takes minutes on a CPU.
        threads: of the CPU.
        seconds: to time each contestant for.
        layers: of the models whose forwards are measured; by default as many as the spec says.
        checks: also what only a GPU can tell.

    Raises:
        DitPatchError: a name, a device, a number or a file that will not do; before anything is measured.
    """
    place = _device(device)
    everything = everything or place.type == "cuda"
    if checks and place.type != "cuda":
        raise DitPatchError(f"--checks: they need a CUDA device, not {quote(place)}")
    _at_least_one(threads=threads, layers=layers)
    chosen, specs = _choose(names, cases, Registry(), everything)
    for flag, path in (("--csv", csv), ("--json", json)):
        _writable(flag, path)
    rows: list[Row] = []
    with _threads(threads), torch.no_grad():
        about = _environment(place)
        print("  ".join(f"{name} {value}" for name, value in about.items()))
        if "ops" in parts:
            rows += _ops(chosen, place, seconds, contestants)
        if "forwards" in parts:
            rows += _forwards(specs, place, seconds, layers, everything)
        if checks:
            rows += _checks(place)
    print("\nWhat is asked of dit_patch", *verdict_lines(rows, place), sep="\n")
    _write(rows, about, csv, json)
    return int(any(row.differing or row.note.startswith(FAILED) for row in rows if row.contestant in _OWN))


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(rows: Sequence[Row], about: Mapping[str, str], csv: Path | None, json: Path | None) -> None:
    for write, path in ((partial(write_csv, kind=Row), csv), (write_json, json)):
        if path is not None:
            write(path, rows=rows, surroundings=about)
            print(f"\n{path}")


def _choose(
    names: Sequence[str], cases: Mapping[str, Case], registry: Registry, everything: bool
) -> tuple[list[Case], list[Spec]]:
    """Return the cases and the specs to measure.

    Raises:
        DitPatchError: a name of neither, or no spec with anything to measure.
    """
    if not names:
        fit = [case for case in cases.values() if everything or not case.big]
        return fit, [spec for spec in registry if forwards.concerned(spec) and installed(spec)]
    libraries_and_specs = {*registry.names(), *(name.partition("/")[0] for name in registry.names())}
    for name in names:
        if name not in libraries_and_specs.union(cases):
            near = suggest(name, (*cases, *libraries_and_specs))
            raise DitPatchError(f"{quote(name)} is no case and no spec{near}\n    Cases: {', '.join(cases)}.")
    others = [name for name in names if name not in cases]
    specs = list(filter(forwards.concerned, choose(registry, others))) if others else []
    if others and not specs:
        raise DitPatchError(f"{', '.join(map(quote, others))}: no sites of kind {forwards.KIND}, so nothing to compare")
    return [cases[name] for name in dict.fromkeys(names) if name in cases], specs


def _device(word: str | None) -> torch.device:
    """Return the device; make a GPU the current one.

    Raises:
        DitPatchError: it is not there, or there is no clock for it.
    """
    device = loading.device(word)
    if device.type not in ("cpu", "cuda"):
        raise DitPatchError(f"--device: this measures on a CPU or a CUDA device, not on {quote(device)}")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def _environment(device: torch.device) -> dict[str, str]:
    versions = {name: version(name) or "not installed" for name in _PACKAGES}
    return {**environment(str(device)), "cuda": torch.version.cuda or "none", **versions}


def _at_least_one(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise DitPatchError(f"--{name}: {number} is less than 1")


def _writable(flag: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, rather than lose what it is for."""
    if path is None:
        return
    try:
        path.open("a").close()
    except OSError as error:
        raise DitPatchError(f"{flag}: {quote(path)} cannot be written: {error.strerror or error}") from error


def _ops(
    cases: Iterable[Case], device: torch.device, seconds: float, contestants: Mapping[str, Maker]
) -> Iterator[Row]:
    for case in cases:
        print(f"\n{case.name}: {case.words}; {case.shape}, {str(case.dtype).removeprefix('torch.')}, time per tensor")
        rows = measure(case, device, seconds, contestants)
        _print(rows)
        yield from rows
        _forget(device)


def _forwards(
    specs: Sequence[Spec], device: torch.device, seconds: float, layers: int | None, real: bool
) -> Iterator[Row]:
    for spec in specs:
        for name, case in forwards.sizes(spec, real=real).items():
            print(f"\n{spec.name} {name}: time per forward")
            try:
                with quiet_upstream():
                    rows = forwards.measure(spec, name, case, device, seconds, layers)
            except ImportError as error:
                rows = [Row("forwards", f"{spec.name} {name}", forwards.WITH, note=f"skipped: {error}")]
            except Exception as error:
                rows = [Row("forwards", f"{spec.name} {name}", forwards.WITH, note=failure(error))]
            _print(rows)
            yield from rows
            _forget(device)


def _checks(device: torch.device) -> Iterator[Row]:
    print("\nOn a GPU")
    for row in gpu_checks.run(device):
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
