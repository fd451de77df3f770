"""What modules, functions and other objects compute with: their attributes, classes, globals, and what those hold.

A walk from some of them collects what guards then compare. It goes through plain objects and through the functions of
the library that it begins in; torch's own functions, and the values of tensors, are not looked into.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import wrapt

from .guards import Holder

_DEEPEST = 4  # steps from a module
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_LEAVES = (*_SCALARS, torch.dtype, torch.device, torch.Size, torch.Tensor, BuiltinFunctionType, ModuleType)
_METHODS = (FunctionType, staticmethod, classmethod, property)
_ROOTS = (object, torch.nn.Module)  # classes of which nothing is looked at


class Reachable:
    """What was found: `holders`, `containers` and `cells` to compare, and `modules` that are not in the model's tree.

    Args:
        tree: the modules of the model, which others look at.
        ignored: attributes that are left out, by the id of their namespace and by name: a forward sets them itself.
    """

    def __init__(self, tree: set[torch.nn.Module], ignored: set[tuple[int, str]]) -> None:
        self.holders: list[Holder] = []
        self.containers: list[Any] = []
        self.cells: list[Any] = []
        self.modules: list[torch.nn.Module] = []
        self.tree, self._ignored = tree, ignored
        self._seen: dict[int, Any] = {}  # the objects themselves, so that no id is given twice

    def __repr__(self) -> str:
        return f"<Reachable: {len(self.holders)} namespaces, {len(self.containers)} containers>"

    def add_module(self, module: torch.nn.Module, depth: int = 0) -> None:
        """Add a module: its attributes but those that begin with `_`, which are its own business, and its class."""
        if self._is_new(vars(module)):
            self._add_namespace(vars(module), depth)
            self._add_class(type(module), depth)

    def add(self, value: Any, depth: int = 0) -> None:
        """Add whatever a value holds or calls."""
        if depth > _DEEPEST or isinstance(value, _LEAVES) or not self._is_new(value):
            return
        if issubclass(type(value), wrapt.ObjectProxy):
            self.add(value.__wrapped__, depth)
        elif isinstance(value, torch.nn.Module):
            if value not in self.tree:
                self.modules.append(value)
        elif isinstance(value, MethodType):
            self.add(value.__self__, depth)
            self.add(value.__func__, depth)
        elif isinstance(value, FunctionType):
            self._add_function(value, depth)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.add(part, depth)
        elif isinstance(value, (list, tuple, dict, set)):
            if not isinstance(value, tuple) and (id(value), "") not in self._ignored:
                self.containers.append(value)
            for item in value.values() if isinstance(value, dict) else value:
                self.add(item, depth + 1)
        elif isinstance(value, type):
            self._add_class(value, depth)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._add_namespace(vars(value), depth)
            self._add_class(type(value), depth)

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        self._seen[id(value)] = value
        return True

    def _add_namespace(self, values: dict, depth: int) -> None:
        names = [name for name in values if not name.startswith("_") and (id(values), name) not in self._ignored]
        names = [name for name in names if not isinstance(values[name], torch.Tensor)]
        self.holders.append(Holder(values, tuple(names)))
        for name in names:
            if name != "forward":  # whoever replaced it is looked at apart
                self.add(values[name], depth + 1)

    def _add_class(self, cls: type, depth: int) -> None:
        for base in cls.__mro__:
            if base in _ROOTS or base.__module__ in ("builtins", "typing", "abc") or not self._is_new(base):
                continue
            methods = {name: each for name, each in vars(base).items() if isinstance(each, _METHODS)}
            if methods:
                self.holders.append(Holder(vars(base), tuple(methods), is_whole=False))
            if not _is_torch(base.__module__):
                for name, each in methods.items():
                    if not name.startswith("__") or name == "__call__":
                        self._add_function(getattr(each, "__func__", each), depth)

    def _add_function(self, function: Any, depth: int) -> None:
        """Add globals that a function names, what its cells hold, and the functions of its library that it calls."""
        if not isinstance(function, FunctionType) or _is_torch(function.__module__):
            return
        cells = [cell for cell in function.__closure__ or () if _is_filled(cell)]
        self.cells += cells
        for cell in cells:
            self.add(cell.cell_contents, depth + 1)
        space = function.__globals__
        names = [name for name in dict.fromkeys(_names(function.__code__)) if _is_constant(name, space.get(name))]
        if names:
            self.holders.append(Holder(space, tuple(names), is_whole=False))
        for name in names:
            if isinstance(space[name], FunctionType) and _package(space[name]) == _package(function):
                self.add(space[name], depth + 1)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _names(each)


def _is_constant(name: str, value: Any) -> bool:
    """Return whether a global is one that programs do not change as they run: a function, a class, a CONSTANT."""
    is_code = isinstance(value, (FunctionType, type)) or issubclass(type(value), wrapt.ObjectProxy)
    return is_code or (name.isupper() and value is not None and isinstance(value, _SCALARS))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _package(function: FunctionType) -> str:
    return (function.__module__ or "").partition(".")[0]


def _is_torch(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "torch"


def merged(holders: Iterable[Holder]) -> list[Holder]:
    """Return the holders with those of one namespace made one."""
    spaces: dict[int, tuple[Any, dict[str, None], bool]] = {}
    for values, names, is_whole in holders:
        _, known, whole = spaces.get(id(values), (values, {}, False))
        known.update(dict.fromkeys(names))
        spaces[id(values)] = values, known, whole or is_whole
    return [Holder(values, tuple(names), whole) for values, names, whole in spaces.values()]
