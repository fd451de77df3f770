"""`dit-patch bench`: what a hit costs, what a site saves at real sizes, operations per forward, whole generations.

Every pair of figures is measured in one process, side by side; times are medians.
"""

from __future__ import annotations

import csv as csvlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from torch.utils.benchmark import Measurement, Timer

from .. import __version__
from ..errors import SiteError
from ..handle import apply
from ..memo.store import map_tensors
from ..sites import layers, resolve, scope
from ..spec import mini
from ..spec.address import SpanAddress
from ..spec.model import Site, Spec
from ..spec.recipe import Case
from ..spec.registry import Registry
from ..upstream.torch_internals import TorchDispatchMode

PARTS = ("hits", "sites", "kernels", "forwards")
_TURNS = 3  # at the least


@dataclass(frozen=True)
class Row:
    """One comparison: `plain` and `patched` are medians in `unit`, `spread` is the latter's interquartile range."""

    part: str
    spec: str
    case: str
    what: str
    unit: str
    plain: float
    patched: float
    spread: float = 0.0


@dataclass(frozen=True)
class Recorded:
    """One call of a site as the model makes it."""

    site: Site
    owner: Any
    name: str
    args: tuple
    kwargs: dict[str, Any]
    device: torch.device


def run(
    parts: Sequence[str] = PARTS,
    specs: Sequence[str] | None = None,
    device: str | None = None,
    csv: Path | None = None,
    seconds: float = 0.5,
) -> int:
    """Measure `parts` for `specs` (all by default), print tables, and write every row to `csv`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose(Registry(), specs)
    surroundings = environment(device)
    print("  ".join(f"{name} {value}" for name, value in surroundings.items()))
    rows: list[Row] = []
    for part in parts:
        print(f"\n{_TITLES[part]}")
        gained = _GAINS.get(part, "ratio")
        print(f"  {'spec':<24}  {'case':<20}  {'what':<62}  {'plain':>10}  {'patched':>10}    {gained:>9}")
        for spec in chosen:
            for row in _MEASURES[part](spec, device, seconds):
                rows.append(row)
                gain = f"{row.patched - row.plain:+8.2f}" if part == "hits" else f"{row.plain / row.patched:8.2f}x"
                print(
                    f"  {row.spec:<24}  {row.case:<20}  {row.what:<62}  {_shown(row.plain):>10}  "
                    f"{_shown(row.patched):>10} {row.unit:<2} {gain}"
                )
    if csv is not None:
        write_csv(csv, Row, rows, surroundings)
        print(f"\n{csv}")
    return 0


def write_csv(path: Path, kind: type, rows: Iterable[Any], surroundings: Mapping[str, str]) -> None:
    """Every row, a dataclass of that kind, each with the surroundings."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csvlib.DictWriter(file, [*(field.name for field in fields(kind)), *surroundings])
        writer.writeheader()
        writer.writerows({**asdict(row), **surroundings} for row in rows)


def choose(registry: Registry, names: Sequence[str] | None) -> list[Spec]:
    """The specs of these names, or of these libraries ("fastvideo" for all of `fastvideo/...`); all that are installed.

    Raises:
        SpecError: a name that is neither.
    """
    if not names:
        return [spec for spec in registry if installed(spec)]
    chosen: dict[str, Spec] = {}
    for name in names:
        below = [each for each in registry.names() if each.startswith(f"{name}/")]
        chosen |= {each: registry.get(each) for each in below or (name,)}
    return list(chosen.values())


def installed(spec: Spec) -> bool:
    """Whether the packages that the spec needs are there, of whatever version."""
    return all(map(version, (Requirement(line).name for line in spec.requires)))


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, str]:
    """What a figure depends on besides the code: hardware and versions."""
    cpu = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu
    packages = ("torch", "wrapt", "diffusers", "transformers", "fastvideo")
    versions = {"dit-patch": __version__, **{name: found for name in packages if (found := version(name))}}
    return {"device": name, "threads": str(torch.get_num_threads()), "python": platform.python_version(), **versions}


def hits(spec: Spec, device: str, seconds: float) -> Iterator[Row]:
    """The cost of a hit, against a call of a function that does nothing, at the sizes of the spec's mini."""
    case = spec.mini.case()
    model = mini.build(spec, case).to(device)
    arguments = next(mini.forwards(case, case.sizes[0], device=device))
    calls = record(model, spec, arguments)
    nothing = Timer("f(*a, **k)", globals={"f": lambda *a, **k: None, "a": (), "k": {}}).blocked_autorange(
        min_run_time=seconds
    )
    with patched_frame(model, spec, arguments):
        for call in calls:
            hit = _time(getattr(call.owner, call.name), call, seconds)
            yield Row("hits", spec.name, "mini", call.site.at, "us", *_microseconds(nothing, hit))


def sites(spec: Spec, device: str, seconds: float) -> Iterator[Row]:
    """Each site's call before and after, at the spec's real sizes, bf16, random weights."""
    for name in spec.bench:
        case = spec.bench_case(name)
        model, arguments, calls = real(spec, case, device)
        plain = [_time(getattr(call.owner, call.name), call, seconds) for call in calls]
        with patched_frame(model, spec, arguments):
            for call, before in zip(calls, plain):
                after = _time(getattr(call.owner, call.name), call, seconds)
                yield Row("sites", spec.name, name, call.site.at, "us", *_microseconds(before, after))


