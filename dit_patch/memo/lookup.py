"""A memoised call: look it up, or compute, check, place and store it.

Knows how to answer one call given its key; where calls come from (a wrapped attribute, the tensor code between two
submodules) is for others. The first time that results stored under one signature are asked for again, the call is
computed once more and compared bit for bit: a site whose key is too coarse is switched off, not believed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch

from ..findings import Finding, FindingKind, warn
from ..upstream.torch_internals import count_function_modes, storage_id
from .keys import CAPTURING, PLAIN, Content, Pins, Uncacheable, on_a_real_device, same_bits
from .store import Budget, Cache, Entry, map_tensors, mask_parts, tensors_in

CHECKS = ("first", "always", "never")
FULL = "no room beside what the last forwards used; a larger max_bytes would keep it"


class Call(Protocol):
    """One call, asked for more than its key only where it must be computed or stored."""

    def compute(self) -> Any: ...
    def pins(self) -> Pins:
        """What the key depends on staying alive."""

    def signature(self) -> Hashable:
        """Shapes, strides, dtypes and devices of the arguments: what is checked once for each."""

    def sources(self) -> list[torch.Tensor]:
        """Tensors of others that a result might be a view of."""

    def stored(self) -> list[torch.Tensor]:
        """Stored tensors that a result might be a view of: their memory is counted already."""


class Memo:
    """The results of one site's calls, with what the report says of them.

    Args:
        where: `WanTransformer3DModel: rope.forward (specs/diffusers/wan.yaml:6)`, for messages.
        budget: shared by all memos of a handle.
        check: "first" recomputes and compares at the first hit of each new signature, "always" at each, "never" not.
    """

    def __init__(self, where: str, budget: Budget, check: str = "first") -> None:
        self.where = where
        self.cache = Cache(budget)
        self.check = check
        self._always = check == "always"
        self.off: Finding | None = None
        self.bypassed: Counter[str] = Counter()
        self.seconds = float("inf")  # the fastest computation of a result so far
        self._checked: set[Hashable] = set()

    def ready(self, key: Hashable) -> Entry | None:
        """The entry under `key`, counted as a hit, if it may be handed out as it is; None if `recall` must decide."""
        cache = self.cache
        entry = cache.entries.get(key)
        if entry is None or not entry.checked or self._always:
            return None
        for tensor, version in entry.tensors:
            if tensor._version != version:  # upstream.torch_internals.tensor_version, without its call
                return None
        cache.hit(entry)
        return entry

    def found(self, key: Hashable) -> Entry | None:
        """The entry under `key`, in which any stream may stand for all, if it may be handed out as it is."""
        for stored, entry in list(self.cache.entries.items()):
            if stored == key and entry.checked and not entry.written():
                self.cache.hit(entry)
                return entry
        self.bypass(CAPTURING)
        return None

    def recall(self, key: Hashable, call: Call) -> Any:
        """The result under `key`: stored, or computed (and then stored, so that the next call gets the same object)."""
        entry = self.cache.entries.get(key)
        if entry is None:
            return self._store(key, call)
        if entry.written():
            return self._give_up(FindingKind.WRITTEN_INTO, call.compute())
        if not entry.checked or self._always:
            fresh = self.timed(call.compute)
            if not same(entry.value, fresh):
                return self._give_up(FindingKind.TOO_COARSE, fresh)
            entry.checked = True
            self._checked.add(call.signature())
        self.cache.hit(entry)
        return entry.fresh()

    def bypass(self, reason: str) -> None:
        self.bypassed[reason] += 1

    def switch_off(self, kind: FindingKind) -> None:
        """Pass every further call through, and say so once."""
        if self.off is None:
            self.off = Finding(kind, site=self.where)
            self.cache.clear()
            warn(self.off, stacklevel=2)

    def _give_up(self, kind: FindingKind, value: Any) -> Any:
        self.bypass(Finding(kind).note)
        self.switch_off(kind)
        return value

    def timed(self, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, whose time counts for what a hit saves.

        Its tensors are normal ones without history, and so can be used under inference_mode and in training alike; the
        reverse would fail.
        """
        start = time.perf_counter()
        if torch.is_inference_mode_enabled() or torch.is_grad_enabled() or count_function_modes():
            with torch.inference_mode(False), torch.no_grad(), on_a_real_device():
                value = compute()
        else:
            value = compute()
        self.seconds = min(self.seconds, time.perf_counter() - start)
        return value

    def _store(self, key: Hashable, call: Call) -> Any:
        self.cache.miss()
        pins = call.pins()
        value = self.timed(call.compute)
        try:
            value, tensors, nbytes = _private(value, call.sources(), call.stored())
        except Uncacheable as reason:
            self.bypass(str(reason))
            return value
        if not self.cache.budget.fits(nbytes):
            self.bypass(f"a result of {nbytes / 2**20:.1f} MiB is larger than max_bytes")
            return value
        for part in _contents((key,)):
            part.keep()
        entry = Entry(value, tensors, nbytes, pins.alive)
        entry.checked = self.check == "never" or (self.check == "first" and call.signature() in self._checked)
        if not self.cache.put(key, entry):
            self.bypass(FULL)
        return entry.fresh()


def _private(
    value: Any, sources: list[torch.Tensor], stored: list[torch.Tensor]
) -> tuple[Any, list[torch.Tensor], int]:
    """`value` with no tensor that shares memory with `sources`, its tensors, and the bytes that storing it takes."""
    try:
        tensors = list(tensors_in(value))
    except TypeError as error:
        raise Uncacheable(str(error)) from None
    if any(type(tensor) not in PLAIN or tensor.is_meta or tensor.is_inference() for tensor in tensors):
        raise Uncacheable("the result is not a plain tensor")
    shared = {storage_id(tensor) for tensor in sources if type(tensor) in PLAIN}
    if any(storage_id(tensor) in shared for tensor in tensors):
        value = map_tensors(lambda tensor: _detached(tensor, shared), value)
        tensors = list(tensors_in(value))
    sizes = {storage_id(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    counted = {storage_id(tensor) for tensor in stored}
    return value, tensors, sum(size for storage, size in sizes.items() if storage not in counted)


def _detached(tensor: torch.Tensor, shared: set[int]) -> torch.Tensor:
    if storage_id(tensor) not in shared:
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        copy = tensor.clone()
    if copy.stride() != tensor.stride():
        raise Uncacheable("the result is an overlapping view of an argument")
    return copy


def _contents(key: tuple) -> Iterator[Content]:
    for part in key:
        if type(part) is tuple:
            yield from _contents(part)
        elif type(part) is Content:
            yield part


def same(stored: Any, fresh: Any) -> bool:
    """Equality of two results: containers, plain values, and every tensor's bits and strides, where those matter."""
    if isinstance(stored, torch.Tensor) and isinstance(fresh, torch.Tensor):
        return _strides(stored) == _strides(fresh) and same_bits(stored, fresh)
    if type(stored) is not type(fresh):
        return False
    if isinstance(stored, (tuple, list)):
        return len(stored) == len(fresh) and all(map(same, stored, fresh))
    if isinstance(stored, dict):
        return list(stored) == list(fresh) and all(map(same, stored.values(), fresh.values()))
    if type(stored).__name__ == "BlockMask":
        return same(mask_parts(stored), mask_parts(fresh))
    return repr(stored) == repr(fresh)  # nan is itself, and 0.0 is not -0.0


def _strides(tensor: torch.Tensor) -> list[int]:
    """Its strides, but for dimensions of one element, from which there is no step to take."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]
