"""Byte-bounded storage of results, least recently used first out.

One `Cache` per patched attribute, one `Budget` per handle that all of them share. Knows nothing about how keys are
made or results computed; it only notices when a stored tensor has been written into, or can never be asked for again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from ..upstream.torch_internals import tensor_version

LAST = 4  # forwards whose results are not given up: the passes of a step, with some to spare


class Entry:
    """One stored result: `value` as it goes out, its tensors with their versions, and what its key depends on.

    `alive` holds one callable per object that the key names by identity; once one of them answers False, the entry
    cannot be hit any more.
    """

    __slots__ = ("alive", "cache", "checked", "key", "nbytes", "remake", "tensors", "touched", "value")

    def __init__(self, value: Any, tensors: list[torch.Tensor], nbytes: int, alive: list[Callable[[], bool]]) -> None:
        self.value, self.nbytes, self.alive = value, nbytes, alive
        self.tensors = [(tensor, tensor_version(tensor)) for tensor in tensors]
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
        # upstream.torch_internals.tensor_version, without its call
        return any(tensor._version != version for tensor, version in self.tensors)

    def fresh(self) -> Any:
        """The result, in a container of its own: callers may change the list or dict that they get."""
        return self.value if self.remake is None else self.remake(self.value)


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
        yield from (item for item in mask_parts(value) if isinstance(item, torch.Tensor))
    elif value is not None and not isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        raise TypeError(f"a {type(value).__qualname__} cannot be stored")


def mask_parts(mask: Any) -> tuple:
    """What a flex BlockMask consists of: its fields, and what its `mask_mod` runs and has captured."""
    own = {name: value for name, value in vars(mask).items() if name != "mask_mod"}
    cells = [cell.cell_contents for cell in getattr(mask.mask_mod, "__closure__", None) or ()]
    return (*own, *own.values(), getattr(mask.mask_mod, "__code__", mask.mask_mod), *cells)


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
