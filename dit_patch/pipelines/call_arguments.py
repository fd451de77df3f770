"""Arguments for a pipeline's `__call__`: read `NAME=VALUE` from a command line, refuse what it does not take."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Container, Iterable, Mapping
from typing import Any

from ..errors import DitPatchError, quote, suggest


def parse_pairs(
    flag: str, words: Iterable[str], *, as_text: Container[str] = (), error: type[DitPatchError] = DitPatchError
) -> dict[str, Any]:
    """Return the values of `NAME=VALUE` words by name: Python literals, or else text.

    Args:
        flag: what the words were given with, for messages.
        as_text: names whose values are text in any case.
        error: the class to raise.

    Raises:
        DitPatchError: or `error`; a word has no name or no `=`.
    """
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise error(f"{flag}: {quote(word)}: expected NAME=VALUE")
        try:
            values[name] = value if name in as_text else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    return values


def parameters(pipeline: Any) -> list[str]:
    """Return the names of the parameters that `__call__` of a pipeline, or of a class of pipelines, takes."""
    cls = pipeline if isinstance(pipeline, type) else type(pipeline)
    return [name for name in inspect.signature(cls.__call__).parameters if name != "self"]


def check_parameters(pipeline: Any, flags: Mapping[str, str], error: type[DitPatchError] = DitPatchError) -> None:
    """Refuse parameters that `__call__` does not take, before anything is generated.

    Args:
        pipeline: a pipeline, or a class of them.
        flags: names of parameters, each with the flag that the user gave it with ("--frames"), or "".
        error: the class to raise.

    Raises:
        DitPatchError: or `error`; the message names what can be given instead.
    """
    names = parameters(pipeline)
    cls = pipeline if isinstance(pipeline, type) else type(pipeline)
    for name, flag in flags.items():
        if name not in names:
            label = f"{flag}: " if flag else ""
            raise error(
                f"{label}{cls.__name__} takes no {quote(name)}{suggest(name, names)}\n    It takes: {', '.join(names)}."
            )
