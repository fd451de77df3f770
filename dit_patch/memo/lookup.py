"""A memoised call: look it up, or compute, check, place and store it.

Knows how to answer one call given its key; where calls come from (a wrapped attribute, the tensor code between two
submodules) is for others. The first time that results stored under one signature are asked for again, the call is
computed once more and compared bit for bit: a site whose key is too coarse is switched off, not believed. Later hits
are checked, too, at growing distances: after the 8th, the 64th, the 512th.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch

from ..findings import Finding, FindingKind, warn
from ..upstream.torch_internals import count_function_modes, storage_id
from .context import CAPTURING, on_a_real_device
from .keys import PLAIN, Content, Dependencies, Uncacheable
from .results import map_tensors, same, tensors_in
from .store import Budget, Cache, Entry

CHECKS = ("first", "always", "never")
FURTHER = 8  # how much rarer each further check of a hit is
FULL = "no room beside what the last forwards used; a larger max_bytes would keep it"


class Call(Protocol):
    """One call, asked for more than its key only where it must be computed or stored."""

    def compute(self) -> Any: ...
    def dependencies(self) -> Dependencies:
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
        label: `WanTransformer3DModel: rope.forward (specs/diffusers/wan.yaml:6)`, for messages.
        budget: shared by all memos of a handle.
        check: "first" recomputes and compares at the first hit of each new signature and at ever rarer ones, "always"
            at each, "never" not.
    """

    def __init__(self, label: str, budget: Budget, check: str = "first") -> None:
        self.label = label
        self.cache = Cache(budget)
        self.check = check
        self._always = check == "always"
        self.off: Finding | None = None
        self.bypassed: Counter[str] = Counter()
        self.seconds = float("inf")  # the fastest computation of a result so far
        #: The keys of the last two results that were computed, for explanations.
        self.missed: list[Hashable] = []
        self._last_passed: tuple[int, str] = (0, "")
        self._last_miss = 0
        self._checked: set[Hashable] = set()
        #: The number of hits at which one is computed again.
        self._next_check = float("inf") if check == "never" else FURTHER

    def get(self, key: Hashable) -> Entry | None:
        """Return the entry under `key`, counted as a hit, if it may be handed out; None if `recall` must decide."""
        cache = self.cache
        entry = cache.entries.get(key)
        if entry is None or not entry.checked or self._always or cache.hits >= self._next_check:
            return None
        for tensor, version in entry.tensors:
            # upstream.torch_internals.tensor_version, without its call
            if tensor._version != version or tensor.requires_grad:
                return None
        # Cache.hit, without its call
        cache.hits += 1
        budget = cache.budget
        budget.clock = entry.touched = budget.clock + 1
        return entry

    def get_in_capture(self, key: Hashable) -> Entry | None:
        """Return the entry under `key` while a CUDA graph is captured, whatever its stream; None if there is none."""
        for stored, entry in list(self.cache.entries.items()):
            if stored == key and entry.checked and not (entry.is_modified() or entry.is_marked()):
                self.cache.hit(entry)
                return entry
        self.bypass(CAPTURING)
        return None

    def recall(self, key: Hashable, call: Call) -> Any:
        """The result under `key`: stored, or computed (and then stored, so that the next call gets the same object)."""
        entry = self.cache.entries.get(key)
        if entry is not None and entry.is_marked():
            self.cache.drop(entry)
            entry = None
        if entry is None:
            return self._store(key, call)
        if entry.is_modified():
            return self._give_up(FindingKind.WRITTEN_INTO, call.compute())
        if self.cache.hits >= self._next_check:
            self._next_check *= FURTHER
            entry.checked = False
        if not entry.checked or self._always:
            fresh = self.time(call.compute)
            if not same(entry.value, fresh):
                return self._give_up(FindingKind.TOO_COARSE, fresh)
            entry.checked = True
            self._checked.add(call.signature())
        self.cache.hit(entry)
        return entry.result()

    def __repr__(self) -> str:
        return f"<Memo of {self.label}: {self.cache!r}{', off' * (self.off is not None)}>"

    def bypass(self, reason: str) -> None:
        """Count a call that was passed through."""
        self.bypassed[reason] += 1
        self._last_passed = self.calls, reason

    @property
    def calls(self) -> int:
        """How many calls were answered, computed or passed through."""
        return self.cache.hits + self.cache.misses + self.bypassed.total()

    @property
    def last_outcome(self) -> str:
        """What the last call came to, in words."""
        at, reason = self._last_passed
        if at == self.calls:
            return f"passed through: {reason}"
        return "computed and stored" if self._last_miss == self.calls else "a hit"

    def switch_off(self, kind: FindingKind) -> None:
        """Pass every further call through, and say so once."""
        if self.off is None:
            self.off = Finding(kind, site=self.label)
            self.cache.clear()
            warn(self.off, stacklevel=2)

    def _give_up(self, kind: FindingKind, value: Any) -> Any:
        self.bypass(Finding(kind).note)
        self.switch_off(kind)
        return value

    def time(self, compute: Callable[[], Any]) -> Any:
        """Return the result of `compute`, whose time counts for what a hit saves.

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
        self._last_miss = self.calls
        self.missed = [*self.missed[-1:], key]
        dependencies = call.dependencies()
        value = self.time(call.compute)
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
        entry = Entry(value, tensors, nbytes, dependencies.alive)
        entry.checked = self.check == "never" or (self.check == "first" and call.signature() in self._checked)
        if not self.cache.put(key, entry):
            self.bypass(FULL)
        return entry.result()


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
