"""The functions that another function defines, as attributes that can be read and replaced.

`vars(InnerFunctions(f))["g"]` is the g that f makes anew at each call; `InnerFunctions(f).g = h` has f call h instead.
What is replaced is the constant in f's code that g is made of; nothing of f is copied. Knows nothing about models or
wrappers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any


class InnerFunctions:
    """A view of the functions that `outer` defines, without state of its own: it is all in `outer`'s code and module.

    Functions that use variables of `outer` are not among them.
    """

    __slots__ = ("_outer",)

    def __init__(self, outer: FunctionType) -> None:
        object.__setattr__(self, "_outer", outer)

    def __repr__(self) -> str:
        return f"the functions inside {self._outer.__qualname__}"

    @property
    def __dict__(self) -> dict[str, Callable]:
        return {code.co_name: self._value(code) for code in self._codes()}

    def __getattr__(self, name: str) -> Callable:
        return self._value(self._code(name))

    def __setattr__(self, name: str, value: Callable) -> None:
        old = self._code(name)
        outer, key = self._outer, self._key(name)
        original, before = _replaced(old) or (old, outer.__code__)
        if isinstance(value, FunctionType) and value.__code__ is original:
            new = original
        else:
            outer.__globals__[key] = value
            new = _calling_code(key, original, before)
        constants = tuple(new if each is old else each for each in outer.__code__.co_consts)
        code = outer.__code__.replace(co_consts=constants)
        outer.__code__ = before if code == before else code  # which compiled code may have been made of
        if new is original:
            outer.__globals__.pop(key, None)

    def _codes(self) -> list[CodeType]:
        found = [each for each in self._outer.__code__.co_consts if isinstance(each, CodeType)]
        names = [each.co_name for each in found]
        return [each for each in found if names.count(each.co_name) == 1 and not each.co_freevars]

    def _code(self, name: str) -> CodeType:
        for code in self._codes():
            if code.co_name == name:
                return code
        raise AttributeError(f"{self._outer.__qualname__} defines no function {name!r} that could be replaced")

    def _value(self, code: CodeType) -> Callable:
        if _replaced(code) is None:
            return FunctionType(code, self._outer.__globals__)
        return self._outer.__globals__[self._key(code.co_name)]

    def _key(self, name: str) -> str:
        """Return the name under which the module holds what is called in its place: one that no source can spell.

        Without dots, since Dynamo takes a dot for a path.
        """
        return f"{self._outer.__qualname__} <locals> {name}".replace(".", " ")


def _calling_code(key: str, original: CodeType, outer: CodeType) -> CodeType:
    """Return the code of a function that calls the global `key`, or the original where that has just been removed."""
    code = _template.__code__
    own = next(each for each in code.co_consts if isinstance(each, CodeType))
    return code.replace(
        co_name=original.co_name,
        co_consts=(*(original if each is own else each for each in code.co_consts), outer),
        co_names=tuple(key if each == "_replacement" else each for each in code.co_names),
    )


def _replaced(code: CodeType) -> tuple[CodeType, CodeType] | None:
    """Return the original and the outer code that `_calling_code` was given, if it made this code."""
    if code.co_code != _template.__code__.co_code or code.co_filename != __file__:
        return None
    original, outer = (each for each in code.co_consts if isinstance(each, CodeType))
    return original, outer


def _template(*args: Any, **kwargs: Any) -> Any:
    def original():
        pass

    try:
        function = _replacement  # noqa: F821
    except NameError:
        function = original
    return function(*args, **kwargs)
