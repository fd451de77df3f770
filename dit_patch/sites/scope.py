"""Tells which forward of which patched model is running, and with which arguments.

Torch's own forward hooks stand around a model's forward (accelerate cannot displace them, and they run when it raises).
A `ContextVar` holds the innermost `Frame`, so that threads and nested models do not see each other's.
Knows nothing about specs, keys or caches.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from ..upstream.torch_internals import drop_forward_hooks, forward_pre_hooks, move_pre_hook_to_end

_current: ContextVar[Frame | None] = ContextVar("dit_patch_frame", default=None)
_is_compiling = torch.compiler.is_compiling

current: Callable[[], Frame | None] = _current.get

MISSING = object()
_NAMELESS = "the model was called with positional arguments that its spec does not name"
_HOOKED = "a hook that was registered after apply() may have changed the model's arguments"


class Frame:
    """One forward of an owned model: its arguments, and what was called in it.

    `calls` counts, by whatever object a caller chooses, how often something happened in this forward.
    """

    __slots__ = ("_undo", "args", "calls", "epoch", "kwargs", "model", "parent", "positions", "refusal")

    def __init__(self, model: torch.nn.Module, positions: dict[str, int], args: tuple, kwargs: dict, parent) -> None:
        self.model, self.positions, self.args, self.kwargs, self.parent = model, positions, args, kwargs, parent
        #: Why the arguments cannot be gone by; None if they can.
        self.refusal = _NAMELESS if len(args) > len(positions) else None
        #: The number of the model's guards at the forward's start.
        self.epoch = 0
        self.calls: dict[Any, int] = {}
        self._undo: list[tuple[Any, Callable[[], None]]] = []

    def __repr__(self) -> str:
        return f"<Frame of {type(self.model).__name__}: {len(self.calls)} called>"

    def argument(self, name: str) -> Any:
        """Return the forward's argument `name` as the caller gave it; None where it was left to its default."""
        value = self.kwargs.get(name, MISSING)
        if value is MISSING:
            position = self.positions.get(name, len(self.args))
            value = self.args[position] if position < len(self.args) else None
        return value

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that were given and have names, by name."""
        named = {name: self.args[at] for name, at in self.positions.items() if at < len(self.args)}
        return named | self.kwargs

    @property
    def device(self) -> torch.device | None:
        """The device that the model runs on: that of its first tensor argument."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, torch.Tensor):
                return value.device
        return None

    def on_exit(self, key: Any, undo: Callable[[], None]) -> None:
        """Have `undo` called when the forward ends, however it ends; last in, first out."""
        self._undo.append((key, undo))

    def exit_early(self, key: Any) -> None:
        """Call now, in their order, what was to be undone under `key`."""
        due = [each for each in self._undo if each[0] is key]
        for each in due:
            self._undo.remove(each)
            each[1]()

    def close(self) -> None:
        """End the forward: undo whatever is left to undo."""
        while self._undo:
            _, undo = self._undo.pop()
            undo()


class Hook:
    """A torch hook of ours: silent while compiling, and nothing at all in a copy or a pickle of its module."""

    def __init__(self, callback: Callable, owner: Any = None) -> None:
        self.callback = callback
        #: The object that a hook found on a model belongs to.
        self.owner = owner

    def __repr__(self) -> str:
        return f"<Hook of {self.owner!r}>"

    def __call__(self, *args):
        if not _is_compiling():
            self.callback(*args)

    def __deepcopy__(self, memo):
        return contextlib.nullcontext().__exit__

    def __reduce_ex__(self, protocol):
        # Does nothing with any arguments, and is found without dit_patch.
        return getattr, (contextlib.nullcontext(), "__exit__")


