"""A site whose result nobody reads: what is handed out instead is small, and useless to whoever reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..memo.context import context_key
from ..memo.keys import Uncacheable
from ..memo.results import OPAQUE, copier, flatten
from ..upstream.torch_internals import is_capturing
from . import scope
from .binding import Attribute, Binding
from .memoised import MemoisedSite
from .output import Output
from .patch import AttributePatch
from .replaced import ReplacedSite
from .scope import Frame


class StandInSite(AttributePatch):
    """Hands out a stand-in in a forward in which nobody reads the result; otherwise it does what `otherwise` does.

    A spec says `unused: true`, or `unused_with:` the arguments of the model's forward with which it is unused.
    """

    def __init__(self, binding: Binding, attribute: Attribute, otherwise: MemoisedSite | ReplacedSite) -> None:
        super().__init__(binding, attribute)
        #: What answers calls whose result is read; the counters are one.
        self.otherwise, self.memo = otherwise, otherwise.memo
        #: What tells whether a hook reads the result.
        self.guards = otherwise.guards
        self._output = Output(self.site)
        self._unused_with = tuple(name.removeprefix("model.") for name in self.site.unused_with)
        self._may_be_captured = self.may_be_captured
        #: What hands out stand-ins, by the device that they are on; in containers that callers may change.
        self._results: dict[torch.device | None, Callable[[], Any]] = {}

    def __call__(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        frame = scope.current()
        if frame is None or frame.model is not self.model:
            return self.otherwise(original, instance, args, kwargs)
        frame.calls[self] = frame.calls.get(self, 0) + 1
        if self.memo.off is not None or not self._is_unread(frame):
            return self.otherwise(original, instance, args, kwargs)
        if self.overrides is not None:
            args, kwargs = self.overrides.apply(frame, args, kwargs)
        try:
            context = context_key(self._may_be_captured)
        except Uncacheable as reason:
            self.memo.bypass(str(reason))
            return original(*args, **kwargs)
        device = self._output.device(frame)
        if context is not None and is_capturing():
            return self._results[device]() if device in self._results else original(*args, **kwargs)
        if device not in self._results:
            self.memo.cache.miss()
            result = self.memo.time(lambda: original(*args, **kwargs))
            value = stand_in(result, device, self._output.dtype)
            self._results[device] = copier(value) or (lambda: value)
        else:
            self.memo.cache.hits += 1
        return self._results[device]()

    def clear(self) -> None:
        """Forget every result."""
        self._results = {}
        self.otherwise.clear()

    def depends_on(self, weight: torch.Tensor) -> bool:
        """Return whether a change of this weight makes what is kept worthless."""
        return self.otherwise.depends_on(weight)

    def _is_unread(self, frame: Frame) -> bool:
        """Return whether nobody reads the result: in any forward, or in this one, which got all of `unused_with`."""
        if self.guards.is_observed or (frame.refusal is not None and self._unused_with):
            return False
        if self.site.unused:
            return True
        given = [frame.argument(name) for name in self._unused_with]
        return bool(given) and all(map(_is_given, given))


def _is_given(value: Any) -> bool:
    """Return whether an argument was given, and whole if it is a list."""
    return value is not None and not (isinstance(value, (list, tuple)) and any(item is None for item in value))


def stand_in(result: Any, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """Return the like of `result`: NaN (0 for integers) in its tensors, and a flex BlockMask that fits no sequence.

    Tensors have their shapes, but only one element of memory; they are on `device` and of `dtype` if given.
    """
    leaves, rebuild = flatten(result)
    return rebuild(_stand_in_for(leaf, device, dtype) for leaf in leaves)


def _stand_in_for(leaf: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    if isinstance(leaf, torch.Tensor):
        return _unreadable(leaf, device or leaf.device, dtype or leaf.dtype)
    return _fits_nothing(leaf, device) if type(leaf).__name__ in OPAQUE else leaf


def _unreadable(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    special = dtype.is_floating_point or dtype.is_complex
    return torch.full((), float("nan") if special else 0, dtype=dtype, device=device).expand(tensor.shape)


def _fits_nothing(mask: Any, device: torch.device | None) -> Any:
    """Return a mask of one query and one key, which flex_attention refuses for any others."""
    blocks = torch.zeros((1, 1, 1), dtype=torch.int32, device=device or mask.kv_num_blocks.device)
    indices = blocks.unsqueeze(-1)
    return type(mask).from_kv_blocks(blocks, indices, BLOCK_SIZE=mask.BLOCK_SIZE, seq_lengths=(1, 1))
