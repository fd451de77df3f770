"""YAML text to plain data that remembers the line and column of everything.

It reads the part of YAML that a declaration needs and refuses the rest (tags, anchors, aliases, duplicate keys, several
documents, unbounded size) with file:line:column. Plain words are read as YAML 1.2 and JSON Schema read them, so that
`on` and `no` stay words. It knows nothing about specs.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import SpecError, quote

Loc = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 10_000

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CONSTANTS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    word: value for value in (True, False) for word in (str(value), str(value).lower(), str(value).upper())
}
# Not more digits than a 64-bit size has, and no leading zero: YAML 1.1 and 1.2 disagree on what that means.
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?")


class Position(NamedTuple):
    """A line and a column, both counted from 1."""

    line: int
    column: int


class Place(NamedTuple):
    """The position of one entry and of its key, and the text that a scalar was written as."""

    key: Position | None
    value: Position
    text: str | None

    @property
    def start(self) -> Position:
        """The position of the value, or of its key where the value is a block that begins further down."""
        return self.key if self.key and self.key.line != self.value.line else self.value


@dataclass
class Document:
    """The data of one file, with a `Place` for every entry by its path, such as `("sites", 1, "key")`."""

    file: str
    data: Any = field(default=None, repr=False)
    places: dict[Loc, Place] = field(default_factory=dict, repr=False)
    complaints: list[tuple[Position, str]] = field(default_factory=list)

    def existing_part(self, loc: Loc) -> Loc:
        """Return the part of `loc` that the file has: steps that name nothing in it are left out."""
        part: Loc = ()
        for step in loc:
            if (*part, step) in self.places:
                part = (*part, step)
        return part

    def label(self, position: Position) -> str:
        """Return `file:line:column`, which editors and terminals make clickable."""
        return f"{self.file}:{position.line}:{position.column}"


def read_file(path: Path, file: str) -> str:
    """Return the text of `path`, which messages call `file`; SpecError where it cannot be read or is too large."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        return _bounded(raw, file).decode("utf-8-sig")
    except OSError as error:
        raise SpecError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise SpecError(f"{file}:{line}:{column}: not UTF-8 text") from error


def parse(text: str, file: str) -> Document:
    """Return the one document in `text`; SpecError where that uses YAML which is not understood here."""
    unprintable = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if unprintable:
        line = text.count("\n", 0, unprintable.start()) + 1
        column = unprintable.start() - text.rfind("\n", 0, unprintable.start())
        raise SpecError(f"{file}:{line}:{column}: the character {quote(unprintable[0])} is not allowed in YAML")
    _bounded(text.encode(), file)
    try:
        return _Reader(text, file).document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        label = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        raise SpecError(f"{label}: {_problem(error, text)}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{file}: {error}") from error


def _bounded(raw: bytes, file: str) -> bytes:
    if len(raw) > MAX_BYTES:
        raise SpecError(f"{file}: larger than {MAX_BYTES // 1024} KiB, which no spec is")
    return raw


def _problem(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark
    lines = text.splitlines()
    if mark and mark.line < len(lines):
        before = lines[mark.line][: mark.column + 1]
        # The two parsers stop on a stray tab or right behind it, and neither of them says its name.
        if "\t" in before[-2:] or "\t" in before[: len(before) - len(before.lstrip())]:
            return "a tab; YAML is indented with spaces"
    return " ".join(filter(None, (error.problem, error.context)))


def _position(event: yaml.Event) -> Position:
    return Position(event.start_mark.line + 1, event.start_mark.column + 1)


class _Reader:
    """Reads a document in one pass over the parser's events, which are lazy: nothing is read behind what is refused."""

    def __init__(self, text: str, file: str) -> None:
        self.document = Document(file)
        self.events: Iterator[yaml.Event] = yaml.parse(text, Loader=_LOADER)
        self.nodes = 0
        next(self.events)
        first = next(self.events)
        if isinstance(first, yaml.StreamEndEvent):
            raise SpecError(f"{file}:1:1: the file is empty")
        self.document.data = self.node(next(self.events), ())
        next(self.events)
        more = next(self.events)
        if not isinstance(more, yaml.StreamEndEvent):
            raise self.refusal(more, "a second document begins; a file holds one spec")

    def refusal(self, event: yaml.Event, message: str) -> SpecError:
        return SpecError(f"{self.document.label(_position(event))}: {message}")

    def node(self, event: yaml.Event, loc: Loc, key: Position | None = None) -> Any:
        self.check(event, len(loc))
        text = event.value if isinstance(event, yaml.ScalarEvent) else None
        self.document.places[loc] = Place(key, _position(event), text)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(loc)
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(loc)
        return _plain(event.value) if event.implicit[0] else event.value

    def check(self, event: yaml.Event, depth: int) -> None:
        if isinstance(event, yaml.AliasEvent):
            raise self.refusal(event, f"an alias, {quote('*' + event.anchor)}; write the value out instead")
        if event.anchor is not None:
            raise self.refusal(event, f"an anchor, {quote('&' + event.anchor)}; write the value out where it is used")
        if event.tag is not None:
            raise self.refusal(event, f"a tag, {quote(event.tag)}; a spec is plain text, numbers, lists and mappings")
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.refusal(event, f"more than {MAX_NODES} entries, which no spec has")
        if depth > MAX_DEPTH:
            raise self.refusal(event, f"nested more than {MAX_DEPTH} deep, which no spec is")

    def sequence(self, loc: Loc) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, (*loc, len(items))))
        return items

    def mapping(self, loc: Loc) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            self.check(event, len(loc) + 1)
            if not isinstance(event, yaml.ScalarEvent):
                raise self.refusal(event, "a key must be a word, not a list or a mapping")
            name, position = event.value, _position(event)
            if name not in items:
                items[name] = self.node(next(self.events), (*loc, name), position)
                continue
            first = self.document.places[(*loc, name)].key
            self.document.complaints.append((position, f"{quote(name)} is given twice; first in line {first.line}"))
            # Read for what else is wrong with it, at a path of its own that no complaint will look for.
            self.node(next(self.events), (*loc, f"{name} (line {position.line}:{position.column})"), position)
        return items


def _plain(text: str) -> Any:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text
