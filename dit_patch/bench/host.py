"""`dit-patch bench host`: what patching costs or saves the host, where launching operations is what takes the time.

Models have their real depth, about, and the toy width of a spec's mini, so that nearly all of a forward is Python and
dispatch. Plain and patched run in turns, generation by generation, each with inputs of its own; figures are medians.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import SiteError
from ..handle import apply
from ..sites import layers, resolve
from ..spec import mini
from ..spec.address import AttributeAddress
from ..spec.model import Spec
from ..spec.recipe import Case
from ..spec.registry import Registry
from .generations import time_generation
from .rows import Comparison, CsvFile
from .surroundings import choose, environment

LAYERS = 30
ROUNDS = 9  # at the least
_DEPTHS = ("num_layers", "num_single_layers", "n_layers", "num_hidden_layers")  # as models' configurations call it
_LINE = "  {:<36}  {:<12}  {:<52}  {:>10}  {:>10} {:<2} {:>8}"
_MANY = 50  # living models
_STEPS = 2000


def run_benchmark(
    parts: Sequence[str] | None = None,
    specs: Sequence[str] | None = None,
    layers: int = LAYERS,
    rounds: int = ROUNDS,
    csv: Path | None = None,
) -> int:
    """Measure `parts` for `specs` (all by default) on a CPU, print a table for each, and write every row to `csv`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the host's part is one thread's; others would wait for it, and disturb it
    try:
        return _run(parts or list(PARTS), choose(Registry(), specs), layers, rounds, csv)
    finally:
        torch.set_num_threads(threads)


def _run(parts: Sequence[str], specs: Sequence[Spec], layers: int, rounds: int, csv: Path | None) -> int:
    surroundings = environment("cpu")
    file = CsvFile(csv, Comparison, surroundings)
    print("  ".join(f"{name} {value}" for name, value in surroundings.items()))
    print(f"Toy width, {layers} layers where a mini's configuration names their number: this is the host's part alone.")
    for name in parts:
        title, measure = PARTS[name]
        print(f"\n{title}")
        print(_LINE.format("spec", "case", "what", "plain", "patched", "", "ratio"))
        for spec in specs:
            for row in measure(spec, layers, rounds):
                file.add(row)
                ratio = f"{row.plain / row.patched:.3f}x"
                figures = (f"{row.plain:,.1f}", f"{row.patched:,.1f}")
                print(_LINE.format(row.spec, row.case, row.what, *figures, row.unit, ratio), flush=True)
    if csv is not None:
        print(f"\n{csv}")
    return 0


def forwards(spec: Spec, layers: int, rounds: int) -> Iterator[Comparison]:
    """Compare whole forwards, with everything on and with each kind alone."""
    case, depth = deepened(spec, layers)
    kinds = list(dict.fromkeys(site.kind for site in spec.sites))
    selections = {"everything": [spec.name]} | {f"{kind} alone": [spec.name, kind] for kind in kinds}
    plain = mini.build(spec, case)
    patched = {what: mini.build(spec, case) for what in selections}
    handles = [apply(patched[what], only=only) for what, only in selections.items()]
    times = _in_turns({"plain": plain, **patched}, case, rounds)
    for handle in handles:
        handle.remove()
    for what in selections:
        yield _row("forwards", spec, depth, what, times["plain"], times[what])


def inside(spec: Spec, layers: int, rounds: int) -> Iterator[Comparison]:
    """Compare each site's calls as a forward makes them, where nothing of them is in the processor's caches."""
    case, depth = deepened(spec, layers)
    plain, patched = mini.build(spec, case), mini.build(spec, case)
    handle = apply(patched, only=[spec.name])
    taken = [_timed_calls(spec, model) for model in (plain, patched)]
    _in_turns({"plain": plain, "patched": patched}, case, rounds)
    for _, undo in taken:
        undo()
    handle.remove()
    (before, _), (after, _) = taken
    for at, times in before.items():
        yield _row("inside", spec, depth, at, times, after[at])


