"""The fingerprint of a function's source, by which a replacement knows the original that it was written for."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType, FunctionType
from weakref import WeakKeyDictionary


def fingerprint(function: Callable) -> str:
    """Return twelve hex digits over the code of `function` and of those functions of its package that it calls by name.

    Comments, docstrings and layout do not count. A decorated or wrapped function is seen through.

    Raises:
        OSError: where there is no source to read.
    """
    seen: dict[str, str] = {}
    _collect(inspect.unwrap(function), seen)
    text = "\n".join(seen[name] for name in sorted(seen))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _collect(function: Callable, seen: dict[str, str]) -> None:
    function = getattr(function, "__func__", function)
    name = f"{function.__module__}.{function.__qualname__}"
    if name in seen:
        return
    seen[name] = _bare(function)
    package = function.__module__.partition(".")[0]
    for called in function.__code__.co_names:
        value = function.__globals__.get(called)
        if isinstance(value, FunctionType) and value.__module__.partition(".")[0] == package:
            _collect(inspect.unwrap(value), seen)


_known: WeakKeyDictionary[Callable, tuple[CodeType, str]] = WeakKeyDictionary()
"""What `_bare` has found of functions, each with the code that it was found for."""


def _bare(function: Callable) -> str:
    """Return the function's source without docstrings, comments and layout."""
    if isinstance(function, FunctionType) and function in _known and _known[function][0] is function.__code__:
        return _known[function][1]
    bare = _without_comments(inspect.getsource(function))
    if isinstance(function, FunctionType):
        _known[function] = function.__code__, bare
    return bare


def _without_comments(source: str) -> str:
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and len(body) > 1 and ast.get_docstring(node) is not None:
            del body[0]
    return ast.unparse(tree)
