"""What a result depends on besides the arguments of its call: one small class for each kind of thing that is looked at.

A guard remembers something, and says whether it still is so. It holds no tensor, so that weights may come and go. What
is written through `.data` into the same memory leaves no trace and is not seen. Which guards a model needs is for
`model_guards`.
"""

# ruff: noqa: SIM110  (loops: all() of a generator takes twice the time)

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from operator import is_, itemgetter
from types import FunctionType
from typing import Any, NamedTuple, Protocol

import torch

from ..upstream import fastvideo_internals, peft_internals
from ..upstream.torch_internals import (
    are_algorithms_deterministic,
    children,
    module_call,
    numerics_switches,
    storage_id,
    tensor_version,
)
from .keys import Dependencies

_GONE = (KeyError, AttributeError, RuntimeError, TypeError, ValueError)  # or no longer of its kind


class Guard(Protocol):
    """One kind of thing that results depend on."""

    def still_holds(self) -> bool:
        """Return whether nothing of it has changed. It runs at every forward, and is written for speed."""


class Holder(NamedTuple):
    """Attributes of one module, object, class or Python module, by their names in its namespace."""

    values: Mapping[str, Any]
    names: tuple[str, ...]
    #: Whether an attribute more or less is a change, too.
    is_whole: bool = True


class MembersGuard:
    """Notices parameters, buffers and submodules that were added or taken away."""

    __slots__ = ("_expected", "_groups")

    def __init__(self, groups: Iterable[Mapping]) -> None:
        self._groups = tuple(groups)
        self._expected = tuple(map(len, self._groups))

    def still_holds(self) -> bool:
        return tuple(map(len, self._groups)) == self._expected


class NamesGuard:
    """Notices attributes that were added or taken away, but for those that begin with `_`."""

    __slots__ = ("_names", "_sizes", "_spaces")

    def __init__(self, spaces: Iterable[Mapping]) -> None:
        self._spaces = tuple(spaces)
        self._sizes = tuple(map(len, self._spaces))
        self._names = [_public(each) for each in self._spaces]

    def still_holds(self) -> bool:
        if tuple(map(len, self._spaces)) == self._sizes:
            return True
        if [_public(each) for each in self._spaces] != self._names:
            return False
        self._sizes = tuple(map(len, self._spaces))
        return True


class AttributeGuard:
    """Notices attributes that were set to something else: theta, a processor, `training`, a class's `forward` ..."""

    __slots__ = ("_expected",)

    def __init__(self, holders: Iterable[Holder]) -> None:
        self._expected = [_reader(values, names) for values, names, _ in holders if names]

    def still_holds(self) -> bool:
        try:
            for at, (read, values, expected) in enumerate(self._expected):
                now = read(values)
                if not all(map(is_, now, expected)):
                    if not all(map(_is_same_value, now, expected)):
                        return False
                    self._expected[at] = read, values, now  # the same numbers, made anew
        except _GONE:
            return False
        return True


class ContainerGuard:
    """Notices lists, dicts and sets that were changed in place."""

    __slots__ = ("_expected",)

    def __init__(self, containers: Iterable[Any]) -> None:
        self._expected = [(each, contents(each)) for each in containers]

    def still_holds(self) -> bool:
        for container, expected in self._expected:
            if not _is_alike(contents(container), expected):
                return False
        return True


class CellGuard:
    """Notices variables of an enclosing function that were given another value."""

    __slots__ = ("_expected",)

    def __init__(self, cells: Iterable[Any]) -> None:
        self._expected = [(cell, cell.cell_contents) for cell in cells]

    def still_holds(self) -> bool:
        for cell, expected in self._expected:
            if cell.cell_contents is not expected:
                return False
        return True


class FunctionGuard:
    """Notices functions that were given other code or defaults."""

    __slots__ = ("_expected",)

    def __init__(self, functions: Iterable[FunctionType]) -> None:
        self._expected = [(each, each.__code__, each.__defaults__, each.__kwdefaults__) for each in functions]

    def still_holds(self) -> bool:
        for function, code, defaults, named in self._expected:
            is_same = function.__code__ is code and function.__defaults__ is defaults
            if not is_same or function.__kwdefaults__ is not named:
                return False
        return True


class PartialGuard:
    """Notices partials that were given another function or other arguments."""

    __slots__ = ("_expected",)

    def __init__(self, partials: Iterable[functools.partial]) -> None:
        self._expected = [(each, each.func, each.args, contents(each.keywords)) for each in partials]

    def still_holds(self) -> bool:
        for partial, function, args, named in self._expected:
            is_same = partial.func is function and _is_alike(partial.args, args)
            if not is_same or not _is_alike(contents(partial.keywords), named):
                return False
        return True


