"""`dit-patch bench`: what a hit costs, what a site saves at real sizes, operations per forward, whole generations.

Every pair of figures is measured in one process, one after the other, by torch.utils.benchmark; times are medians.
"""

from __future__ import annotations

import csv as csvlib
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Measurement, Timer

from . import __version__, mini, resolve, scope, wrapped
from .errors import SiteError
from .handle import apply
from .registry import Registry
from .spec import Case, Site, Spec

PARTS = ("hits", "sites", "kernels", "forwards")
_TURNS = 7


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


def run(
    parts: Sequence[str] = PARTS,
    specs: Sequence[str] | None = None,
    device: str | None = None,
    csv: Path | None = None,
    seconds: float = 0.5,
) -> int:
    """Measure `parts` for `specs` (all by default), print tables, and write every row to `csv`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    registry = Registry()
    chosen = [registry.get(name) for name in specs] if specs else list(registry)
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
        with csv.open("w", newline="") as file:
            writer = csvlib.DictWriter(file, [field.name for field in fields(Row)] + list(surroundings))
            writer.writeheader()
            writer.writerows({**asdict(row), **surroundings} for row in rows)
        print(f"\n{csv}")
    return 0


def environment(device: str) -> dict[str, str]:
    """What a figure depends on besides the code: hardware and versions."""
    cpu = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu
    versions = {"dit-patch": __version__, **{name: metadata.version(name) for name in ("torch", "diffusers", "wrapt")}}
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
    with patched_frame(model, arguments):
        for call in calls:
            hit = _time(getattr(call.owner, call.name), call, seconds)
            yield Row("hits", spec.name, "mini", call.site.at, "us", *_microseconds(nothing, hit))


def sites(spec: Spec, device: str, seconds: float) -> Iterator[Row]:
    """Each site's call before and after, at the spec's real sizes, bf16, random weights."""
    for name in spec.bench:
        case = spec.bench_case(name)
        model, arguments, calls = real(spec, case, device)
        plain = [_time(getattr(call.owner, call.name), call, seconds) for call in calls]
        with patched_frame(model, arguments):
            for call, before in zip(calls, plain):
                after = _time(getattr(call.owner, call.name), call, seconds)
                yield Row("sites", spec.name, name, call.site.at, "us", *_microseconds(before, after))


def kernels(spec: Spec, device: str, seconds: float) -> Iterator[Row]:
    """Dispatched operations per forward, views left out: the mean over the cond and uncond pass of a later step."""
    for variant in (None, *spec.mini.variants):
        case = spec.mini.case(variant)
        model = mini.build(spec, case).to(device)
        forwards = list(mini.forwards(case, case.sizes[0], steps=3, device=device))
        plain = _operations(model, forwards)
        with apply(model):
            patched = _operations(model, forwards)
        yield Row("kernels", spec.name, variant or "mini", "operations per forward", "", plain, patched)


def forwards(spec: Spec, device: str, seconds: float) -> Iterator[Row]:
    """One generation of the spec's mini: four steps, cond and uncond; new latents and timesteps each time."""
    for variant in (None, *spec.mini.variants):
        case = spec.mini.case(variant)
        model = mini.build(spec, case).to(device)
        made = list(mini.forwards(case, case.sizes[0], device=device))
        new = [name for name, recipe in case.inputs.items() if recipe.new == "step"]

        def generation(model=model, made=made, new=new) -> None:
            with torch.no_grad():
                for number, arguments in enumerate(made):
                    if number % len(mini.PASSES) == 0:
                        step = {name: arguments[name].clone() for name in new}
                    model(**{**arguments, **step})
            if device.startswith("cuda"):
                torch.cuda.synchronize()

        timer = Timer("f()", globals={"f": generation}, num_threads=torch.get_num_threads())
        plain, patched = [], []
        # In turns, so that whatever else the machine does falls on both alike.
        for _ in range(_TURNS):
            plain.append(timer.blocked_autorange(min_run_time=seconds / _TURNS))
            with apply(model):
                generation()
                patched.append(timer.blocked_autorange(min_run_time=seconds / _TURNS))
        [plain], [patched] = Measurement.merge(plain), Measurement.merge(patched)
        what = "four steps, two passes each"
        yield Row("forwards", spec.name, variant or "mini", what, "us", *_microseconds(plain, patched))


def record(model: torch.nn.Module, spec: Spec, arguments: dict[str, Any]) -> list[Recorded]:
    """The first call of every site in one forward of the unpatched model."""
    calls: dict[str, Recorded] = {}
    layers = []
    for site in spec.sites:
        if site.is_span:
            continue
        try:
            owner, name = resolve.targets(model, site.at, spec.name)[0]
        except SiteError:
            continue

        def note(original, instance, args, kwargs, site=site, owner=owner, name=name):
            calls.setdefault(site.at, Recorded(site, owner, name, args, kwargs))
            return original(*args, **kwargs)

        layers.append(wrapped.install(owner, name, note))
    try:
        with torch.no_grad():
            model(**arguments)
    finally:
        for layer in reversed(layers):
            wrapped.remove(layer)
    return list(calls.values())


def real(spec: Spec, case: Case, device: str) -> tuple[torch.nn.Module, dict[str, Any], list[Recorded]]:
    """A model of real width on `device`, arguments of real size, and the calls of its sites.

    What the calls look like is found out by a forward on the meta device; only then are weights made.
    """
    with torch.device("meta"):
        model = mini.make_model(spec, case).eval().to(torch.bfloat16)
    arguments = next(mini.forwards(case, case.sizes[0], dtype=torch.bfloat16))
    given = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    calls = record(model, spec, given)
    model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.uniform_(tensor, -0.02, 0.02)
    for name, value in arguments.items():
        arguments[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    same = {id(given[name]): arguments[name] for name in given}

    def made(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return same.get(id(value), torch.ones(value.shape, dtype=value.dtype, device=device))

    return (
        model,
        arguments,
        [
            Recorded(
                call.site,
                call.owner,
                call.name,
                tuple(map(made, call.args)),
                {name: made(value) for name, value in call.kwargs.items()},
            )
            for call in calls
        ],
    )


@contextmanager
def patched_frame(model: torch.nn.Module, arguments: dict[str, Any]) -> Iterator[None]:
    """Patched, and as if inside one forward of `model`, so that its sites can be called one by one."""
    with apply(model, max_bytes=8 << 30), torch.no_grad():
        hooks = scope.scope_of(model)
        hooks.enter(model, (), arguments)
        try:
            yield
        finally:
            hooks.leave(model, (), arguments, None)


def _time(function: Callable, call: Recorded, seconds: float) -> Measurement:
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
    "sites": "Each site's call at real sizes, bf16, random weights (patched: a hit)",
    "kernels": "Dispatched operations per forward, views left out",
    "forwards": "One generation of the mini model",
}
