"""Byte-bounded storage of results, least recently used first out.

One `Cache` per patched attribute, one `Budget` per handle that all of them share. Knows nothing about how keys are
made or results computed; it only notices when a stored tensor has been written into, or can never be asked for again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..upstream.torch_internals import tensor_version
from .results import copier, map_tensors

LAST = 4  # forwards whose results are not given up: the passes of a step, with some to spare


class Entry:
    """One stored result: `value` as it goes out, its tensors with their versions, and what its key depends on.

    `alive` holds one callable per object that the key names by identity; once one of them answers False, the entry
    cannot be hit any more.
    """

    __slots__ = ("_copy", "alive", "cache", "checked", "key", "nbytes", "tensors", "touched", "value")

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
        excess = self.used + entry.nbytes - self.max_bytes
        if excess > 0:
            idle = sorted((old for old in self.entries if old.touched <= self._begun[0]), key=lambda old: old.touched)
            if sum(old.nbytes for old in idle) < excess:
                return False
            for old in idle:
                old.cache.drop(old)
                old.cache.evictions += 1
                excess -= old.nbytes
                if excess <= 0:
                    break
        self.entries.add(entry)
        self.used += entry.nbytes
        self.clock = entry.touched = self.clock + 1
        return True

    def discard(self, entry: Entry) -> None:
        if entry in self.entries:
            self.entries.remove(entry)
            self.used -= entry.nbytes


class Cache:
    """The results of one patched attribute, with its counters."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.entries: dict[Hashable, Entry] = {}
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
            for old in list(self.entries.values()):  # oldest first: what depends on another comes after it
                if not all(alive() for alive in old.alive):
                    self.drop(old)
            old = self.entries.get(key)
            if old is not None:
                self.drop(old)
            if not self.budget.add(entry):
                return False
            entry.cache, entry.key = self, key
            self.entries[key] = entry
            return True

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
