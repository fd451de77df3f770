"""What a pipeline is called with: `NAME=VALUE` words of a command line, held to what its `__call__` takes."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Container, Iterable, Mapping
from typing import Any

from ..errors import DitPatchError, quote, suggest


def pairs(
    flag: str, words: Iterable[str], *, as_text: Container[str] = (), error: type[DitPatchError] = DitPatchError
) -> dict[str, Any]:
    """`NAME=VALUE` words; values as Python writes them, else (and of the names in `as_text` always) as text.

    Raises:
        DitPatchError: or `error`; a word has no name or no `=`.
    """
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise error(f"{flag}: {quote(word)}: expected NAME=VALUE")
        try:
            found[name] = value if name in as_text else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def parameters(pipeline: Any) -> list[str]:
    """What `__call__` of a pipeline, or of a class of them, takes."""
    cls = pipeline if isinstance(pipeline, type) else type(pipeline)
    return [name for name in inspect.signature(cls.__call__).parameters if name != "self"]


def check(pipeline: Any, flags: Mapping[str, str], error: type[DitPatchError] = DitPatchError) -> None:
    """Refuse what `__call__` does not take, before anything is generated.

    Args:
        pipeline: a pipeline, or a class of them.
        flags: parameters that are to be given, each with what the user wrote for it ("--frames"), or "".

    Raises:
        DitPatchError: or `error`; it names what can be given instead.
    """
    known = parameters(pipeline)
    cls = pipeline if isinstance(pipeline, type) else type(pipeline)
    for name, flag in flags.items():
        if name not in known:
            where = f"{flag}: " if flag else ""
            raise error(
                f"{where}{cls.__name__} takes no {quote(name)}{suggest(name, known)}\n    It takes: {', '.join(known)}."
            )
