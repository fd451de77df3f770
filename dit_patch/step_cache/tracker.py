"""Which generation and which pass of a step a forward belongs to: what is heard and what is read, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..sites import scope
from ..sites.scope import Frame
from .listener import GenerationListener
from .passes import PassReader


class GenerationTracker:
    """Follows the generations of one model.

    Args:
        target: the pipeline, or the model itself.
        parameters: names of the forward's arguments, where its signature does not say.
        on_start: called with the number of steps, if that is known, when a denoising loop is heard to begin.
        on_end: called when a generation is heard to end.
    """

    def __init__(
        self,
        target: Any,
        model: torch.nn.Module,
        parameters: Sequence[str],
        on_start: Callable[[int | None], None],
        on_end: Callable[[], None],
    ) -> None:
        self.target, self.model = target, model
        self._positions = {name: at for at, name in enumerate(parameters or scope.parameters(model))}
        self._passes = PassReader(model)
        self.listener = GenerationListener(target, model, on_start, on_end)

    def __repr__(self) -> str:
        return f"<GenerationTracker: {self.listener!r}>"

    def listen_to(self, target: Any) -> None:
        """Listen to `target`, the pipeline, if it is another one than before."""
        if target is None or target is self.target:
            return
        self.listener.remove()
        self.target = target
        self.listener = GenerationListener(target, self.model, self.listener.on_start, self.listener.on_end)

    def remove(self) -> None:
        """Stop listening."""
        self.listener.remove()
        self._passes.remove()

    def join(self, label: str | None) -> None:
        """Begin within a generation, before its first forward, in the pass of that name."""
        self.listener.join()
        self._passes.set_name(label)

    def leave_pass(self) -> None:
        """Forget the name that `join` was given: that pass has ended."""
        self._passes.set_name(None)

    def forget(self) -> None:
        """Take the next forward for the first of a generation."""
        self._passes.forget()

    def read(self, args: tuple, kwargs: dict) -> tuple[str, bool]:
        """Return the label of the forward's pass, and whether its timestep shows that a generation begins with it."""
        frame = Frame(self.model, self._positions, args, kwargs, None)
        return self._passes.read(frame, hears_loops=self.listener.hears_loops)
