"""`dit-patch bench rotary`: `rotary` beside what it replaces, at the shapes of real models, then whole forwards.

All contestants of a case are timed in turns in one process, and each one's bits are compared with the eager function's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from ...errors import DitPatchError, quote, suggest
from ...pipelines import loading
from ...spec.model import Spec
from ...spec.registry import Registry
from ...upstream.verbosity import quiet_upstream
from ..sites import choose, environment, installed, version, write_csv
from . import checks as gpu_checks
from . import forwards
from .cases import CASES, Case
from .contestants import CLONE, COMPILE, CONTESTANTS, EAGER, FLASH, IN_PLACE, OURS, Contestant, Maker, Missing
from .rows import HEAD, Row, write_json
from .timing import Timed, differing, in_turns, peak_bytes

PARTS = ("ops", "forwards")
_PACKAGES = ("triton", "transformers", "flash-attn", "liger-kernel")
_FAILED = "failed"
_CPU_CASES = ("wan-1.3b-480p", "wan-1.3b-480p-fp32")
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
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        about = _environment(place)
        print("  ".join(f"{name} {value}" for name, value in about.items()))
        rows: list[Row] = []
        with torch.no_grad():
            if "ops" in parts:
                rows += _ops(chosen, place, seconds, contestants)
            if "forwards" in parts:
                rows += _forwards(specs, place, seconds, layers, everything)
            if checks:
                rows += _checks(place)
    finally:
        torch.set_num_threads(before)
    print("\nWhat is asked of dit_patch", *_verdict(rows, place), sep="\n")
    for write, path in ((partial(write_csv, kind=Row), csv), (write_json, json)):
        if path is not None:
            write(path, rows=rows, surroundings=about)
            print(f"\n{path}")
    return int(any(row.differing or row.note.startswith(_FAILED) for row in rows if row.contestant in _OWN))


def measure(
    case: Case, device: torch.device, seconds: float, contestants: Mapping[str, Maker] = CONTESTANTS
) -> list[Row]:
    """A row for each contestant that there is for the case; a single one where there is no such case here."""
    about = {
        "part": "ops",
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": "x".join(map(str, case.shape)),
    }
    try:
        problem = case.problem(device)
        expected = problem.rotated()
    except (ImportError, LookupError) as error:
        return [Row(**about, note=f"skipped: {case.missing(error)}")]
    except Exception as error:
        return [Row(**about, note=_failed(error))]
    ready: dict[str, _Ready] = {}
    absent: dict[str, str] = {}
    for name, make in contestants.items():
        try:
            contestant = make(problem)
            if contestant is not None:
                ready[name] = _Ready(contestant, expected, device)
        except Missing as missing:
            absent[name] = str(missing)
        except Exception as error:
            absent[name] = _failed(error)
    del expected
    times = dict(zip(ready, in_turns([each.timed for each in ready.values()], device, seconds)))
    speed = {name: each.bytes / times[name].us / 1e3 for name, each in ready.items()}

    def row(name: str) -> Row:
        if name in absent:
            return Row(**about, contestant=name, note=absent[name])
        return Row(
            **about,
            contestant=name,
            **vars(times[name]),
            speedup=times[EAGER].us / times[name].us if EAGER in times else None,
            differing=ready[name].differing,
            gb_per_s=speed[name],
            of_clone=speed[name] / speed[CLONE] if CLONE in speed else None,
            peak_bytes=ready[name].peak_bytes,
        )

    return [row(name) for name in contestants if name in ready or name in absent]


class _Ready:
    """A contestant that has run, compiled itself and all, and what is to be known of it besides its times."""

    def __init__(self, contestant: Contestant, expected: Sequence[torch.Tensor], device: torch.device) -> None:
        results = contestant.call()
        self.timed = Timed(contestant.call, len(results), contestant.begin)
        self.differing = differing(results, expected[: len(results)]) if contestant.rotating else None
        moved = 2 * sum(each.nbytes for each in results) + sum(each.nbytes for each in contestant.tables)
        self.bytes = moved / len(results)
        del results
        self.peak_bytes = peak_bytes(contestant.call, device)


def _choose(
    names: Sequence[str], cases: Mapping[str, Case], registry: Registry, everything: bool
) -> tuple[list[Case], list[Spec]]:
    """The cases and the specs to measure.

    Raises:
        DitPatchError: a name of neither, or no spec with anything to measure.
    """
    if not names:
        fit = [case for case in cases.values() if everything or not case.big]
        return fit, [spec for spec in registry if forwards.concerned(spec) and installed(spec)]
    known = {*registry.names(), *(name.partition("/")[0] for name in registry.names())}
    for name in names:
        if name not in known.union(cases):
            raise DitPatchError(
                f"{quote(name)} is no case and no spec{suggest(name, (*cases, *known))}\n    Cases: {', '.join(cases)}."
            )
    others = [name for name in names if name not in cases]
    specs = list(filter(forwards.concerned, choose(registry, others))) if others else []
    if others and not specs:
        raise DitPatchError(f"{', '.join(map(quote, others))}: no sites of kind {forwards.KIND}, so nothing to compare")
    return [cases[name] for name in dict.fromkeys(names) if name in cases], specs


def _device(word: str | None) -> torch.device:
    """The device, made the current one where it is a GPU.

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
                rows = [Row("forwards", f"{spec.name} {name}", forwards.WITH, note=_failed(error))]
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
    """What is compiled for one case, and the memory of it, is nothing to the next."""
    if "torch._dynamo" in sys.modules:  # not to be imported for this
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _failed(error: Exception) -> str:
    said = (str(error) or type(error).__name__).splitlines()[0]
    return f"{_FAILED}: {type(error).__name__}: {said}"


def _verdict(rows: Sequence[Row], device: torch.device) -> Iterator[str]:
    """The figures that were asked for, each with the cases that it is reached in and those that miss it."""
    found = {(row.case, row.contestant): row for row in rows if row.part == "ops" and row.us is not None}
    ours = {case: row for (case, contestant), row in found.items() if contestant == OURS}

    def speedup(over: str) -> dict[str, float]:
        return {case: found[case, over].us / row.us for case, row in ours.items() if (case, over) in found}

    if device.type == "cuda":
        bandwidth = {case: row.of_clone for case, row in ours.items() if row.of_clone is not None}
        yield _reached("70 % of a clone's bandwidth", bandwidth, 0.7)
        yield _reached("as fast as torch.compile", speedup(COMPILE), 1.0)
        yield _reached("1.25x as fast as flash-attn", speedup(FLASH), 1.25)
    else:
        asked = {case: value for case, value in speedup(EAGER).items() if case in _CPU_CASES}
        yield _reached("3x as fast as eager at Wan 1.3B, 480p", asked, 3.0)


def _reached(words: str, values: Mapping[str, float], least: float) -> str:
    missed = [f"{case} ({value:.2f})" for case, value in values.items() if value < least]
    counted = f"{len(values) - len(missed)} of {len(values)} cases" if values else "not measured"
    return f"  at least {words}: {counted}" + (f"; not in {', '.join(missed)}" if missed else "")
