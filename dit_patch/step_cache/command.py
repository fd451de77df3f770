"""`dit-patch bench step-cache`: from the words of a command line to a report on disk."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping
from typing import Any

import torch

from .. import extras
from ..demo import quiet_upstream
from ..errors import StepCacheError, quote, suggest
from .config import KNOBS, PRESETS, StepCache

NEEDED = {"skimage": "scikit-image", "matplotlib": "matplotlib", "PIL": "pillow", "diffusers": "diffusers"}


def run(options: argparse.Namespace) -> int:
    """Compare, print the table, write `report.html`, `runs.csv` and `frames.csv`; 1 where the comparison is void."""
    extras.require("bench step-cache", NEEDED, "cache-bench", StepCacheError)
    from . import document, guards, harness

    guards.cache_dit()
    knobs = _pairs("--set", options.set)
    configs = _configs(options, knobs)
    for name in ("steps", "repeats"):
        if getattr(options, name) < 1:
            raise StepCacheError(f"--{name}: {getattr(options, name)} is less than 1")
    with quiet_upstream():
        pipeline, prompts, call = _pipeline(options)
        pipeline.set_progress_bar_config(disable=True)
        result = harness.compare(
            pipeline,
            prompts,
            configs,
            {**call, **_pairs("--call", options.call)},
            steps=options.steps,
            seed=options.seed,
            repeats=options.repeats,
            direct=options.beside_cache_dit,
            say=print,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    title = f"Step caching on {options.model}, {options.steps} steps"
    document.write(options.out / "report.html", result, title)
    tables = harness.write_csv(options.out, result)
    print("\n" + document.plain(result) + "\n")
    print(options.out / "report.html", *tables, sep="\n")
    return 1 if result.failures else 0


def _configs(options: argparse.Namespace, knobs: Mapping[str, Any]) -> dict[str, StepCache]:
    from .harness import thresholds

    names = options.preset or list(PRESETS)
    made = {name: StepCache.of({"preset": name, **knobs}) for name in names}
    if options.threshold:
        return thresholds(options.threshold, made[names[0]])
    return made


def _pairs(flag: str, given: list[str]) -> dict[str, Any]:
    """`name=value` words, values as Python writes them, else as text."""
    pairs = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise StepCacheError(f"{flag}: {quote(word)}: expected NAME=VALUE")
        try:
            pairs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[name] = value
        if flag == "--set" and name == "mask":
            pairs[name] = value  # 1011 is not a number here
        if flag == "--set" and name not in KNOBS:
            raise StepCacheError(f"--set: no knob {quote(name)}{suggest(name, KNOBS)}\n    Knobs: {', '.join(KNOBS)}.")
    return pairs


def _pipeline(options: argparse.Namespace) -> tuple[Any, list[str], dict[str, Any]]:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    prompts = list(options.prompt or ())
    if options.prompts is not None:
        try:
            lines = options.prompts.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise StepCacheError(f"--prompts: {options.prompts}: {error.strerror}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if options.model == "shapes":
        from .. import shapes

        return shapes.pipeline().to(device), prompts or list(shapes.PROMPTS[::10]), dict(shapes.CALL)
    if not prompts:
        raise StepCacheError("no prompts: give --prompt or --prompts")
    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise StepCacheError(f"--dtype: {quote(options.dtype)} is no dtype of torch")
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(options.model, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise StepCacheError(
            f"--model: {quote(options.model)} cannot be loaded: {error}\n"
            "    Give the folder of a saved pipeline, or a hub id; offline only what is in the cache can be had."
        ) from error
    return pipeline.to(device), prompts, {}
