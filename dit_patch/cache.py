"""Byte-bounded storage of results, least recently used first out.

One `Cache` per patched attribute, one `Budget` per handle that all of them share. Knows nothing about how keys are
made or results computed; it only notices when a stored tensor has been written into, or can never be asked for again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch


class Entry:
    """One stored result: `value` as it goes out, its tensors with their versions, and what its key depends on.

    `alive` holds one callable per object that the key names by identity; once one of them answers False, the entry
    cannot be hit any more.
    """

    __slots__ = ("alive", "cache", "checked", "key", "nbytes", "remake", "tensors", "touched", "value")

    def __init__(self, value: Any, tensors: list[torch.Tensor], nbytes: int, alive: list[Callable[[], bool]]) -> None:
        self.value, self.nbytes, self.alive = value, nbytes, alive
        self.tensors = [(tensor, tensor._version) for tensor in tensors]
        self.remake = _remake(value)
        self.checked = False
        self.touched = 0
        self.cache: Cache | None = None
        self.key: Hashable = None

    def held(self) -> bool:
        """Whether the entry is still in its cache."""
        return self.cache is not None and self.cache.entries.get(self.key) is self

    def written(self) -> bool:
        """Whether somebody has written into a stored tensor since."""
        return any(tensor._version != version for tensor, version in self.tensors)

    def fresh(self) -> Any:
        """The result, in a container of its own: callers may change the list or dict that they get."""
        return self.value if self.remake is None else self.remake(self.value)


class Budget:
    """At most `max_bytes` over all caches of a handle."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used = 0
        self.lock = threading.RLock()
        self.clock = 0
        self.entries: set[Entry] = set()

    def fits(self, nbytes: int) -> bool:
        return nbytes <= self.max_bytes

    def add(self, entry: Entry) -> None:
        """Take the entry in, at the expense of those that have not been hit for longest."""
        self.entries.add(entry)
        self.used += entry.nbytes
        self.clock = entry.touched = self.clock + 1
        if self.used > self.max_bytes:
            for old in sorted(self.entries - {entry}, key=lambda each: each.touched):
                old.cache.drop(old)
                old.cache.evictions += 1
                if self.used <= self.max_bytes:
                    break

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

    def hit(self, entry: Entry) -> None:
        """Count a hit, and make the entry the last to be given up."""
        budget = self.budget
        with budget.lock:
            self.hits += 1
            budget.clock = entry.touched = budget.clock + 1

    def miss(self) -> None:
        """Count a miss."""
        with self.budget.lock:
            self.misses += 1

    def put(self, key: Hashable, entry: Entry) -> None:
        with self.budget.lock:
            for old in list(self.entries.values()):  # oldest first: what depends on another comes after it
                if not all(alive() for alive in old.alive):
                    self.drop(old)
            old = self.entries.get(key)
            if old is not None:
                self.drop(old)
            entry.cache, entry.key = self, key
            self.entries[key] = entry
            self.budget.add(entry)

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


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a result: a tensor, or nested tuples, lists and dicts of them; a flex BlockMask's, too.

    Raises:
        TypeError: for anything that cannot be stored, naming its type.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif type(value).__name__ == "BlockMask":
        yield from (item for item in vars(value).values() if isinstance(item, torch.Tensor))
    elif value is not None and not isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        raise TypeError(f"a {type(value).__qualname__} cannot be stored")


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with `function` applied to its tensors, in containers of the same kind (a BlockMask stays as it is)."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return type(value)((key, map_tensors(function, item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _remake(value: Any) -> Callable[[Any], Any] | None:
    """None where the value may be handed out as it is, since nothing in it but its tensors can be changed."""

    def settled(item: Any) -> bool:
        return not isinstance(item, (list, dict)) and (not isinstance(item, tuple) or all(map(settled, item)))

    return None if settled(value) else lambda value: map_tensors(lambda tensor: tensor, value)
