"""Small real models from a spec's `mini:` (or its `bench:` sizes), and the forwards of a denoising loop for them.

Offline and random: weights from a seed, inputs by the recipe. Which inputs are the same tensor from call to call is as
in pipelines: `new: step` is shared by the passes of a step, `new: pass` by the steps of a generation. A library whose
models need more than that (a process group, a forward context, KV caches) has a module in `dit_patch.hosts`.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from ..memo.results import map_tensors
from .address import Address
from .model import Spec
from .recipe import Case, Input, Mini

PASSES = ("cond", "uncond")


class KVCaches(list):
    """The KV caches of a model's layers: an argument that forwards write into and hand on to the next, see `repeat`."""


def spec_without_sites(model: str, own: Mini | None = None) -> Spec:
    """Return what stands for the spec of a class that has none: its dotted name, and how to build and call it."""
    return Spec(model=model, blocks=({"at": "blocks", "pattern": 3},), mini=own)


def model_class(spec: Spec) -> type[torch.nn.Module]:
    """Return the spec's (first) class, after preparing its library for use.

    Raises:
        ImportError: where the package is missing or has no such class.
    """
    host = _host(spec)
    if host is not None:
        host.prepare()
    return _import_class(spec.classes[0])


def make_model(spec: Spec, case: Case) -> torch.nn.Module:
    """Build the spec's (first) model with the case's configuration, on the default device."""
    cls, host = model_class(spec), _host(spec)
    return cls(**case.config) if host is None else host.build(cls, case.config)


def class_defaults(cls: type[torch.nn.Module], host: str | None) -> dict[str, Any]:
    """Return what a class of models is built with where nothing is said: its host knows, or its constructor does."""
    own = None if host is None else getattr(import_module(host), "defaults", None)
    if own is not None:
        return own(cls)
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def build(spec: Spec, case: Case, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """Build the spec's (first) model with the case's configuration and random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_model(spec, case).eval().to(dtype)


def autocast(spec: Spec, dtype: torch.dtype, device: torch.device | str) -> AbstractContextManager:
    """Return the autocast that the library's pipelines run the model under, if any; else a context that does nothing.

    FastVideo's stages pass on some arguments in float32, and rely on autocast where the model is in another dtype.
    """
    mixed = getattr(_host(spec), "RUNS_UNDER_AUTOCAST", False) and dtype is not torch.float32
    return torch.autocast(torch.device(device).type, dtype) if mixed else nullcontext()


def pipeline(spec: Spec, model: torch.nn.Module) -> Any:
    """Return what stands for the pipeline of a model part of whose state its stages make; None for other models."""
    make = getattr(_host(spec), "pipeline", None)
    return None if make is None else make(model)


def forwards(
    case: Case,
    size: Mapping[str, int],
    *,
    steps: int = 4,
    passes: tuple[str, ...] = PASSES,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generation: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield the keyword arguments of each forward of one generation: step after step, each with all its passes.

    Args:
        case: says how to make the arguments.
        size: one of the case's sizes, what names in shapes stand for.
        generation: a number; the arguments of another generation have other contents.
    """
    if case.rollout is not None:
        address = Address.parse(case.rollout)
        rollout = getattr(import_module(address.module), address.name)
        yield from rollout(
            case.config, size, steps=steps, passes=passes, dtype=dtype, device=device, generation=generation
        )
        return
    made: dict[tuple, Any] = {}
    names = case.names(size)
    for step in range(steps):
        for number, _ in enumerate(passes):
            arguments = {}
            for name, recipe in case.inputs.items():
                when = {"generation": (), "pass": (number,), "step": (step,), "call": (step, number)}[recipe.new]
                if (name, when) not in made:
                    seed = seed_of(name, generation, recipe.new, when)
                    value = make_input(recipe, names, dtype=dtype, seed=seed, step=step, number=number)
                    made[name, when] = map_tensors(lambda tensor: tensor.to(device), value)
                arguments[name] = made[name, when]
            yield arguments


def repeat(forwards: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the same forwards to run once more, with copies of the KV caches: what is the same object stays so."""
    forwards = list(forwards)  # so that no object's id is used again
    copies: dict[int, KVCaches] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, KVCaches):
            if id(value) not in copies:
                copies[id(value)] = map_tensors(torch.clone, value)
            return copies[id(value)]
        return value

    return [{name: copy(value) for name, value in arguments.items()} for arguments in forwards]


def make_input(recipe: Input, size: Mapping[str, int], *, dtype: torch.dtype, seed: int, step: int, number: int) -> Any:
    """Make one argument by its recipe: a plain value, or CPU tensors, with names in shapes looked up in `size`."""
    if recipe.items:
        return [
            make_input(item, size, dtype=dtype, seed=seed_of(seed, index), step=step, number=number)
            for index, item in enumerate(recipe.items)
        ]
    if recipe.shape is None:
        return recipe.value
    shape = [size[each] if isinstance(each, str) else each for each in recipe.shape]
    kind = dtype if recipe.dtype == "model" else getattr(torch, recipe.dtype)
    if recipe.fill == "randn":
        return noise(shape, seed).to(kind)
    if recipe.fill == "timestep":
        positions = torch.arange(shape[-1]) if len(shape) > 1 else torch.zeros(shape[0])
        return ((999 - 137 * step - 7 * positions) % 1000).expand(shape).to(kind)
    if recipe.fill == "mask":
        valid = max(1, 2 * shape[-1] // 3 - number)
        return (torch.arange(shape[-1]) < valid).expand(shape).to(kind)
    return torch.full(shape, {"zeros": 0, "ones": 1}.get(recipe.fill, recipe.fill), dtype=kind)


def seed_of(*names: Any) -> int:
    """Return a seed for the random numbers of what has these names."""
    return zlib.crc32(repr(names).encode())


def noise(shape: Iterable[int], seed: int) -> torch.Tensor:
    """Return normally distributed float32 numbers on the CPU, always the same ones for a seed."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _host(spec: Spec) -> ModuleType | None:
    host = spec.mini.host if spec.mini else None
    return None if host is None else import_module(host)


def _import_class(name: str) -> type[torch.nn.Module]:
    module, _, qualname = name.rpartition(".")
    try:
        return getattr(import_module(module), qualname)
    except AttributeError as error:
        raise ImportError(f"{module} has no class {qualname}") from error
