"""A site whose results are kept: each call becomes a key, and what is stored under it is handed out again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..memo.context import context_key
from ..memo.keys import Dependencies, Plan, Uncacheable
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
        #: What makes a key of the arguments.
        self.plan = Plan(attribute.parameters, attribute.site.key, attribute.label, aliases=attribute.aliases)
        #: What results depend on besides arguments.
        self.guards = binding.add_guards(attribute)
        #: None where the original computes what is kept.
        self.replacement = None if replacement is None else Replacement(attribute, replacement, self.memo)
        #: How calls are told apart that are checked once each.
        self.signature = call_signature(attribute)
        self._forget = binding.guards.forget
        self._call = _make_call(self, binding)

    def __call__(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        return self._call(original, instance, args, kwargs)

    @property
    def target(self) -> Callable:
        """What the layer calls."""
        return self._call

    def clear(self) -> None:
        """Forget every result, and what was known of what they depend on."""
        super().clear()
        self._forget()

    def depends_on(self, weight: torch.Tensor) -> bool:
        """Return whether a change of this weight makes what is kept worthless."""
        return any(weight is each for each in self.guards.weights.tensors())

    def compute(self, original: Callable, args: tuple, kwargs: dict, frame: Frame | None) -> Any:
        """Return a fresh result, where and as the spec wants it."""
        if self.replacement is not None and self.replacement.function is not None:
            return self.output.place(self.replacement(original, args, kwargs), frame)
        return self.output.place(original(*args, **kwargs), frame)


def _make_call(site: MemoisedSite, binding: Binding) -> Callable[[Callable, Any, tuple, dict], Any]:
    """Return the function that answers a site's calls, with all that it needs at hand for the sake of its speed."""
    model, memo, overrides = site.model, site.memo, site.overrides
    guards, weights, look = site.guards, site.guards.weights, binding.guards.look
    may_be_captured, is_global = site.may_be_captured, site.attribute.is_global
    parts, borrows = site.plan.parts, bool(site.plan.borrowed)
    values, output = tuple(site.attribute.values), site.output
    follows_model, is_grad_enabled = output.follows_model, torch.is_grad_enabled
    current, cache = scope.current, memo.cache
    replacement = site.replacement
    known_epoch = known_number = 0

    def call(original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        nonlocal known_epoch, known_number
        frame = current()
        if frame is not None and frame.model is model:
            ordinal = frame.calls.get(site, 0)
            frame.calls[site] = ordinal + 1
            if overrides is not None:
                args, kwargs = overrides.apply(frame, args, kwargs)
            epoch = frame.epoch
        elif is_global:
            return original(*args, **kwargs)
        else:
            frame, ordinal, epoch = None, 0, look()
        if memo.off is not None:
            return original(*args, **kwargs)
        if guards.refusal is not None:
            memo.bypass(guards.refusal)
            return original(*args, **kwargs)
        try:
            context = context_key(may_be_captured)
            number = weights.number if weights.still_hold() and not is_grad_enabled() else weights.epoch()
            if epoch != known_epoch or number != known_number:
                cache.clear()  # it cannot be asked for any more
                if replacement is not None:
                    replacement.forget()
                known_epoch, known_number = epoch, number
            if borrows and frame is None:
                raise Uncacheable("called outside the model's forward")
            found = parts(args, kwargs, frame)
            if follows_model:
                found.append(output.device(frame))
            if values:
                found += [read() for read in values]
            # What a call borrows from the model's forward does not tell two calls within one forward apart.
            key = (epoch, number, context, ordinal if borrows else 0, *found)
        except Uncacheable as reason:
            memo.bypass(str(reason))
            return original(*args, **kwargs)
        if context is not None and is_capturing():  # a CUDA graph must not hold what is meant for later calls
            entry = memo.get_in_capture(key)
            return original(*args, **kwargs) if entry is None else entry.result()
        entry = memo.get(key)
        if entry is not None:
            return entry.result()
        return memo.recall(key, _Call(site, original, args, kwargs, frame))

    return call


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
        self.site.plan.parts(self.args, self.kwargs, self.frame, dependencies)
        return dependencies

    def signature(self) -> Hashable:
        return tuple(self.site.signature.parts(self.args, self.kwargs, None))

    def sources(self) -> list[torch.Tensor]:
        given = [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, torch.Tensor)]
        return given + self.site.guards.weights.tensors()

    def stored(self) -> list[torch.Tensor]:
        return []