class Scope:
    """The pair of hooks on one model that opens a frame for each of its forwards.

    Args:
        finished: called with the frame after each forward that did not raise.
        started: called with the frame before each forward.
        names: the forward's positional parameters, where its signature does not say.
        handle: the one that watches the model.
        failed: called after each forward that raised.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        finished: Callable[[Frame], None],
        started: Callable[[Frame], None] | None = None,
        names: Sequence[str] = (),
        handle: Any = None,
        failed: Callable[[], None] | None = None,
    ) -> None:
        self.failed = failed
        self.model, self.finished, self.started, self.handle = model, finished, started, handle
        self.positions = {name: at for at, name in enumerate(names or parameters(model))}
        self._hooks = (
            model.register_forward_pre_hook(Hook(self.enter, self), with_kwargs=True),
            model.register_forward_hook(Hook(self.leave, self), with_kwargs=True, always_call=True),
        )

    def __repr__(self) -> str:
        return f"<Scope of {type(self.model).__name__}>"

    def remove(self) -> None:
        """Stop watching the model."""
        for hook in self._hooks:
            hook.remove()
        self._abandon()

    def enter(self, module: torch.nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        """Open a frame: the forward begins."""
        if kwargs is None:
            # Another hook of this very forward has removed this one; torch then calls it as a hook without them.
            return
        # A model is never inside its own forward; but torch runs no hooks for an interrupt.
        self._abandon()
        frame = Frame(self.model, self.positions, args, kwargs, _current.get())
        number = self._hooks[0].id
        if next(reversed(forward_pre_hooks(module))) != number:
            frame.refusal = _HOOKED
            move_pre_hook_to_end(module, number)
        _current.set(frame)
        if self.started is not None:
            self.started(frame)

    def leave(self, module: torch.nn.Module, args: tuple, *kwargs_and_output: Any) -> None:
        """Close the frame: the forward has ended, or raised, and then without an output."""
        if len(kwargs_and_output) < 2:  # removed, as above
            return
        output = kwargs_and_output[1]
        frame = _current.get()
        if frame is None or frame.model is not self.model:
            return
        _current.set(frame.parent)
        frame.close()
        if output is not None:
            self.finished(frame)
        elif self.failed is not None:
            self.failed()

    def _abandon(self) -> None:
        """End the forwards of this model that were left without `leave`, and those inside them."""
        frame, left = _current.get(), []
        while frame is not None:
            left.append(frame)
            if frame.model is self.model:
                _current.set(frame.parent)
                while left:
                    left.pop(0).close()
            frame = frame.parent


def scope_of(model: torch.nn.Module) -> Scope | None:
    """Return the scope that watches `model`, read from the model's own hooks; None if none does."""
    for hook in forward_pre_hooks(model).values():
        if isinstance(hook, Hook) and isinstance(hook.owner, Scope):
            return hook.owner
    return None


def parameters(model: torch.nn.Module) -> list[str]:
    """Return the names of the forward's arguments, seen through decorators; without `self`, `*args`, `**kwargs`."""
    given = list(inspect.signature(inspect.unwrap(type(model).forward)).parameters.values())[1:]
    return [each.name for each in given if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def takes_any(model: torch.nn.Module) -> bool:
    """Return whether the model's forward takes keyword arguments that its signature does not name."""
    given = inspect.signature(inspect.unwrap(type(model).forward)).parameters.values()
    return any(each.kind is each.VAR_KEYWORD for each in given)


def forget_copies(model: torch.nn.Module) -> None:
    """Drop what `Hook` has become in a copied or unpickled model."""
    drop_forward_hooks(model, lambda hook: getattr(hook, "__func__", None) is contextlib.nullcontext.__exit__)


def has_own_forward(model: torch.nn.Module, classes: tuple[str, ...]) -> bool:
    """Return whether the model's class has another forward than the first of `classes` that it inherits from."""
    for base in type(model).__mro__:
        if f"{base.__module__}.{base.__qualname__}" in classes:
            return inspect.unwrap(type(model).forward) is not inspect.unwrap(base.forward)
    return False
