"""Measure all contestants of a case in turns, and compare each one's bits with the eager function's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .cases import Case
from .contestants import CLONE, CONTESTANTS, EAGER, Contestant, Maker, Missing
from .rows import Row
from .timing import Timed, differing, in_turns, peak_bytes

FAILED = "failed"


def measure(
    case: Case, device: torch.device, seconds: float, contestants: Mapping[str, Maker] = CONTESTANTS
) -> list[Row]:
    """Return a row for each contestant that does the case; a single one where the case cannot be had here."""
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
        return [Row(**about, note=failure(error))]
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
            absent[name] = failure(error)
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
    """A contestant that has run once, and so is compiled, with its figures besides its times."""

    def __init__(self, contestant: Contestant, expected: Sequence[torch.Tensor], device: torch.device) -> None:
        results = contestant.call()
        self.timed = Timed(contestant.call, len(results), contestant.begin)
        self.differing = differing(results, expected[: len(results)]) if contestant.rotating else None
        moved = 2 * sum(each.nbytes for each in results) + sum(each.nbytes for each in contestant.tables)
        self.bytes = moved / len(results)
        del results
        self.peak_bytes = peak_bytes(contestant.call, device)


def failure(error: Exception) -> str:
    """Return the note of a row for what raised `error`: its class and the first line of its message."""
    message = (str(error) or type(error).__name__).splitlines()[0]
    return f"{FAILED}: {type(error).__name__}: {message}"
