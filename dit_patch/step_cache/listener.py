"""When denoising loops begin and generations end, as pipelines let one hear.

Loops begin with `progress_bar` (diffusers' pipelines, FastVideo's stages) after the scheduler's `set_timesteps`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..sites import layers, pipeline_models
from ..upstream.diffusers_internals import RESET_STATE

RUN_END = "maybe_free_model_hooks"
"""What pipelines of diffusers call on themselves when they have run."""


class GenerationListener:
    """Listens for denoising loops that begin and generations that end around one model.

    Args:
        target: the pipeline, or the model itself.
        on_start: called with the number of steps that the model will take, None where that is not known; None if only
            ends are of interest. Then the pipeline itself is left alone where its model hears of them.
        on_end: called when a generation has ended.
    """

    def __init__(
        self,
        target: Any,
        model: torch.nn.Module,
        on_start: Callable[[int | None], None] | None,
        on_end: Callable[[], None],
    ) -> None:
        self.target, self.model, self.on_start, self.on_end = target, model, on_start, on_end
        self._after = layers.after(on_end)
        self._layers: list[layers.Wrapped] = []
        self._boundary: float | None = None
        stages = pipeline_models.find_stages(target, model)
        self._owners = stages or [target] * (target is not model)
        for owner in self._owners if on_start is not None else ():
            self._listen(owner, "progress_bar", self._loop_of(owner))
            self._listen(getattr(owner, "scheduler", None), "set_timesteps", self._schedule_of(owner))
        for stage in stages:
            self._listen(stage, "forward", self._stage)
        if target is not model and (on_start is not None or not hasattr(model, RESET_STATE)):
            self._listen(target, RUN_END, self._after)
        self._listen(model, RESET_STATE, self._after)
        #: Whether there is somebody who says when a loop begins.
        self.hears_loops = any(layer.home[1] == "progress_bar" for layer in self._layers)

    def __repr__(self) -> str:
        return f"<GenerationListener of {type(self.model).__name__}: {[layer.home[1] for layer in self._layers]}>"

    def remove(self) -> None:
        """Stop listening."""
        for layer in reversed(self._layers):
            layers.remove(layer)

    def join(self) -> None:
        """Begin late: a loop has begun already, and counts from here."""
        for owner in self._owners:
            timesteps = getattr(getattr(owner, "scheduler", None), "timesteps", None)
            if timesteps is not None:
                self.on_start(self._steps(owner, len(timesteps)))

    def _listen(self, owner: Any, name: str, wrapper: Callable) -> None:
        if callable(getattr(owner, name, None)):
            self._layers.append(layers.install(owner, name, wrapper))

    def _loop_of(self, owner: Any) -> Callable:
        def progress_bar(original, instance, args, kwargs):
            total = kwargs.get("total", args[1] if len(args) > 1 else None)
            self.on_start(self._steps(owner, total))
            return original(*args, **kwargs)

        return progress_bar

    def _schedule_of(self, owner: Any) -> Callable:
        def set_timesteps(original, instance, args, kwargs):
            result = original(*args, **kwargs)
            timesteps = getattr(owner.scheduler, "timesteps", None)
            self.on_start(self._steps(owner, None if timesteps is None else len(timesteps)))
            return result

        return set_timesteps

    def _stage(self, original, instance, args, kwargs):
        self._boundary = _fastvideo_boundary(*args[:2])
        return self._after(original, instance, args, kwargs)

    def _steps(self, owner: Any, total: int | None) -> int | None:
        """Return how many of a loop's steps fall to this model: with two experts, those on its side of the boundary."""
        timesteps = getattr(getattr(owner, "scheduler", None), "timesteps", None)
        other = getattr(owner, "transformer_2", None)
        boundary = self._boundary if self._boundary is not None else _diffusers_boundary(owner)
        if boundary is None or timesteps is None or not isinstance(other, torch.nn.Module):
            order = getattr(getattr(owner, "scheduler", None), "order", 1)
            return len(timesteps) if order > 1 and timesteps is not None else total
        late = pipeline_models.unwrap(other) is self.model
        return sum((time < boundary) == late for time in timesteps.tolist())


def _diffusers_boundary(pipeline: Any) -> float | None:
    ratio = getattr(getattr(pipeline, "config", None), "boundary_ratio", None)
    if ratio is None:
        return None
    return ratio * pipeline.scheduler.config.num_train_timesteps


def _fastvideo_boundary(batch: Any = None, args: Any = None) -> float | None:
    ratio = getattr(batch, "boundary_ratio", None)
    if ratio is None:
        ratio = getattr(getattr(getattr(args, "pipeline_config", None), "dit_config", None), "boundary_ratio", None)
    return None if ratio is None else 1000 * ratio
