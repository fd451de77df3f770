"""Tiny real models from a spec's `mini:` (or its `bench:` sizes), and the forwards of a denoising loop for them.

Offline and random: weights from a seed, inputs by the recipe. Which inputs are the same tensor from call to call is as
in pipelines: `new: step` is shared by the passes of a step, `new: pass` by the steps of a generation.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import torch

from .spec import Case, Input, Spec

PASSES = ("cond", "uncond")


def model_class(name: str) -> type[torch.nn.Module]:
    """The class at a dotted name.

    Raises:
        ImportError: where the package is missing or has no such class.
    """
    module, _, qualname = name.rpartition(".")
    try:
        return getattr(import_module(module), qualname)
    except AttributeError as error:
        raise ImportError(f"{module} has no class {qualname}") from error


def build(spec: Spec, case: Case, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """The spec's (first) model with the case's configuration and random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(spec.classes[0])(**case.config).eval().to(dtype)


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
    """The keyword arguments of every forward of one generation, in order: each step's passes one after the other."""
    made: dict[tuple, Any] = {}
    for step in range(steps):
        for number, _ in enumerate(passes):
            arguments = {}
            for name, recipe in case.inputs.items():
                when = {"generation": (), "pass": (number,), "step": (step,), "call": (step, number)}[recipe.new]
                if (name, when) not in made:
                    seed = zlib.crc32(repr((name, generation, recipe.new, when)).encode())
                    value = make(recipe, size, dtype=dtype, seed=seed, step=step, number=number)
                    made[name, when] = value.to(device) if isinstance(value, torch.Tensor) else value
                arguments[name] = made[name, when]
            yield arguments


def make(recipe: Input, size: Mapping[str, int], *, dtype: torch.dtype, seed: int, step: int, number: int) -> Any:
    """One input by its recipe: a literal, or a CPU tensor whose shape's names are looked up in `size`."""
    if recipe.shape is None:
        return recipe.value
    shape = [size[each] if isinstance(each, str) else each for each in recipe.shape]
    kind = dtype if recipe.dtype == "model" else getattr(torch, recipe.dtype)
    if recipe.fill == "randn":
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(kind)
    if recipe.fill == "timestep":
        positions = torch.arange(shape[-1]) if len(shape) > 1 else torch.zeros(shape[0])
        return ((999 - 137 * step - 7 * positions) % 1000).expand(shape).to(kind)
    if recipe.fill == "mask":
        valid = max(1, 2 * shape[-1] // 3 - number)
        return (torch.arange(shape[-1]) < valid).expand(shape).to(kind)
    return torch.full(shape, {"zeros": 0, "ones": 1}.get(recipe.fill, recipe.fill), dtype=kind)
