"""Which generation and which pass of a step a forward belongs to, without the user's help.

Pipelines say it themselves, if one listens: denoising loops begin with `progress_bar` (diffusers' pipelines,
FastVideo's stages) after the scheduler's `set_timesteps`, and diffusers names the pass with `cache_context`. Where
nobody says it, the timesteps do: they fall during a generation, and the passes of a step share one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..sites import layers
from ..sites.pipeline_models import find_stages, unwrap
from ..sites.scope import Frame
from ..upstream.diffusers_internals import RESET_STATE
from ..upstream.torch_internals import tensor_version


class Loops:
    """Listens for denoising loops that begin and generations that end around one model.

    Args:
        target: the pipeline, or the model itself.
        begins: called with the number of steps that the model will take, None where that is not known.
        ends: called when a generation has ended.
    """

    def __init__(
        self,
        target: Any,
        model: torch.nn.Module,
        begins: Callable[[int | None], None],
        ends: Callable[[], None],
    ) -> None:
        self.model, self._begins, self._ends = model, begins, ends
        self._layers: list[layers.Wrapped] = []
        self._boundary: float | None = None
        stages = find_stages(target, model)
        self._owners = stages or [target] * (target is not model)
        for owner in self._owners:
            self._listen(owner, "progress_bar", self._loop_of(owner))
            self._listen(getattr(owner, "scheduler", None), "set_timesteps", self._schedule_of(owner))
        for stage in stages:
            self._listen(stage, "forward", self._stage)
        if target is not model:
            self._listen(target, "maybe_free_model_hooks", self._after)
        self._listen(model, RESET_STATE, self._after)
        self.heard = any(layer.home[1] == "progress_bar" for layer in self._layers)
        """Whether there is somebody who says when a loop begins."""

    def remove(self) -> None:
        for layer in reversed(self._layers):
            layers.remove(layer)

    def join(self) -> None:
        """Whoever listens comes late: a loop has begun already, and counts from here."""
        for owner in self._owners:
            timesteps = getattr(getattr(owner, "scheduler", None), "timesteps", None)
            if timesteps is not None:
                self._begins(self._steps(owner, len(timesteps)))

    def _listen(self, owner: Any, name: str, wrapper: Callable) -> None:
        if callable(getattr(owner, name, None)):
            self._layers.append(layers.install(owner, name, wrapper))

    def _loop_of(self, owner: Any) -> Callable:
        def progress_bar(original, instance, args, kwargs):
            total = kwargs.get("total", args[1] if len(args) > 1 else None)
            self._begins(self._steps(owner, total))
            return original(*args, **kwargs)

        return progress_bar

    def _schedule_of(self, owner: Any) -> Callable:
        def set_timesteps(original, instance, args, kwargs):
            result = original(*args, **kwargs)
            timesteps = getattr(owner.scheduler, "timesteps", None)
            self._begins(self._steps(owner, None if timesteps is None else len(timesteps)))
            return result

        return set_timesteps

    def _stage(self, original, instance, args, kwargs):
        self._boundary = _fastvideo_boundary(*args[:2])
        return self._after(original, instance, args, kwargs)

    def _after(self, original, instance, args, kwargs):
        try:
            return original(*args, **kwargs)
        finally:
            self._ends()

    def _steps(self, owner: Any, total: int | None) -> int | None:
        """How many of a loop's steps fall to this model: with two experts, those on its side of the boundary."""
        timesteps = getattr(getattr(owner, "scheduler", None), "timesteps", None)
        other = getattr(owner, "transformer_2", None)
        boundary = self._boundary if self._boundary is not None else _diffusers_boundary(owner)
        if boundary is None or timesteps is None or not isinstance(other, torch.nn.Module):
            order = getattr(getattr(owner, "scheduler", None), "order", 1)
            return len(timesteps) if order > 1 and timesteps is not None else total
        late = unwrap(other) is self.model
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


class Passes:
    """Tells the passes of a step apart, and, where no loop is heard, generations too.

    diffusers' `cache_context` names a pass; else the calls with one timestep and the same latents are numbered.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._name: str | None = None
        self._layer = None
        if callable(getattr(model, "cache_context", None)):
            self._layer = layers.install(model, "cache_context", self._cache_context)
        self.forget()

    def remove(self) -> None:
        if self._layer is not None:
            layers.remove(self._layer)

    def named(self, name: str | None) -> None:
        """The pass that runs is called that, by a `cache_context` that was entered before anybody listened."""
        self._name = name

    def forget(self) -> None:
        """The next forward is the first of a generation."""
        self._given: tuple[torch.Tensor, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._time: float | None = None
        self._labels: list[str] = []

    def read(self, frame: Frame, *, loops_are_heard: bool) -> tuple[str, bool]:
        """The label of the forward's pass, and whether its timestep shows that a generation begins with it.

        Reading a timestep waits for the device, and is done only where nobody has said what it would tell.
        """
        if self._name is not None and loops_are_heard:
            return self._name, False
        timestep, latents = frame.argument("timestep"), frame.argument("hidden_states")
        if not isinstance(timestep, torch.Tensor) or not isinstance(latents, torch.Tensor):
            return self._name or "pass 1", False
        given = (timestep, latents)
        versions = tuple(0 if each.is_inference() else tensor_version(each) for each in given)
        unchanged = versions == self._versions and all(map(operator.is_, given, self._given))
        began, same = False, unchanged
        if not unchanged:
            time = timestep.max().item()
            if time == self._time:
                same = latents.shape == self._given[1].shape and torch.equal(latents, self._given[1])
            # The second evaluation of a Heun step has its timestep twice, too; taken for a restart, nothing can leak.
            began = self._time is not None and (time > self._time or time == self._time and not same)
            self._time, self._given, self._versions = time, given, versions
        if same and self._name in self._labels:
            began, same = True, False
        if not same:
            self._labels.clear()
        label = self._name or f"pass {len(self._labels) + 1}"
        self._labels.append(label)
        return label, began and not loops_are_heard

    def _cache_context(self, original, instance, args, kwargs):
        return self._named(original(*args, **kwargs), kwargs.get("name", args[0] if args else None))

    @contextmanager
    def _named(self, theirs: Any, name: str | None) -> Iterator[Any]:
        before, self._name = self._name, name
        try:
            with theirs as value:
                yield value
        finally:
            self._name = before