class TypeGuard:
    """Notices modules that were made one of another class."""

    __slots__ = ("_expected", "_objects")

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self._objects = tuple(modules)
        self._expected = tuple(map(type, self._objects))

    def still_holds(self) -> bool:
        return tuple(map(type, self._objects)) == self._expected


class LooseTensorGuard:
    """Notices writes into tensors in lists and in attributes of objects; which they are is for other guards."""

    __slots__ = ("_expected", "_watched")

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._watched = Dependencies()
        self._expected = []
        for tensor in tensors:
            self._watched.follow(tensor)
            self._expected.append((weakref.ref(tensor), tensor_version(tensor), storage_id(tensor)))

    def still_holds(self) -> bool:
        for reference, version, storage in self._expected:
            tensor = reference()
            if tensor is None or tensor_version(tensor) != version or storage_id(tensor) != storage:
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


class ForwardGuard:
    """Notices that a module's own forward was replaced, on it or on its class."""

    __slots__ = ("_expected", "_module")

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._expected = vars(module).get("forward"), type(module).forward

    def still_holds(self) -> bool:
        module, (own, inherited) = self._module, self._expected
        return vars(module).get("forward") is own and type(module).forward is inherited


class ModuleGuard:
    """Notices submodules that were replaced.

    What is compared is the children, not the registry: a step cache exchanges block lists at each forward.
    """

    __slots__ = ("_expected",)

    def __init__(self, families: Iterable[dict]) -> None:
        self._expected = [(family.values(), tuple(family.values())) for family in families if family]

    def still_holds(self) -> bool:
        for family, before in self._expected:
            if not all(map(is_, family, before)):
                return False
        return True


class PlaceGuard:
    """Notices that something else stands in the place of a module, or of one that it is in: a LoRA layer, say."""

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
    """Notices hooks that were registered or removed."""

    __slots__ = ("_empty", "_expected")

    def __init__(self, groups: Iterable[Mapping[int, Callable]]) -> None:
        groups = list(groups)
        self._empty = tuple(each for each in groups if not each)
        self._expected = [(each, tuple(each)) for each in groups if each]

    def still_holds(self) -> bool:
        if any(self._empty):
            return False
        for group, expected in self._expected:
            if tuple(group) != expected:
                return False
        return True


class NumericsGuard:
    """Notices global switches that change the bits of an operation, and another way of calling modules."""

    __slots__ = ("_expected",)

    def __init__(self) -> None:
        self._expected = numerics()

    def still_holds(self) -> bool:
        return numerics() == self._expected


def numerics() -> Hashable:
    """Return the global switches that change the bits of an operation, and how modules are called."""
    return numerics_switches(), are_algorithms_deterministic(), torch.get_default_dtype(), module_call()


def _reader(values: Mapping, names: tuple[str, ...]) -> tuple[Callable[[Mapping], tuple], Mapping, tuple]:
    """Return a function that takes the named items, the mapping to give to it, and what it gives now."""
    read = itemgetter(*names, names[0])  # one more, so that it always gives a tuple
    return read, values, read(values)


def _is_alike(now: tuple, expected: tuple) -> bool:
    return len(now) == len(expected) and all(map(is_, now, expected))


def _is_same_value(now: Any, before: Any) -> bool:
    """Return whether two values are one, or equal plain ones: nan is itself, and 0.0 is not -0.0."""
    return now is before or (type(now) is type(before) and type(now) in _SCALARS and repr(now) == repr(before))


_SCALARS = {bool, int, float, complex, str, bytes}


def _public(space: Mapping) -> set[str]:
    return {name for name in space if not name.startswith("_")}


def contents(container: Any) -> tuple:
    """Return what is in a list, dict or set."""
    return (*container, *container.values()) if isinstance(container, Mapping) else tuple(container)


def find_path(root: torch.nn.Module, module: torch.nn.Module) -> list[tuple[dict, str]]:
    """Return the way from `root` to the module: at each step the children of one, and the next one's name among them.

    It is empty for `root` itself, and for a module that is not in it.
    """
    name = next((name for name, each in root.named_modules() if each is module), "")
    path, parent = [], root
    for step in name.split(".") if name else ():
        path.append((children(parent), step))
        parent = children(parent)[step]
    return path


def outermost(module: torch.nn.Module, place: tuple[dict, str] | None) -> torch.nn.Module:
    """Return what stands in the module's place, if the module is inside it, as in a LoRA layer; else the module."""
    now = None if place is None else place[0].get(place[1])
    return now if now is not None and any(each is module for each in now.modules()) else module


def _adapter_readers(layer: dict) -> list[Callable[[dict], Hashable]]:
    """Return what reads the adapters of a LoRA layer, given as its `vars`; nothing for any other module."""
    return [library.adapter_state for library in (fastvideo_internals, peft_internals) if library.is_adapter(layer)]