def kernels(spec: Spec, device: str, seconds: float) -> Iterator[Row]:
    """Dispatched operations per forward, views left out: the mean over the cond and uncond pass of a later step."""
    for variant in (None, *spec.mini.variants):
        case = spec.mini.case(variant)
        model = mini.build(spec, case).to(device)
        forwards = list(mini.forwards(case, case.sizes[0], steps=3, device=device))
        plain = _operations(model, mini.repeat(forwards))
        with apply(model, only=spec.name):
            patched = _operations(model, mini.repeat(forwards))
        yield Row("kernels", spec.name, variant or "mini", "operations per forward", "", plain, patched)


def forwards(spec: Spec, device: str, seconds: float) -> Iterator[Row]:
    """Generations of the spec's mini, and of its `whole` bench cases, per forward; each with inputs of its own."""
    cases = {variant or "mini": spec.mini.case(variant) for variant in (None, *spec.mini.variants)}
    cases |= {name: spec.bench_case(name) for name, case in spec.bench.items() if case.whole}
    for name, case in cases.items():
        plain, patched = (mini.build(spec, case).to(device) for _ in range(2))
        with apply(patched, only=spec.name):
            for model in (plain, patched):
                _generation(model, case, 0, device)
            before, after, start, number = [], [], time.perf_counter(), 0
            # In turns, so that whatever else the machine does falls on both alike.
            while number < _TURNS or time.perf_counter() - start < 2 * seconds:
                number += 1
                before.append(_generation(plain, case, number, device))
                after.append(_generation(patched, case, number, device))
        low, middle, high = statistics.quantiles(after, n=4)
        what = "a forward, mean of a generation"
        yield Row("forwards", spec.name, name, what, "us", statistics.median(before), middle, high - low)


def _generation(model: torch.nn.Module, case: Case, number: int, device: str) -> float:
    """Microseconds that a forward of that generation takes."""
    made = list(mini.forwards(case, case.sizes[0], device=device, generation=number))
    _wait(device)
    start = time.perf_counter()
    with torch.no_grad():
        for arguments in made:
            model(**arguments)
    _wait(device)
    return (time.perf_counter() - start) / len(made) * 1e6


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def record(
    model: torch.nn.Module, spec: Spec, arguments: dict[str, Any], before: torch.nn.Module | None = None
) -> list[Recorded]:
    """The first call of every site in one forward of the unpatched model, or in its part `before` a submodule."""
    calls: dict[str, Recorded] = {}
    device = next(model.parameters()).device
    undo = ExitStack()
    for site in spec.sites:
        if isinstance(site.address, SpanAddress):
            continue
        try:
            owner, name, _ = resolve.places(site.address, model, spec.name)[0]
        except SiteError:
            continue

        def note(original, instance, args, kwargs, site=site, owner=owner, name=name):
            calls.setdefault(site.at, Recorded(site, owner, name, args, kwargs, device))
            return original(*args, **kwargs)

        undo.callback(layers.remove, layers.install(owner, name, note))
    if before is not None:
        undo.callback(before.register_forward_pre_hook(_stop).remove)
    with undo, torch.no_grad(), suppress(_Stopped):
        model(**arguments)
    return list(calls.values())


class _Stopped(Exception):
    """A forward has come as far as it should."""


def _stop(*_: Any) -> None:
    raise _Stopped


def real(spec: Spec, case: Case, device: str) -> tuple[torch.nn.Module, dict[str, Any], list[Recorded]]:
    """A model of real width with random weights on `device`, arguments of real size, and the calls of its sites.

    Those before the first block, in bfloat16; or all, in float32, where the case is one to run `whole` forwards of.
    """
    dtype = torch.float32 if case.whole else torch.bfloat16
    model = mini.build(spec, case, dtype=dtype).to(device)
    arguments = next(mini.forwards(case, case.sizes[0], dtype=dtype, device=device))
    first = None if case.whole or not spec.blocks else model.get_submodule(f"{spec.blocks[0].at}.0")
    return model, arguments, record(model, spec, arguments, first)


@contextmanager
def patched_frame(model: torch.nn.Module, spec: Spec, arguments: dict[str, Any]) -> Iterator[None]:
    """Patched, and as if inside one forward of `model`, so that its sites can be called one by one."""
    with apply(model, only=spec.name, max_bytes=8 << 30), torch.no_grad():
        hooks = scope.scope_of(model)
        hooks.enter(model, (), arguments)
        try:
            yield
        finally:
            hooks.leave(model, (), arguments, None)


def _time(function: Callable, call: Recorded, seconds: float) -> Measurement:
    """The time of a site's call and, where the spec says what its caller makes of the result, of that conversion."""
    if call.site.device or call.site.dtype:
        function = _converted(function, call)
    frame = scope.current()
    calls = {} if frame is None else frame.calls
    # Each call is to be the first of its forward, as it is in the model.
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


def _converted(function: Callable, call: Recorded) -> Callable:
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
    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += not function.is_view
        return function(*args, **(kwargs or {}))


def _shown(value: float) -> str:
    return f"{value:,.1f}" if value < 1e6 else f"{value:,.0f}"


_MEASURES = {"hits": hits, "sites": sites, "kernels": kernels, "forwards": forwards}
_GAINS = {"hits": "over"}
_TITLES = {
    "hits": "Cost of a hit (plain: a call of a function that does nothing)",
    "sites": "Each site's call, with the copy and cast of its result, at real sizes, random weights (patched: a hit)",
    "kernels": "Dispatched operations per forward, views left out",
    "forwards": "Forwards, inputs new in each generation",
}
