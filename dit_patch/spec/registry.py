"""Where specs come from, and which of them is for a class.

Specs are the YAML files that come with dit_patch, those of installed packages (entry points of group
`dit_patch.specs`), and those in directories that the user names. A registry reads them at first use and keeps them;
there is no other table. It knows nothing about models beyond the dotted names of their classes.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, get_args

from ..errors import DitPatchError, SpecError, quote, suggest
from ..findings import Finding, FindingKind, warn
from .field_types import Kind
from .loading import load
from .model import Spec, extend

KINDS: tuple[str, ...] = get_args(Kind)
GROUP = "dit_patch.specs"

_HERE = Path(__file__).parents[1]
# In a wheel the specs lie inside the package; in a checkout, editable or not, next to it.
BUNDLED = next((path for path in (_HERE / "specs", _HERE.parent / "specs") if path.is_dir()), _HERE / "specs")


class _Source(NamedTuple):
    """A directory of specs, how messages call it, and whether its specs may name code of their own."""

    root: Path
    label: str
    trusted: bool
    may_be_empty: bool = False
    #: The installed package that brings them, where it is another than dit_patch.
    package: str | None = None


class _File(NamedTuple):
    path: Path
    trusted: bool
    package: str | None


class Registry:
    """The specs that are known, by name and by class.

    `directories` are the user's own; their specs may name code outside dit_patch only with `trust=True`. `bundled` and
    `plugins` say whether the specs that come with dit_patch, and with other installed packages, are among them.

    What is wrong with the specs of another package is warned of, and they are left out: it is no fault of whoever
    patches a model of a third one. With `strict` it is an error.
    """

    def __init__(
        self,
        directories: Iterable[str | Path] | str | Path = (),
        *,
        trust: bool = False,
        bundled: bool = True,
        plugins: bool = True,
        strict: bool = False,
    ) -> None:
        own = (directories,) if isinstance(directories, (str, os.PathLike)) else directories
        self._directories = tuple(Path(directory) for directory in own)
        self._trust, self._bundled, self._plugins, self._strict = trust, bundled, plugins, strict
        self._loaded: dict[str, Spec] = {}

    def __repr__(self) -> str:
        own = [str(directory) for directory in self._directories]
        return f"Registry({own}, trust={self._trust}, bundled={self._bundled}, plugins={self._plugins})"

    def names(self) -> list[str]:
        """Return the names of all specs, such as "diffusers/wan", in order, without reading any."""
        return sorted(self._files)

    def __iter__(self) -> Iterator[Spec]:
        return iter(self._all)

    def get(self, name: str) -> Spec:
        """Return the spec of that name, complete with what it extends.

        Raises:
            SpecError: there is none, or something is wrong with it.
        """
        if name not in self._files:
            known = ", ".join(self.names()) or "none"
            raise SpecError(f"no spec {quote(name)}{suggest(name, self._files) or '.'} Known: {known}")
        return self._load(name, ())

    def read(self, path: str | Path) -> Spec:
        """Return the spec in a file, which need not be in one of the directories; it may extend any that is known."""
        path = Path(path)
        own = next((name for name, file in self._files.items() if file.path.resolve() == path.resolve()), None)
        if own is not None:
            return self._load(own, ())
        spec = load(path, trusted=self._trust)
        return spec if spec.extends is None else extend(self._base(spec, (spec.name,)), spec)

    def selection(self, words: Iterable[str], flag: str, hint: str = "") -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Sort words into kinds of sites and names of specs, each once and in order.

        Raises:
            DitPatchError: a word is neither; the message names the `flag`, and ends with the hint.
        """
        words = set(words)
        for word in sorted(words.difference(KINDS)):
            if word not in self._files:
                raise DitPatchError(
                    f"{flag}: {quote(word)} is no kind and no spec{suggest(word, (*KINDS, *self.names()))}\n"
                    f"    Kinds: {', '.join(KINDS)}.\n    Specs: {', '.join(self.names()) or 'none'}.{hint}"
                )
        return tuple(kind for kind in KINDS if kind in words), tuple(sorted(words.difference(KINDS)))

    def classes(self) -> dict[str, Spec]:
        """Return the spec of each class that has one, by the class's dotted name."""
        return dict(self._classes)

    def find(self, cls: type) -> Spec | None:
        """Return the spec of the class or, if it has none, of the nearest class that it inherits from."""
        named = (self._classes.get(f"{base.__module__}.{base.__qualname__}") for base in cls.__mro__)
        return next((spec for spec in named if spec is not None), None)

    @cached_property
    def _files(self) -> dict[str, _File]:
        files: dict[str, _File] = {}
        seen: set[Path] = set()
        sources = list(self._sources())
        for source in sources:
            try:
                paths = _yaml_files(source)
            except SpecError as error:
                self._refuse(source.package, str(error))
                continue
            for path in paths:
                if len(sources) > 1:  # a directory may be named twice, or lie inside another
                    real = path.resolve()
                    if real in seen:
                        continue
                    seen.add(real)
                name = path.relative_to(source.root).with_suffix("").as_posix()
                if name in files:
                    message = f"two specs are called {quote(name)}: {files[name].path} and {path}; rename one"
                    self._refuse(source.package, message)
                else:
                    files[name] = _File(path, source.trusted, source.package)
        return files

    def _sources(self) -> Iterator[_Source]:
        if self._bundled:
            yield _Source(BUNDLED, f"the specs that come with dit_patch, {quote(BUNDLED)}", True, may_be_empty=True)
        if self._plugins:
            for entry in metadata.entry_points(group=GROUP):
                try:
                    yield _plugin(entry)
                except SpecError as error:
                    self._refuse(_package(entry), str(error))
        for directory in self._directories:
            yield _Source(directory, f"the directory {quote(directory)}", self._trust)

    def _refuse(self, package: str | None, message: str) -> None:
        """Raise the message; where another package is at fault, only warn, unless `strict` was asked for."""
        if package is None or self._strict:
            raise SpecError(message)
        warn(Finding(FindingKind.PLUGIN_FAULT, package, message), stacklevel=2)

    @cached_property
    def _all(self) -> list[Spec]:
        specs: list[Spec] = []
        complaints: dict[str, None] = {}
        faults: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.names():
            try:
                specs.append(self._load(name, ()))
            except SpecError as error:
                package = self._files[name].package
                if package is None:
                    complaints[str(error)] = None
                else:
                    faults[package].append(str(error))
        if complaints:
            raise SpecError("\n".join(complaints))
        for package, messages in faults.items():
            self._refuse(package, "\n".join(dict.fromkeys(messages)))
        return specs

    @cached_property
    def _classes(self) -> dict[str, Spec]:
        classes: dict[str, Spec] = {}
        # Of two specs for a class, that of another package gives way.
        for spec in sorted(self._all, key=lambda each: self._package_of(each) is not None):
            for name in spec.classes:
                if name in classes:
                    first, second = (_position(each) for each in (classes[name], spec))
                    message = f"{second}: {quote(name)} already has a spec, {first}; a class has one"
                    self._refuse(self._package_of(spec), message)
                else:
                    classes[name] = spec
        return classes

    def _package_of(self, spec: Spec) -> str | None:
        return self._files[spec.name].package

    def _load(self, name: str, extending: tuple[str, ...]) -> Spec:
        """Return a spec, read once; `extending` are the specs that this one is a base of, outermost first."""
        if name in self._loaded:
            return self._loaded[name]
        path, trusted, _ = self._files[name]
        spec = _load_once(path, name, trusted)
        if spec.extends is not None:
            spec = _extend_once(path, self._base(spec, (*extending, name)), spec)
        self._loaded[name] = spec
        return spec

    def _base(self, spec: Spec, extending: tuple[str, ...]) -> Spec:
        base = spec.extends
        if base in extending:
            circle = " -> ".join((*extending[extending.index(base) :], base))
            raise SpecError(f"{spec.position('extends')}: extends: goes round in a circle: {circle}")
        if base not in self._files:
            hint = suggest(base, self._files) or f". Known: {', '.join(self.names())}"
            raise SpecError(f"{spec.position('extends')}: extends: no spec {quote(base)}{hint}")
        return self._load(base, extending)


