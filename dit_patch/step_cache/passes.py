"""Which pass of a step a forward is, without the user's help.

diffusers names the pass with `cache_context`. Where nobody says it, the timesteps do: they fall during a generation,
and the passes of a step share one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..sites import layers
from ..sites.scope import Frame
from ..upstream.torch_internals import tensor_version


class PassReader:
    """Tells the passes of a step apart, and, where no loop is heard, generations too.

    diffusers' `cache_context` names a pass; else the calls with one timestep and the same latents are numbered.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._name: str | None = None
        self._layer = None
        if callable(getattr(model, "cache_context", None)):
            self._layer = layers.install(model, "cache_context", self._cache_context)
        self.forget()

    def __repr__(self) -> str:
        return f"<PassReader: {self._name or 'no name'}, {len(self._labels)} passes at this timestep>"

    def remove(self) -> None:
        """Stop listening for names."""
        if self._layer is not None:
            layers.remove(self._layer)

    def set_name(self, name: str | None) -> None:
        """Take the name of the running pass from a `cache_context` that was entered before anybody listened."""
        self._name = name

    def forget(self) -> None:
        """Take the next forward for the first of a generation."""
        self._given: tuple[torch.Tensor, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._time: float | None = None
        self._labels: list[str] = []

    def read(self, frame: Frame, *, hears_loops: bool) -> tuple[str, bool]:
        """Return the label of the forward's pass, and whether its timestep shows that a generation begins with it.

        Reading a timestep waits for the device, and is done only where nobody has said what it would tell.
        """
        if self._name is not None and hears_loops:
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
        return label, began and not hears_loops

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
