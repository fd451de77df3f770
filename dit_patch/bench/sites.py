"""`dit-patch bench`: what a hit costs, what a site saves at real sizes, operations per forward, whole generations.

Every pair of figures is measured in one process, side by side; times are medians. `PARTS` is the table of what can be
measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Measurement, Timer

from ..handle import apply
from ..memo.context import transparent_modes
from ..memo.results import map_tensors
from ..pipelines import loading
from ..sites import scope
from ..spec import mini
from ..spec.model import Spec
from ..spec.registry import Registry
from ..upstream.torch_internals import TorchDispatchMode
from .generations import time_generation
from .recorded_calls import RecordedCall, model_at_real_size, patched_frame, record_calls
from .rows import Comparison, CsvFile
from .surroundings import choose, environment

_TURNS = 3  # at the least
_LINE = "  {:<24}  {:<20}  {:<62}  {:>10}  {:>10} {:<2} {}"


def run_benchmark(
    parts: Sequence[str] | None = None,
    specs: Sequence[str] | None = None,
    device: str | None = None,
    csv: Path | None = None,
    seconds: float = 0.5,
) -> int:
    """Measure `parts` for `specs` (all by default), print a table for each, and write every row to `csv`.

    Args:
        specs: names, such as diffusers/wan, or libraries, such as fastvideo.
        device: by default cuda where there is one, else cpu.
        seconds: the least time for a figure.
    """
    device = str(loading.device(device))
    chosen = choose(Registry(), specs)
    surroundings = environment(device)
    file = CsvFile(csv, Comparison, surroundings)
    print("  ".join(f"{name} {value}" for name, value in surroundings.items()))
    for name in parts or PARTS:
        part = PARTS[name]
        print(f"\n{part.title}")
        print(_LINE.format("spec", "case", "what", "plain", "patched", "", f"{part.gain_title:>9}"))
        for spec in chosen:
            for row in part.measure(spec, device, seconds):
                file.add(row)
                print(_line(row, part.gain(row)), flush=True)
    if csv is not None:
        print(f"\n{csv}")
    return 0


def _line(row: Comparison, gain: str) -> str:
    plain, patched = _number(row.plain), _number(row.patched)
    return _LINE.format(row.spec, row.case, row.what, plain, patched, row.unit, gain)


def hits(spec: Spec, device: str, seconds: float) -> Iterator[Comparison]:
    """Compare the cost of a hit with a call of a function that does nothing, at the sizes of the spec's mini."""
    case = spec.mini.case()
    model = mini.build(spec, case).to(device)
    arguments = next(mini.forwards(case, case.sizes[0], device=device))
    calls = record_calls(model, spec, arguments)
    nothing = Timer("f(*a, **k)", globals={"f": lambda *a, **k: None, "a": (), "k": {}}).blocked_autorange(
        min_run_time=seconds
    )
    with patched_frame(model, spec, arguments):
        for call in calls:
            hit = _time(getattr(call.owner, call.name), call, seconds)
            yield Comparison("hits", spec.name, "mini", call.site.at, "us", *_microseconds(nothing, hit))


def sites(spec: Spec, device: str, seconds: float) -> Iterator[Comparison]:
    """Compare each site's call before and after patching, at the spec's real sizes, bf16, random weights."""
    for name in spec.bench:
        case = spec.bench_case(name)
        model, arguments, calls = model_at_real_size(spec, case, device)
        plain = [_time(getattr(call.owner, call.name), call, seconds) for call in calls]
        with patched_frame(model, spec, arguments):
            for call, before in zip(calls, plain):
                after = _time(getattr(call.owner, call.name), call, seconds)
                yield Comparison("sites", spec.name, name, call.site.at, "us", *_microseconds(before, after))


def kernels(spec: Spec, device: str, seconds: float) -> Iterator[Comparison]:
    """Count dispatched operations per forward without views: the mean of the two CFG passes of a later step."""
    for variant in (None, *spec.mini.variants):
        case = spec.mini.case(variant)
        model = mini.build(spec, case).to(device)
        forwards = list(mini.forwards(case, case.sizes[0], steps=3, device=device))
        plain = _operations(model, mini.repeat(forwards))
        with apply(model, only=spec.name):
            patched = _operations(model, mini.repeat(forwards))
        yield Comparison("kernels", spec.name, variant or "mini", "operations per forward", "", plain, patched)


