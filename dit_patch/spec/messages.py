"""pydantic's complaints as plain sentences: at which line and column, about what, and what to write instead.

It knows how a declaration is laid out in pydantic models, and nothing about what the declaration is for.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from ..errors import quote, suggest
from .yaml_reader import Document, Loc, Position


def is_consequence(error: ErrorDetails) -> bool:
    """Return whether the error only follows from others: a list is "too short" when all that it holds is wrong."""
    return error["type"] == "too_short" and bool(error["input"])


def describe_error(error: ErrorDetails, document: Document, root: type[BaseModel]) -> tuple[Position, str]:
    """Return where in the document an error of `root` is to be mended, and the sentence that says so."""
    loc = document.existing_part(error["loc"])
    place = document.places[loc]
    about_key = error["loc"][-1:] == ("[key]",) or error["type"] == "extra_forbidden"
    position = place.key if about_key and place.key else place.start
    if error["type"] == "extra_forbidden":
        message = f"unknown key{suggest(str(error['loc'][-1]), _part_at(error['loc'][:-1], root).model_fields)}"
    else:
        message = _WORDS.get(error["type"], _other)(error, place.text)
    return position, f"{dotted_path(loc)}: {message}" if loc else message


def dotted_path(loc: Loc) -> str:
    """Return a path in the data as messages write it: `sites.1.key`."""
    return quote(".".join(map(str, loc)), limit=120)[1:-1]


def show(given: Any, text: str | None = None) -> str:
    """Return what was given instead, in the user's own `text` where that is known."""
    if given is None:
        return "nothing"
    if isinstance(given, (list, tuple)):
        return "a list"
    if isinstance(given, Mapping):
        return "a mapping"
    if text is None:
        text = str(given).lower() if isinstance(given, bool) else str(given)
    return quote(text)


def one_of(words: Sequence[str]) -> str:
    """Return a list of choices in words: `one of a, b`."""
    return f"one of {', '.join(words)}" if len(words) > 1 else f"`{words[0]}`"


def _part_at(loc: Loc, root: type[BaseModel]) -> type[BaseModel]:
    """Return the pydantic model that declares what is at a path such as `("mini", "inputs", "timestep")`."""
    part = root
    steps = iter(loc)
    for step in steps:
        declared = part.model_fields[str(step)].annotation
        part = _part_in(declared) or part
        if get_origin(declared) in (tuple, Mapping):
            next(steps, None)
    return part


def _part_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_part_in, get_args(annotation))), None)


def _not_among(error: ErrorDetails, text: str | None) -> str:
    words = re.findall(r"'([^']*)'", error["ctx"]["expected"])
    given = error["input"]
    hint = suggest(given, words) if isinstance(given, str) else ""
    return f"expected {one_of(words)}, not {show(given, text)}{hint}"


def _not_text(error: ErrorDetails, text: str | None) -> str:
    given = error["input"]
    if isinstance(given, (bool, int, float)):
        kind = "true or false" if isinstance(given, bool) else "a number"
        return f"expected text, and {show(given, text)} is read as {kind}; put it in quotes"
    return f"expected text, not {show(given)}"


def _expected(what: str) -> Callable[[ErrorDetails, str | None], str]:
    return lambda error, text: f"expected {what}, not {show(error['input'], text)}"


def _other(error: ErrorDetails, text: str | None) -> str:
    return error["msg"]


_MAPPING = _expected("a mapping (`name: value`)")
_WORDS: dict[str, Callable[[ErrorDetails, str | None], str]] = {
    "missing": lambda error, text: f"{quote(error['loc'][-1])} is missing",
    "literal_error": _not_among,
    "string_type": _not_text,
    "bool_type": _expected("true or false"),
    "int_type": _expected("a whole number"),
    "tuple_type": _expected("a list (`[a, b]`)"),
    "dict_type": _MAPPING,
    "mapping_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "greater_than": lambda error, text: f"must be above {error['ctx']['gt']}, not {show(error['input'], text)}",
    "greater_than_equal": lambda error, text: (
        f"must be at least {error['ctx']['ge']}, not {show(error['input'], text)}"
    ),
    "less_than_equal": lambda error, text: f"must be at most {error['ctx']['le']}, not {show(error['input'], text)}",
    "too_short": lambda error, text: "must not be empty",
    "value_error": lambda error, text: str(error["ctx"]["error"]),
}
