"""Generations to be measured: raw frames of a pipeline, the time of the whole and that of its transformers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import StepCacheError
from ..handle import with_specs
from ..sites.pipeline_models import find_models
from ..spec.model import Spec
from ..spec.registry import Registry
from ..upstream.diffusers_internals import labelled_progress
from . import call_arguments, pictures


@dataclass(frozen=True)
class Sample:
    """One generation: `frames` (frames, channels, height, width), float32 in [0, 1] on the CPU, as they were decoded.

    `seconds` is the whole call, `dit_seconds` what of it went by in `calls` forwards of the transformers.
    """

    frames: torch.Tensor
    seconds: float
    dit_seconds: float
    calls: int


def generate(pipeline: Any, prompt: str, seed: int, call: dict[str, Any], label: str | None = None) -> Sample:
    """Call a diffusers pipeline with a prompt and what else `call` says; its progress bar has the label.

    Raises:
        StepCacheError: it does not return frames.
    """
    models = [model for model, _ in transformers(pipeline).values()]
    device = next(models[0].parameters()).device
    asked = {"generator": torch.Generator().manual_seed(seed), "output_type": "pt", **call}
    with labelled_progress(pipeline, label), _timed(models, device) as forwards:
        start = _now(device)
        result = pipeline(prompt=prompt, **asked)
        seconds = _now(device) - start
    return Sample(torch.cat(pictures.videos(result, StepCacheError)), seconds, sum(forwards), len(forwards))


def transformers(pipeline: Any) -> dict[str, tuple[torch.nn.Module, Spec]]:
    """The models of a pipeline that there are specs for, each with its spec."""
    return with_specs(find_models(pipeline), Registry())


def device_of(pipeline: Any) -> torch.device:
    """Where the pipeline's transformers are."""
    model, _ = next(iter(transformers(pipeline).values()))
    return next(model.parameters()).device


def check_call(pipeline: Any, call: dict[str, Any]) -> None:
    """Refuse what the pipeline does not take, before anything is generated."""
    call_arguments.check_parameters(pipeline, dict.fromkeys(call, ""), StepCacheError)


@contextmanager
def _timed(models: Iterable[torch.nn.Module], device: torch.device) -> Iterator[list[float]]:
    seconds: list[float] = []
    started: list[float] = []

    def before(*_: Any) -> None:
        started.append(_now(device))

    def after(*_: Any) -> None:
        seconds.append(_now(device) - started.pop())

    hooks = []
    for model in models:
        hooks.append(model.register_forward_pre_hook(before, prepend=True))
        hooks.append(model.register_forward_hook(after))
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