def forwards(spec: Spec, device: str, seconds: float) -> Iterator[Comparison]:
    """Time generations of the spec's mini and of its `whole` bench cases, per forward, each with inputs of its own."""
    cases = {variant or "mini": spec.mini.case(variant) for variant in (None, *spec.mini.variants)}
    cases |= {name: spec.bench_case(name) for name, case in spec.bench.items() if case.whole}
    for name, case in cases.items():
        plain, patched = (mini.build(spec, case).to(device) for _ in range(2))
        with apply(patched, only=spec.name):
            for model in (plain, patched):
                time_generation(model, case, 0, device)  # a warm-up
            before, after, start, number = [], [], time.perf_counter(), 0
            # In turns, so that whatever else the machine does slows both alike.
            while number < _TURNS or time.perf_counter() - start < 2 * seconds:
                number += 1
                before.append(time_generation(plain, case, number, device))
                after.append(time_generation(patched, case, number, device))
        low, middle, high = statistics.quantiles(after, n=4)
        what = "a forward, mean of a generation"
        yield Comparison("forwards", spec.name, name, what, "us", statistics.median(before), middle, high - low)


def _time(function: Callable, call: RecordedCall, seconds: float) -> Measurement:
    """Time a site's call, with the copy and cast of its result where the spec says that the caller makes them."""
    if call.site.device or call.site.dtype:
        function = _converted(function, call)
    frame = scope.current()
    calls = {} if frame is None else frame.calls
    # Each call counts as the first of its forward, as it is in the model.
    timer = Timer(
        "calls.clear(); f(*a, **k)",
        globals={"f": function, "a": call.args, "k": call.kwargs, "calls": calls},
        num_threads=torch.get_num_threads(),
    )
    with torch.no_grad():
        for _ in range(3):
            calls.clear()
            function(*call.args, **call.kwargs)
        return timer.blocked_autorange(min_run_time=seconds)


def _converted(function: Callable, call: RecordedCall) -> Callable:
    dtype = getattr(torch, call.site.dtype) if call.site.dtype else None

    def convert(*args: Any, **kwargs: Any) -> None:
        map_tensors(lambda tensor: tensor.to(device=call.device, dtype=dtype), function(*args, **kwargs))

    return convert


def _microseconds(plain: Measurement, patched: Measurement) -> tuple[float, float, float]:
    return plain.median * 1e6, patched.median * 1e6, patched.iqr * 1e6


def _operations(model: torch.nn.Module, forwards: Iterable[dict[str, Any]]) -> float:
    *before, cond, uncond = forwards
    with torch.no_grad():
        for arguments in before:
            model(**arguments)
        with _Counting() as counting:
            model(**cond)
            model(**uncond)
    return counting.operations / 2


class _Counting(TorchDispatchMode):
    """Counts operations, and changes none."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += not function.is_view
        return function(*args, **(kwargs or {}))


transparent_modes.add(_Counting)


def _number(value: float) -> str:
    return f"{value:,.1f}" if value < 1e6 else f"{value:,.0f}"


def _ratio(row: Comparison) -> str:
    return f"{row.plain / row.patched:8.2f}x"


def _excess(row: Comparison) -> str:
    return f"{row.patched - row.plain:+8.2f}"


@dataclass(frozen=True)
class Part:
    """One part of the benchmark: its title, what measures it for a spec, device and seconds, and its last column."""

    title: str
    measure: Callable[[Spec, str, float], Iterator[Comparison]]
    gain_title: str = "ratio"
    gain: Callable[[Comparison], str] = _ratio


PARTS = {
    "hits": Part("Cost of a hit (plain: a call of a function that does nothing)", hits, "over", _excess),
    "sites": Part(
        "Each site's call, with the copy and cast of its result, at real sizes, random weights (patched: a hit)", sites
    ),
    "kernels": Part("Dispatched operations per forward, views left out", kernels),
    "forwards": Part("Forwards, inputs new in each generation", forwards),
}
"""What can be measured, by the name that `--only` takes."""
