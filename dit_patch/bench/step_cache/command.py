"""`dit-patch bench step-cache`: from the words of a command line to a report on disk."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ... import extras
from ...errors import StepCacheError, quote, suggest
from ...outputs import check_folder, write_errors
from ...pipelines import call_arguments, loading, sampling
from ...step_cache.config import KNOBS, PRESETS, StepCache
from ...upstream.verbosity import quiet_upstream
from ..rows import CsvFile
from ..surroundings import environment
from .harness import Generation

NEEDED = {
    "jinja2": "jinja2",
    "skimage": "scikit-image",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "diffusers": "diffusers",
}


def run(options: argparse.Namespace) -> int:
    """Compare, print the table, write the report and its tables; 1 where the comparison is void."""
    extras.require("bench step-cache", NEEDED, "cache-bench", StepCacheError)
    from ...step_cache import requirements
    from . import document, harness

    requirements.cache_dit()
    knobs = _knobs(options.set)
    configs = _configs(options, knobs)
    more = call_arguments.parse_pairs("--call", options.call, error=StepCacheError)
    check_folder("--out", options.out)
    with quiet_upstream():
        pipeline, prompts, call = _pipeline(options)
        pipeline.set_progress_bar_config(disable=True)
        result = harness.compare(
            pipeline,
            prompts,
            configs,
            {**call, **more},
            steps=options.steps,
            seed=options.seed,
            repeats=options.repeats,
            direct=options.beside_cache_dit,
            say=partial(print, flush=True),
            keep=_keeper(options.out, pipeline),
        )
    print("\n" + document.plain(result) + "\n")
    title = f"Step caching on {options.model}, {options.steps} steps"
    with write_errors("--out", options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        document.write(options.out / "report.html", result, title)
        tables = harness.write_csv(options.out, result)
    print(options.out / "report.html", *tables, options.out / "generations.csv", sep="\n")
    return 1 if result.failures else 0


def _keeper(folder: Path, pipeline: Any) -> Callable[[Generation], None]:
    """Return what writes each generation to `generations.csv` as soon as it is timed."""
    files: list[CsvFile] = []

    def keep(generation: Generation) -> None:
        if not files:
            surroundings = environment(str(sampling.device_of(pipeline)))
            with write_errors("--out", folder):
                folder.mkdir(parents=True, exist_ok=True)
            files.append(CsvFile(folder / "generations.csv", Generation, surroundings, "--out"))
        files[0].add(generation)

    return keep


def _configs(options: argparse.Namespace, knobs: Mapping[str, Any]) -> dict[str, StepCache]:
    from .harness import thresholds

    names = options.preset or list(PRESETS)
    made = {name: StepCache.of({"preset": name, **knobs}) for name in names}
    if options.threshold:
        return thresholds(options.threshold, made[names[0]])
    return made


def _knobs(words: list[str]) -> dict[str, Any]:
    # A mask such as 1011 is no number.
    found = call_arguments.parse_pairs("--set", words, as_text=("mask",), error=StepCacheError)
    for name in found:
        if name not in KNOBS:
            raise StepCacheError(f"--set: no knob {quote(name)}{suggest(name, KNOBS)}\n    Knobs: {', '.join(KNOBS)}.")
    return found


def _pipeline(options: argparse.Namespace) -> tuple[Any, list[str], dict[str, Any]]:
    device = loading.device(options.device)
    prompts = list(options.prompt or ())
    if options.prompts is not None:
        try:
            lines = options.prompts.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise StepCacheError(f"--prompts: {options.prompts}: {error.strerror}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts and options.model == loading.TRAINED_EXAMPLE:
        from ...pipelines import trained_example

        prompts = list(trained_example.PROMPTS[::10])
    if not prompts:
        raise StepCacheError("no prompts: give --prompt or --prompts")
    pipeline = loading.load(options.model, loading.dtype(options.dtype))
    return pipeline.to(device), prompts, loading.call_defaults(options.model)