_read: dict[tuple[Path, str, bool], tuple[tuple[int, ...], Spec]] = {}
"""Specs as they were last read in this process, each with what told the file from an earlier one."""


_extended: dict[Path, tuple[Spec, Spec, Spec]] = {}
"""Specs that extend another, by their file: the base, the spec alone, and both together, as they were last."""


def _extend_once(path: Path, base: Spec, spec: Spec) -> Spec:
    """Return the spec with what it has from its base; put together again only if one of them is another."""
    known = _extended.get(path)
    if known is None or known[0] is not base or known[1] is not spec:
        known = _extended[path] = base, spec, extend(base, spec)
    return known[2]


def _load_once(path: Path, name: str, trusted: bool) -> Spec:
    """Return the spec in a file, without what it extends; read again only if the file is another."""
    file = path.stat()
    stamp = file.st_mtime_ns, file.st_size, file.st_ino
    known = _read.get((path, name, trusted))
    if known is None or known[0] != stamp:
        known = _read[path, name, trusted] = stamp, load(path, name=name, trusted=trusted)
    return known[1]


def _yaml_files(source: _Source) -> list[Path]:
    if not source.root.is_dir():
        raise SpecError(f"{source.label} does not exist" if not source.root.exists() else f"{source.label} is a file")
    files = sorted(
        path
        for path in source.root.rglob("*")
        if path.suffix in (".yaml", ".yml") and not _is_hidden(path.relative_to(source.root)) and path.is_file()
    )
    if not files and not source.may_be_empty:
        raise SpecError(f"{source.label} holds no spec (*.yaml, *.yml)")
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _position(spec: Spec) -> str:
    return spec.position("model" if spec.model else "models")


def _package(entry: metadata.EntryPoint) -> str:
    """Return what to call the package that an entry point is of."""
    return entry.dist.name if entry.dist else entry.name


def _plugin(entry: metadata.EntryPoint) -> _Source:
    """Return the directory that an entry point names, `package.folder` or `package:folder`, importing nothing of it."""
    package, *folders = entry.value.replace(":", ".").replace("/", ".").split(".")
    owner = f" of {entry.dist.name}" if entry.dist else ""
    words = f"{quote(entry.value)}, from the entry point {quote(entry.name)}{owner},"
    found = find_spec(package) if package else None
    for location in (found and found.submodule_search_locations) or ():
        root = Path(location, *folders)
        if root.is_dir():
            return _Source(root, words, True, package=_package(entry))
    raise SpecError(f"{words} is not a package or a directory inside one (group {GROUP!r})")
