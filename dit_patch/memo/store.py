"""Byte-bounded storage of results, least recently used first out.

One `Cache` per patched attribute, one `Budget` per handle that all of them share. Knows nothing about how keys are
made or results computed; it only notices when a stored tensor has been written into, or can never be asked for again.
"""

from __future__ import annotations

import heapq
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..upstream.torch_internals import tensor_version
from .results import copier, map_tensors

MOST = 4096  # entries of a site: more than any schedule has steps and passes
_SHARE = 4  # entries that are looked at for each one that comes
LAST = 4  # forwards whose results are not given up: the passes of a step, with some to spare


class Entry:
    """One stored result: `value` as it goes out, its tensors with their versions, and what its key depends on.

    `alive` holds one callable per object that the key names by identity; once one of them answers False, the entry
    cannot be hit any more.
    """

    __slots__ = ("_copy", "alive", "cache", "checked", "key", "nbytes", "tensors", "touched", "value", "__weakref__")

    def __init__(self, value: Any, tensors: list[torch.Tensor], nbytes: int, alive: list[Callable[[], bool]]) -> None:
        self.value, self.nbytes, self.alive = value, nbytes, alive
        self.tensors = [(tensor, tensor_version(tensor)) for tensor in tensors]
        self._copy = copier(value)
        self.checked = False
        self.touched = 0
        self.cache: Cache | None = None
        self.key: Hashable = None

    def __repr__(self) -> str:
        return f"<Entry of {self.nbytes} bytes{', checked' * self.checked}>"

    def is_stored(self) -> bool:
        """Return whether the entry is still in its cache."""
        return self.cache is not None and self.cache.entries.get(self.key) is self

    def is_modified(self) -> bool:
        """Return whether somebody has written into a stored tensor since."""
        # upstream.torch_internals.tensor_version, without its call
        return any(tensor._version != version for tensor, version in self.tensors)

    def is_marked(self) -> bool:
        """Return whether somebody has asked for gradients of a stored tensor, which would add up over forwards."""
        return any(tensor.requires_grad for tensor, _ in self.tensors)

    def result(self) -> Any:
        """Return the result, in a container of its own: callers may change the list or dict that they get.

        Where autograd records, its tensors are new ones on the stored memory, which callers may mark.
        """
        value = self.value if self._copy is None else self._copy()
        return map_tensors(torch.Tensor.detach, value) if torch.is_grad_enabled() else value


class Budget:
    """At most `max_bytes` over all caches of a handle.

    Room is made at the expense of what has not been used for longest, and never of what one of the last forwards used:
    where more is asked for at each forward than fits, giving up one result for the next would leave no hit at all.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used = 0
        self.lock = threading.RLock()
        self.clock = 0
        self.entries: set[Entry] = set()
        #: A heap of the entries by when each was last touched, as far as that is known; it keeps none alive.
        self._oldest: list[tuple[int, int, weakref.ref[Entry]]] = []
        self._begun = deque([0] * LAST, maxlen=LAST)  # the clock at the beginning of each of the last forwards

    def __repr__(self) -> str:
        return f"<Budget: {self.used} of {self.max_bytes} bytes, {len(self.entries)} entries>"

    def fits(self, nbytes: int) -> bool:
        return nbytes <= self.max_bytes

    def begin(self) -> None:
        """A forward begins."""
        self._begun.append(self.clock)

    def add(self, entry: Entry) -> bool:
        """Take the entry in, if there is room beside what is in use."""
        idle = self._idle(self.used + entry.nbytes - self.max_bytes)
        if idle is None:
            return False
        for old in idle:
            old.cache.drop(old)
            old.cache.evictions += 1
        self.entries.add(entry)
        self.used += entry.nbytes
        self.clock = entry.touched = self.clock + 1
        self._push(entry)
        return True

    def is_idle(self, entry: Entry) -> bool:
        """Return whether none of the last forwards used the entry."""
        return entry.touched <= self._begun[0]

    def _idle(self, excess: int) -> list[Entry] | None:
        """Return entries to give up for that many bytes, longest unused first; None if too few are idle."""
        found: list[Entry] = []
        while excess > 0 and self._oldest:
            touched, _, reference = heapq.heappop(self._oldest)
            old = reference()
            if old not in self.entries:
                continue
            if old.touched != touched:
                self._push(old)
            elif self.is_idle(old):
                found.append(old)
                excess -= old.nbytes
            else:
                self._push(old)
                break
        if excess > 0:
            for old in found:
                self._push(old)
            return None
        return found

    def _push(self, entry: Entry) -> None:
        if len(self._oldest) > 2 * len(self.entries) + MOST:
            self._oldest = [(each.touched, id(each), weakref.ref(each)) for each in self.entries if each is not entry]
            heapq.heapify(self._oldest)
        heapq.heappush(self._oldest, (entry.touched, id(entry), weakref.ref(entry)))

    def discard(self, entry: Entry) -> None:
        if entry in self.entries:
            self.entries.remove(entry)
            self.used -= entry.nbytes


class Cache:
    """The results of one patched attribute, with its counters."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.entries: OrderedDict[Hashable, Entry] = OrderedDict()  # in the order in which they are looked at
        self.hits = 0
        self.misses = 0
        self.evictions = 0

    def __repr__(self) -> str:
        return f"<Cache: {len(self.entries)} entries, {self.hits} hits, {self.misses} misses>"

    def hit(self, entry: Entry) -> None:
        """Count a hit, and make the entry the last to be given up.

        Without the lock: what threads do to each other's counts is not worth a fifth of a hit.
        """
        budget = self.budget
        self.hits += 1
        budget.clock = entry.touched = budget.clock + 1

    def miss(self) -> None:
        """Count a miss."""
        with self.budget.lock:
            self.misses += 1

    def put(self, key: Hashable, entry: Entry) -> bool:
        """Keep the entry, if there is room."""
        with self.budget.lock:
            self._sweep()
            old = self.entries.get(key)
            if old is not None:
                self.drop(old)
            if not self.budget.add(entry):
                return False
            entry.cache, entry.key = self, key
            self.entries[key] = entry
            return True

    def _sweep(self) -> None:
        """Look at a few entries in turn, and drop what can never be asked for again, or is one too many and idle.

        More are looked at than one put adds, so that all have their turn, and a miss costs the same at any size.
        """
        for _ in range(min(_SHARE, len(self.entries))):
            old = next(iter(self.entries.values()))
            too_many = len(self.entries) >= MOST and self.budget.is_idle(old)
            if too_many or not all(alive() for alive in old.alive):
                self.drop(old)
            else:
                self.entries.move_to_end(old.key)

    def drop(self, entry: Entry) -> None:
        with self.budget.lock:
            if self.entries.get(entry.key) is entry:
                del self.entries[entry.key]
            self.budget.discard(entry)

    def clear(self) -> None:
        with self.budget.lock:
            for entry in list(self.entries.values()):
                self.drop(entry)

    @property
    def nbytes(self) -> int:
        with self.budget.lock:
            return sum(entry.nbytes for entry in self.entries.values())
