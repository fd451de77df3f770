"""Notices weights that are exchanged from outside of a model through `.data`, which leaves no version behind.

diffusers' `EMAModel` and peft's hotswapping do so. They are watched while anything is patched: what is cached is
dropped after each. Whose weights they were is not asked; a cache that is dropped costs one recomputation.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import wrapt

from ..sites import layers

EXCHANGES = {
    "diffusers.training_utils": ("EMAModel.copy_to", "EMAModel.restore"),
    "peft.utils.hotswap": ("hotswap_adapter_from_state_dict",),
}
"""What exchanges weights, by the module that has it."""

_lock = threading.RLock()
_holders: weakref.WeakSet[Holder] = weakref.WeakSet()
_layers: list[layers.Wrapped] = []
_awaited: set[str] = set()


class Holder(Protocol):
    """Whoever holds results that depend on weights."""

    def clear(self) -> None:
        """Forget them."""


def watch(holder: Holder) -> Callable[[], Any]:
    """Clear `holder` after each exchange, until what is returned is called, or the holder is gone."""
    with _lock:
        _holders.add(holder)
        names = [name for name in EXCHANGES if not _layers and name not in _awaited]
        _awaited.update(names)
    for name in names:  # a lock of the import system is taken here
        wrapt.register_post_import_hook(_install, name)
    return weakref.finalize(holder, _let_go, weakref.ref(holder))


def _install(module: ModuleType) -> None:
    installed = []
    for path in EXCHANGES[module.__name__]:
        owner, _, name = path.rpartition(".")
        place = operator.attrgetter(owner)(module) if owner else module
        if callable(getattr(place, name, None)):
            installed.append(layers.install(place, name, layers.after(_clear_all)))
    with _lock:
        _awaited.discard(module.__name__)
        _layers.extend(installed)
    _remove_if_nobody_holds()


def _let_go(holder: Callable[[], Holder | None]) -> None:
    """Forget a holder; the last one takes the layers with it."""
    with _lock:
        living = holder()
        if living is not None:
            _holders.discard(living)
    _remove_if_nobody_holds()


def _remove_if_nobody_holds() -> None:
    # Not under the lock: layers have one of their own, and a collection may come, and end a holder, under either.
    with _lock:
        idle = [] if tuple(_holders) else list(_layers)  # the length of the set counts one that is just going
        _layers[: len(idle)] = []
    for layer in reversed(idle):
        layers.remove(layer)


def _clear_all() -> None:
    for holder in tuple(_holders):
        holder.clear()
