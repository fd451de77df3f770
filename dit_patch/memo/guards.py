"""What a result depends on besides the arguments of its call: one small class for each kind of thing that is looked at.

A guard remembers something, and says whether it still is so. It holds no tensor, so that weights may come and go. What
is written through `.data` leaves no version behind and is not seen. Which guards a module needs is for `module_guards`.
"""

# ruff: noqa: SIM110  (loops: all() of a generator takes twice the time)

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import itemgetter
from typing import Any, Protocol

import torch

from ..upstream import fastvideo_internals, peft_internals
from ..upstream.torch_internals import (
    are_algorithms_deterministic,
    children,
    matmul_precision,
    storage_id,
    tensor_version,
)
from .keys import Dependencies

_GONE = (KeyError, AttributeError, RuntimeError, TypeError, ValueError)  # or no longer of its kind


class Guard(Protocol):
    """One kind of thing that results depend on."""

    def still_holds(self) -> bool:
        """Return whether nothing of it has changed. It runs at every call of a site, and is written for speed."""


class MembersGuard:
    """Notices parameters, buffers and submodules that were registered or taken away."""

    __slots__ = ("_empty", "_sizes")

    def __init__(self, groups: Iterable[dict]) -> None:
        groups = list(groups)
        self._sizes = [(group, len(group)) for group in groups if group]
        self._empty = [group for group in groups if not group]

    def still_holds(self) -> bool:
        for group, size in self._sizes:
            if len(group) != size:
                return False
        return not any(self._empty)


class AttributeGuard:
    """Notices plain attributes of modules that were set: theta, patch size, `training` ..."""

    __slots__ = ("_expected",)

    def __init__(self, modules: Iterable[tuple[dict, list[str]]]) -> None:
        self._expected = [_reader(values, names) for values, names in modules]

    def still_holds(self) -> bool:
        try:
            for values, read, expected in self._expected:
                if read(values) != expected:
                    return False
        except _GONE:
            return False
        return True


class TensorGuard:
    """Notices weights and buffers that were exchanged, got other memory, or were written into."""

    __slots__ = ("_expected", "_watched")

    def __init__(self, tensors: Iterable[tuple[dict, str, torch.Tensor]]) -> None:
        self._watched = Dependencies()  # no other storage gets the address of one that is watched
        self._expected = []
        for group, name, tensor in tensors:
            self._watched.follow(tensor)
            self._expected.append((group, name, id(tensor), storage_id(tensor), tensor_version(tensor)))

    def still_holds(self) -> bool:
        try:
            for group, name, identity, storage, version in self._expected:
                tensor = group[name]
                # upstream.torch_internals.tensor_version and storage_id, without their calls
                if id(tensor) != identity or tensor._version != version or tensor.untyped_storage()._cdata != storage:
                    return False
        except _GONE:
            return False
        return True


class ModuleGuard:
    """Notices submodules that were replaced.

    What is compared is the children, not the registry: a step cache exchanges block lists at each forward.
    """

    __slots__ = ("_expected",)

    def __init__(self, families: Iterable[dict]) -> None:
        self._expected = [(family, tuple(family.values())) for family in families if family]

    def still_holds(self) -> bool:
        for family, before in self._expected:
            for child, expected in zip(family.values(), before):
                if child is not expected:
                    return False
        return True


class PlaceGuard:
    """Notices that something else stands in a module's place in its model, such as a LoRA layer around it."""

    __slots__ = ("_expected",)

    def __init__(self, places: Iterable[tuple[dict, str]]) -> None:
        self._expected = [(family, name, family.get(name)) for family, name in places]

    def still_holds(self) -> bool:
        for family, name, expected in self._expected:
            if family.get(name) is not expected:
                return False
        return True


class AdapterGuard:
    """Notices LoRA adapters that were switched, scaled, disabled or merged."""

    __slots__ = ("_expected",)

    def __init__(self, layers: Iterable[dict]) -> None:
        self._expected = [(read, layer, read(layer)) for layer in layers for read in _adapter_readers(layer)]

    def __bool__(self) -> bool:
        return bool(self._expected)

    def still_holds(self) -> bool:
        for read, layer, expected in self._expected:
            if read(layer) != expected:
                return False
        return True


class HookGuard:
    """Notices hooks on submodules, which a hit would skip."""

    __slots__ = ("_groups",)

    def __init__(self, groups: Sequence[dict]) -> None:
        self._groups = groups

    def __bool__(self) -> bool:
        return bool(self._groups)

    def still_holds(self) -> bool:
        return not any(self._groups)


class NumericsGuard:
    """Notices global switches that change the bits of a matrix product; they count for sites that have weights."""

    __slots__ = ("_expected",)

    def __init__(self) -> None:
        self._expected = numerics()

    def still_holds(self) -> bool:
        return (matmul_precision(), are_algorithms_deterministic()) == self._expected


def numerics() -> Hashable:
    """Return the global switches that change the bits of a matrix product."""
    return matmul_precision(), are_algorithms_deterministic()


def plain_attributes(module: torch.nn.Module) -> list[str]:
    """Return the names of a module's plain attributes, which its results may depend on."""
    return [name for name, value in vars(module).items() if not name.startswith("_") and _is_plain(value)]


def find_place(root: torch.nn.Module, module: torch.nn.Module) -> tuple[dict, str] | None:
    """Return where the module stands in the tree of `root`: its parent's children, and its name among them."""
    for parent in root.modules():
        for name, child in children(parent).items():
            if child is module:
                return children(parent), name
    return None


def outermost(module: torch.nn.Module, place: tuple[dict, str] | None) -> torch.nn.Module:
    """Return what stands in the module's place, if the module is inside it, as in a LoRA layer; else the module."""
    now = None if place is None else place[0].get(place[1])
    return now if now is not None and any(each is module for each in now.modules()) else module


def _reader(values: dict, names: list[str]) -> tuple[dict, Callable[[dict], tuple], tuple]:
    """Return a module's `vars`, a function that takes the named ones and `training` out of it, and what that gives."""
    read = itemgetter(*names, "training")  # a second name, so that it always gives a tuple
    if not all(name in values for name in names):

        def read(values: dict) -> tuple:
            return tuple(values.get(name) for name in names)

    # A list may be changed in place, and would still equal itself.
    return values, read, tuple(list(value) if type(value) is list else value for value in read(values))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, (bool, int, float, str)) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _adapter_readers(layer: dict) -> list[Callable[[dict], Hashable]]:
    """Return what reads the adapters of a LoRA layer, given as its `vars`; nothing for any other module."""
    return [library.adapter_state for library in (fastvideo_internals, peft_internals) if library.is_adapter(layer)]
