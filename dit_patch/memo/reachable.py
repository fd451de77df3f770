"""What modules, functions and other objects compute with: their attributes, classes, globals, and what those hold.

A walk from some of them collects what guards then compare. It goes through plain objects and through the functions of
the library that it begins in; torch's own functions, and the values of tensors, are not looked into.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import wrapt

from .guards import Holder
from .keys import PLAIN
from .results import OPAQUE

_DEEPEST = 4  # steps from a module
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_LEAVES = (*_SCALARS, torch.dtype, torch.device, torch.Size, BuiltinFunctionType, ModuleType)
_METHODS = (FunctionType, staticmethod, classmethod, property)
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_ROOTS = (object, torch.nn.Module)  # classes of which nothing is looked at
_PLAIN_MODULES = ("abc", "builtins", "typing")
_CALLED = ("__call__", "__getattr__", "__getattribute__")  # by Python itself, when a module or an object is used


class _Slots(Mapping):
    """The attributes of an object that has them in slots, as a namespace."""

    def __init__(self, value: Any) -> None:
        self._value = value
        named = [vars(base).get("__slots__", ()) for base in type(value).__mro__]
        self._names = [name for each in named for name in ((each,) if isinstance(each, str) else each)]

    def __getitem__(self, name: str) -> Any:
        return getattr(self._value, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if hasattr(self._value, name))

    def __len__(self) -> int:
        return len(list(iter(self)))


class Reachable:
    """What was found, to be compared, and `modules` that are not in the model's tree.

    Args:
        tree: the modules of the model, which others look at.
    """

    def __init__(self, tree: set[torch.nn.Module]) -> None:
        self.tree = tree
        self.holders: list[Holder] = []
        self.classes: list[Mapping] = []
        self.containers: list[Any] = []
        self.cells: list[Any] = []
        self.functions: list[FunctionType] = []
        self.partials: list[functools.partial] = []
        self.tensors: list[torch.Tensor] = []
        self.modules: list[torch.nn.Module] = []
        #: Whether there is something whose changes cannot be seen.
        self.is_opaque = False
        self._seen: dict[int, Any] = {}  # the objects themselves, so that no id is given twice

    def __repr__(self) -> str:
        return f"<Reachable: {len(self.holders)} namespaces, {len(self.containers)} containers>"

    def add_module(self, module: torch.nn.Module, *, is_model: bool = False) -> None:
        """Add a module: its attributes but those that begin with `_`, which are its own business, and its class.

        A model also keeps masks and the like in attributes that are None in between; they do not count.
        """
        if self._is_new(vars(module)):
            self._add_namespace(vars(module), 0, skips=_is_left_by_forwards if is_model else _is_tensor)
            if not is_model:  # whose class has far more than its sites need
                self._add_class(type(module), 0)

    def add_method(self, cls: type, name: str) -> None:
        """Add one method of a class."""
        for base in cls.__mro__:
            if name in vars(base):
                self.holders.append(Holder(vars(base), (name,), is_whole=False))
                self.add(getattr(vars(base)[name], "__func__", vars(base)[name]))
                break

    def add(self, value: Any, depth: int = 0) -> None:
        """Add whatever a value holds or calls."""
        if depth > _DEEPEST or isinstance(value, _LEAVES) or not self._is_new(value):
            return
        if issubclass(type(value), wrapt.ObjectProxy):
            self.add(value.__wrapped__, depth)
        elif isinstance(value, torch.Tensor):
            self._add_tensor(value)
        elif isinstance(value, torch.nn.Module):
            if value not in self.tree:
                self.modules.append(value)
        elif isinstance(value, MethodType):
            self.add(value.__self__, depth)
            self.add(value.__func__, depth)
        elif isinstance(value, FunctionType):
            self._add_function(value, depth)
        elif isinstance(value, functools.partial):
            self.partials.append(value)
            for part in (value.func, *value.args, *value.keywords.values()):
                self.add(part, depth)
        elif isinstance(value, (list, tuple, dict, set, deque)):
            if not isinstance(value, tuple):
                self.containers.append(value)
            for item in value.values() if isinstance(value, dict) else value:
                self.add(item, depth + 1)
        elif isinstance(value, type):
            self._add_class(value, depth)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._add_namespace(vars(value), depth)
            self._add_class(type(value), depth)
        elif type(value).__module__ == "numpy" or isinstance(value, ContextVar):
            self.is_opaque = True
        elif any("__slots__" in vars(base) for base in type(value).__mro__):
            self._add_namespace(_Slots(value), depth)
            self._add_class(type(value), depth)

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        self._seen[id(value)] = value
        return True

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        if tensor.is_meta:  # nothing is computed with it
            return
        if type(tensor) not in PLAIN or tensor.is_inference() or tensor.layout is not torch.strided:
            self.is_opaque = True
        else:
            self.tensors.append(tensor)

    def _add_namespace(self, values: Mapping, depth: int, skips: Callable[[Any], bool] = lambda value: False) -> None:
        names = [name for name in values if not name.startswith("_") and not skips(values[name])]
        self.holders.append(Holder(values, tuple(names)))
        for name in names:
            if name != "forward":  # whoever replaced it is looked at apart
                self.add(values[name], depth + 1)

    def _add_class(self, cls: type, depth: int) -> None:
        for base in cls.__mro__:
            if base in _ROOTS or base.__module__ in _PLAIN_MODULES or not self._is_new(base):
                continue
            space = vars(base)
            self.classes.append(space)
            methods = {name: each for name, each in space.items() if isinstance(each, _METHODS)}
            if _is_torch(base.__module__):
                for each in methods.values():
                    self._add_names_of_torch(each)
            else:
                methods |= {name: each for name, each in space.items() if _is_value_of_class(name, each)}
                for name, each in methods.items():
                    if not name.startswith("__") or name in _CALLED:
                        self._add_function(getattr(each, "__func__", each), depth)
            if methods:
                self.holders.append(Holder(space, tuple(methods), is_whole=False))

    def _add_function(self, function: Any, depth: int) -> None:
        """Add globals that a function names, what its cells hold, and the functions of its library that it calls."""
        self._add_names_of_torch(function)
        if not isinstance(function, FunctionType) or _is_torch(function.__module__):
            return
        self.functions.append(function)
        self.add(function.__defaults__, depth)
        self.add(function.__kwdefaults__, depth)
        cells = [cell for cell in function.__closure__ or () if _is_filled(cell)]
        self.cells += cells
        for cell in cells:
            self.add(cell.cell_contents, depth + 1)
        space = function.__globals__
        names = [name for name in dict.fromkeys(_names(function.__code__)) if _is_constant(name, space.get(name))]
        if names:
            self.holders.append(Holder(space, tuple(names), is_whole=False))
        for name in names:
            is_of_library = isinstance(space[name], FunctionType) and _package(space[name]) == _package(function)
            if is_of_library or isinstance(space[name], (list, set, deque, ContextVar)):
                self.add(space[name], depth + 1)

    def _add_names_of_torch(self, function: Any) -> None:
        """Add the functions of torch that a function calls by name: somebody may have replaced them there."""
        if isinstance(function, FunctionType):
            called = set(_names(function.__code__))
            for space in (vars(torch.nn.functional), vars(torch)):
                names = tuple(name for name in called if isinstance(space.get(name), _FUNCTIONS))
                if names:
                    self.holders.append(Holder(space, names, is_whole=False))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _names(each)


def _is_constant(name: str, value: Any) -> bool:
    """Return whether a global is one that programs do not change as they run: a function, a class, a CONSTANT."""
    is_code = isinstance(value, (FunctionType, type, ContextVar)) or issubclass(type(value), wrapt.ObjectProxy)
    is_value = value is not None and isinstance(value, (*_SCALARS, list, set, deque))  # a dict may be a cache
    return is_code or (name.isupper() and is_value)


def _is_value_of_class(name: str, value: Any) -> bool:
    return not name.startswith("_") and isinstance(value, (*_SCALARS, list, dict, set, deque))


def _is_tensor(value: Any) -> bool:
    """Return whether an attribute of a module is a tensor: these are compared at each call, as weights are."""
    return isinstance(value, torch.Tensor) and not value.is_meta


def _is_left_by_forwards(value: Any) -> bool:
    return value is None or isinstance(value, torch.Tensor) or type(value).__name__ in OPAQUE


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
