"""From a YAML file to a spec, with everything that is wrong with it said at once; the only way to make one."""

import os
from pathlib import Path

from pydantic import ValidationError

from ..errors import SpecError
from .messages import describe_error, is_consequence
from .model import Spec
from .origin import Origin
from .recipe import Mini
from .trust import untrusted_code
from .yaml_reader import Document, parse, read_file

MAX_COMPLAINTS = 50


def load(path: str | Path, *, name: str | None = None, trusted: bool = False) -> Spec:
    """Return the spec in a YAML file.

    Args:
        path: of the file.
        name: what the spec is called; the file's name, if none is given.
        trusted: whether the spec may name code outside dit_patch.

    Raises:
        SpecError: with file:line:column for everything that is wrong with it, all at once.
    """
    path = Path(path)
    file = _file_name(path)
    return _build(parse(read_file(path, file), file), name or path.stem, path, trusted)


def loads(text: str, *, file: str = "<text>", name: str = "", trusted: bool = False) -> Spec:
    """Return the spec in a YAML text, which messages call `file`.

    Raises:
        SpecError: as `load`.
    """
    return _build(parse(text, file), name, None, trusted)


def load_mini(path: str | Path) -> Mini:
    """Return the `mini` of a spec in a YAML file, the rest of which need not be right yet.

    Raises:
        SpecError: there is none, or with file:line:column for everything that is wrong with it.
    """
    path = Path(path)
    document = parse(read_file(path, _file_name(path)), _file_name(path))
    complaints = list(document.complaints)
    given = document.data.get("mini") if isinstance(document.data, dict) else None
    if not isinstance(given, dict) and not complaints:
        raise SpecError(f"{document.file}: has no `mini`, a mapping with config, sizes and inputs")
    try:
        if not complaints:
            return Mini.model_validate(given)
    except ValidationError as error:
        found = ({**each, "loc": ("mini", *each["loc"])} for each in error.errors())
        complaints += [describe_error(each, document, Spec) for each in found if not is_consequence(each)]
    raise _error(document, complaints)


def _file_name(path: Path) -> str:
    """Return the file's path as messages show it: from the current directory, if it is in there."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return os.fspath(path)


def _build(document: Document, name: str, path: Path | None, trusted: bool) -> Spec:
    complaints = list(document.complaints)
    spec = None
    if isinstance(document.data, dict):
        try:
            origin = Origin.of_document(document, name, path, trusted)
            spec = Spec.model_validate(document.data, context=origin)
        except ValidationError as error:
            complaints += [describe_error(each, document, Spec) for each in error.errors() if not is_consequence(each)]
    else:
        complaints.append((document.places[()].value, "a spec is a mapping that begins with `model:`"))
    if not trusted and isinstance(document.data, dict):
        complaints += untrusted_code(document)
    if complaints or spec is None:
        raise _error(document, complaints)
    return spec


def _error(document: Document, complaints: list) -> SpecError:
    """Return everything that is wrong as one error, in the order of the file."""
    lines = list(dict.fromkeys(f"{document.label(at)}: {message}" for at, message in sorted(complaints)))
    more = [f"{document.file}: and {len(lines) - MAX_COMPLAINTS} more"] if len(lines) > MAX_COMPLAINTS else []
    return SpecError("\n".join(lines[:MAX_COMPLAINTS] + more))