def growth(spec: Spec, layers: int, rounds: int) -> Iterator[Comparison]:
    """Compare `apply` and forwards of a first model with those among many, and early steps with late ones."""
    case = spec.mini.case()
    crowd = []
    for _ in range(_MANY):
        model = mini.build(spec, case)
        start = time.perf_counter()
        handle = apply(model, only=[spec.name])
        crowd.append((model, handle, (time.perf_counter() - start) * 1e6))
    applied = [took for _, _, took in crowd]
    yield _row(
        "growth", spec, "mini", f"apply: the 2nd to 6th model, the last 5 of {_MANY}", applied[1:6], applied[-5:]
    )
    among = [time_generation(crowd[0][0], case, number) for number in range(rounds)]
    for _, handle, _ in crowd[1:]:
        handle.remove()
    alone = [time_generation(crowd[0][0], case, number) for number in range(rounds)]
    yield _row("growth", spec, "mini", f"a forward: alone, among {_MANY} models", alone, among)
    crowd[0][1].clear()
    made = list(mini.forwards(case, case.sizes[0], steps=1))
    steps = _new_timesteps(crowd[0][0], made[0], _STEPS)
    if steps:
        share = _STEPS // 10
        what = f"a forward with a new timestep: the first {share}, the last {share} of {_STEPS}"
        yield _row("growth", spec, "mini", what, steps[share : 2 * share], steps[-share:])
    crowd[0][1].remove()


def deepened(spec: Spec, layers: int) -> tuple[Case, str]:
    """Return the spec's case with about so many layers, and what to call it; its own depth where that is not told."""
    case = spec.mini.case()
    named = [name for name in _DEPTHS if name in case.config]
    deep = case.model_copy(update={"config": {**case.config, **{name: layers // len(named) for name in named}}})
    if named:
        try:
            model = mini.build(spec, deep)
            with torch.no_grad():
                for arguments in mini.repeat(mini.forwards(deep, deep.sizes[0], steps=1)):
                    model(**arguments)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
            named = []  # other parts of the configuration go by the depth
    return (deep, f"{layers} layers") if named else (case, "mini's depth")


def _in_turns(models: Mapping[str, torch.nn.Module], case: Case, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, model in models.items():
            times[name].append(time_generation(model, case, number))
    return {name: each[1:] for name, each in times.items()}  # the first warms up


def _new_timesteps(model: torch.nn.Module, arguments: dict[str, Any], steps: int) -> list[float]:
    """Return the microseconds of forwards that differ in their timestep alone; none where the model takes none."""
    if not isinstance(arguments.get("timestep"), torch.Tensor):
        return []
    times = []
    with torch.no_grad():
        for step in range(steps):
            given = arguments | {"timestep": torch.full_like(arguments["timestep"], step % 1000)}
            start = time.perf_counter()
            model(**given)
            times.append((time.perf_counter() - start) * 1e6)
    return times


def _timed_calls(spec: Spec, model: torch.nn.Module) -> tuple[dict[str, list[float]], Callable[[], None]]:
    """Return a list for the times of each site's calls, in microseconds, and what ends the timing."""
    times: dict[str, list[float]] = defaultdict(list)
    wrapped = []
    for site in spec.sites:
        if not isinstance(site.address, AttributeAddress):
            continue
        try:
            places = resolve.places(site.address, model, spec.name)
        except SiteError:
            continue

        def timed(original, instance, args, kwargs, found=times[site.at]):
            start = time.perf_counter()
            result = original(*args, **kwargs)
            found.append((time.perf_counter() - start) * 1e6)
            return result

        wrapped += [layers.install(place.owner, place.name, timed) for place in places]

    def undo() -> None:
        for layer in reversed(wrapped):
            layers.remove(layer)

    return times, undo


def _row(part: str, spec: Spec, case: str, what: str, plain: Sequence[float], patched: Sequence[float]) -> Comparison:
    low, middle, high = statistics.quantiles(patched, n=4) if len(patched) > 1 else (0.0, *patched, 0.0)
    return Comparison(part, spec.name, case, what, "us", statistics.median(plain or [0.0]), middle, high - low)


PARTS: dict[str, tuple[str, Callable[[Spec, int, int], Iterator[Comparison]]]] = {
    "forwards": ("Whole forwards, inputs new in each generation of four steps", forwards),
    "inside": ("Calls of each site inside a forward (patched: hits and misses as they come)", inside),
    "growth": ("Growth with living models and with steps (plain: the first, patched: the last)", growth),
}
"""What can be measured, by the name that `--only` takes: a title, and what measures it for a spec."""
