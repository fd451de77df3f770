"""A site whose results are kept: each call becomes a key, and what is stored under it is handed out again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..memo.context import context_key
from ..memo.keys import Dependencies, Plan, Uncacheable
from ..memo.lookup import Memo
from ..memo.module_guards import ModuleGuards
from ..upstream.torch_internals import is_capturing
from . import scope
from .binding import Attribute, Binding
from .output import Output
from .patch import AttributePatch
from .replaced import Replacement, call_signature
from .scope import Frame


class MemoisedSite(AttributePatch):
    """Keeps what the original gives, or its replacement, which the spec may name with `use:`."""

    def __init__(self, binding: Binding, attribute: Attribute, replacement: Callable | None = None) -> None:
        super().__init__(binding, attribute)
        self.output = Output(self.site)
        #: What makes a key of a call.
        self.key = SiteKey(attribute, binding.model, self.output, self.memo, self.modules)
        #: None where the original computes what is kept.
        self.replacement = None if replacement is None else Replacement(attribute, replacement, self.memo)
        #: How calls are told apart that are checked once each.
        self.signature = call_signature(attribute)
        self._may_be_captured = self.may_be_captured
        self._is_global = attribute.is_global

    def __call__(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        frame = scope.current()
        ordinal = 0
        if frame is not None and frame.model is self.model:
            ordinal = frame.calls.get(self, 0)
            frame.calls[self] = ordinal + 1
            if self.overrides is not None:
                args, kwargs = self.overrides.apply(frame, args, kwargs)
        elif self._is_global:
            return original(*args, **kwargs)
        else:
            frame = None
        memo = self.memo
        if memo.off is not None:
            return original(*args, **kwargs)
        try:
            context = context_key(self._may_be_captured)
            key = self.key.make(context, ordinal, args, kwargs, frame)
        except Uncacheable as reason:
            memo.bypass(str(reason))
            return original(*args, **kwargs)
        if context is not None and is_capturing():  # a CUDA graph must not hold what is meant for later calls
            entry = memo.get_in_capture(key)
            return original(*args, **kwargs) if entry is None else entry.result()
        entry = memo.get(key)
        if entry is not None:
            return entry.result()
        return memo.recall(key, _Call(self, original, args, kwargs, frame))

    def clear(self) -> None:
        """Forget every result, and what was known of the weights."""
        super().clear()
        self.key.forget()

    def depends_on(self, weight: torch.Tensor) -> bool:
        """Return whether a change of this weight makes what is kept worthless."""
        return any(weight is each for each in self.key.tensors())

    def compute(self, original: Callable, args: tuple, kwargs: dict, frame: Frame | None) -> Any:
        """Return a fresh result, where and as the spec wants it."""
        if self.replacement is not None and self.replacement.function is not None:
            return self.output.place(self.replacement(original, args, kwargs), frame)
        return self.output.place(original(*args, **kwargs), frame)


class SiteKey:
    """The key of a site's calls: arguments, context, and a number that changes with weights and attributes."""

    def __init__(
        self,
        attribute: Attribute,
        model: torch.nn.Module,
        output: Output,
        memo: Memo,
        modules: list[torch.nn.Module],
    ) -> None:
        self.arguments = Plan(attribute.parameters, attribute.site.key, attribute.label)
        self._output, self._memo = output, memo
        #: Functions whose values are a part of the key.
        self._values = tuple(attribute.values)
        #: What is known of weights and attributes; None where results depend on none.
        self._guards: ModuleGuards | None = None
        if modules or attribute.weights:
            subtree = attribute.owner is not model
            self._guards = ModuleGuards(modules, model, subtree=subtree, parameters=attribute.weights)
        #: The guards' number at the last call; another one makes all results worthless.
        self._epoch = 0

    def __repr__(self) -> str:
        return f"<SiteKey in epoch {self._epoch}>"

    def make(self, context: Hashable, ordinal: int, args: tuple, kwargs: dict, frame: Frame | None) -> Hashable:
        """Return the key of a call, the `ordinal`-th of its site in this forward.

        Raises:
            Uncacheable: the call cannot have one.
        """
        epoch = 0
        if self._guards is not None:
            epoch = self._guards.epoch()
            if epoch != self._epoch:
                self._memo.cache.clear()
                self._epoch = epoch
        borrowed = self.arguments.borrowed
        if borrowed and frame is None:
            raise Uncacheable("called outside the model's forward")
        parts = self.arguments.parts(args, kwargs, frame)
        if self._output.follows_model:
            parts.append(self._output.device(frame))
        if self._values:
            parts += [read() for read in self._values]
        # What a call borrows from the model's forward does not tell two calls within one forward apart.
        return (epoch, context, ordinal, *parts) if borrowed else (epoch, context, *parts)

    def tensors(self) -> list[torch.Tensor]:
        """Return the weights and buffers that results depend on."""
        return [] if self._guards is None else self._guards.tensors()

    def forget(self) -> None:
        """Let go of what was known of the weights."""
        if self._guards is not None:
            self._guards.forget()


class _Call:
    """One call of a memoised site, as `Memo` asks about it."""

    __slots__ = ("args", "frame", "kwargs", "original", "site")

    def __init__(self, site: MemoisedSite, original: Callable, args: tuple, kwargs: dict, frame: Frame | None) -> None:
        self.site, self.original, self.args, self.kwargs, self.frame = site, original, args, kwargs, frame

    def __repr__(self) -> str:
        return f"<_Call of {self.site!r}>"

    def compute(self) -> Any:
        return self.site.compute(self.original, self.args, self.kwargs, self.frame)

    def dependencies(self) -> Dependencies:
        dependencies = Dependencies()
        self.site.key.arguments.parts(self.args, self.kwargs, self.frame, dependencies)
        return dependencies

    def signature(self) -> Hashable:
        return tuple(self.site.signature.parts(self.args, self.kwargs, None))

    def sources(self) -> list[torch.Tensor]:
        given = [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, torch.Tensor)]
        return given + self.site.key.tensors()

    def stored(self) -> list[torch.Tensor]:
        return []
