"""A site at which a function stands in for the original, which the spec names with `use:`; nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..findings import Finding, FindingKind, warn
from ..memo.context import context_key
from ..memo.keys import PLAIN, Plan, Uncacheable
from ..memo.lookup import Memo
from ..memo.results import same
from ..upstream.torch_internals import is_capturing
from . import scope
from .binding import Attribute, Binding
from .output import Output
from .patch import AttributePatch

_ALIKE = {bool, int, str, type(None)}


class Replacement:
    """The function of `use:`, held to the original bit for bit at the first sight of each signature.

    Where it fails at first sight (a kernel that cannot be compiled here, say) or differs, it gives way to the original
    for good, with one warning. Once a signature is proven, `function.ready`, where a function has that, may say what
    answers further calls of it sooner; that is held to the original, too.

    Args:
        function: takes wrapt's four arguments.
        memo: that of the site, which is switched off if nothing but the replacement was to be had from it.
    """

    def __init__(self, attribute: Attribute, function: Callable, memo: Memo) -> None:
        self.attribute, self.memo = attribute, memo
        #: None once it has given way.
        self.function: Callable | None = function
        self._signature = call_signature(attribute)
        #: What answers calls of a signature that was proven; None: the function itself does.
        self._ready: dict[Hashable, Callable[[tuple, dict], Any] | None] = {}

    def __repr__(self) -> str:
        return f"<Replacement {self.attribute.site.use}: proven for {len(self._ready)} signatures>"

    def __call__(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        """Return the replacement's result, or the original's where they differ."""
        check = self.memo.check
        signature = self.signature(args, kwargs)
        if signature in self._ready and check != "always":
            ready = self._ready[signature]
            return self.function(original, self.attribute.owner, args, kwargs) if ready is None else ready(args, kwargs)
        is_proven = signature in self._ready
        try:
            result = self.function(original, self.attribute.owner, args, kwargs)
            ready = self._find_ready(args, kwargs)
            again = result if ready is None else ready(args, kwargs)
        except (Uncacheable, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if is_proven:
                raise
            expected = original(*args, **kwargs)
            message = (str(error) or "no message").splitlines()[0]
            self._give_way(f"failed ({type(error).__name__}: {message})")
            return expected
        if check == "never":
            self._ready[signature] = ready
            return result
        expected = original(*args, **kwargs)
        if not same(expected, result):
            self._give_way("is not equal to the original here")
            return expected
        self._ready[signature] = ready if same(expected, again) else None
        return result

    def forget(self) -> None:
        """Have the next call of each signature compared again: something that the original depends on has changed."""
        self._ready.clear()

    def in_capture(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        """Return the result while a CUDA graph is captured, when nothing can be compared."""
        if self.memo.check == "never" or self.signature(args, kwargs) in self._ready:
            return self.function(original, self.attribute.owner, args, kwargs)
        return original(*args, **kwargs)

    def signature(self, args: tuple, kwargs: dict) -> Hashable:
        """Return shapes, strides, dtypes and devices of the arguments."""
        found = _quick_signature(args)
        if found is None or kwargs:
            return tuple(self._signature.parts(args, kwargs, None))
        return found

    def _find_ready(self, args: tuple, kwargs: dict) -> Callable[[tuple, dict], Any] | None:
        find = getattr(self.function, "ready", None)
        return None if find is None else find(args, kwargs)

    def _give_way(self, why: str) -> None:
        self.function = None
        self._ready = {}
        site, label = self.attribute.site, self.attribute.label
        finding = Finding(FindingKind.REPLACEMENT_FAILED, site=f"{label}: {site.use}", detail=why)
        warn(finding, stacklevel=3)
        if not site.key:
            self.memo.off = finding


def call_signature(attribute: Attribute) -> Plan:
    """Return how calls of the attribute are told apart by shapes, strides, dtypes and devices."""
    return Plan(attribute.parameters, {}, attribute.label, default=("shape", "dtype", "device", "stride"))


def _quick_signature(values: tuple) -> tuple | None:
    """Return what `call_signature` tells calls apart by, sooner; None where a value is of another kind."""
    found = []
    for value in values:
        kind = type(value)
        if kind in PLAIN:
            found.append((value.shape, value.stride(), value.dtype, value.device))
        elif kind in _ALIKE:
            found.append((kind, value))
        elif kind is tuple:
            inner = _quick_signature(value)
            if inner is None:
                return None
            found.append(inner)
        else:
            return None
    return tuple(found)


class ReplacedSite(AttributePatch):
    """Calls the replacement in place of the original, inside forwards of the model."""

    def __init__(self, binding: Binding, attribute: Attribute, function: Callable) -> None:
        super().__init__(binding, attribute)
        self.replacement = Replacement(attribute, function, self.memo)
        self._output = Output(self.site)
        self._may_be_captured = self.may_be_captured
        #: What the original depends on besides arguments.
        self.guards = binding.add_guards(attribute)
        self._epoch = 0

    def __call__(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        frame = scope.current()
        if frame is not None and frame.model is self.model:
            frame.calls[self] = frame.calls.get(self, 0) + 1
            if self.overrides is not None:
                args, kwargs = self.overrides.apply(frame, args, kwargs)
            if frame.epoch != self._epoch:
                self.replacement.forget()
                self._epoch = frame.epoch
        elif self.attribute.is_global:
            return original(*args, **kwargs)
        else:
            frame = None
        memo = self.memo
        if memo.off is not None:
            return original(*args, **kwargs)
        try:
            if context_key(self._may_be_captured) is not None and is_capturing():
                return self.replacement.in_capture(original, args, kwargs)
            result = self._output.place(self.replacement(original, args, kwargs), frame)
        except Uncacheable as reason:
            memo.bypass(str(reason))
            return original(*args, **kwargs)
        memo.cache.hits += memo.off is None
        return result
