"""Files and folders that commands write: looked at before the work begins, then written whole or not at all.

check_file("--csv", path)           # an error now, rather than after an hour
...
with replacing(path) as draft:      # beside `path`; renamed when all has gone well, else removed
    draft.write_text(text)
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import LONG, DitPatchError, quote


def check_file(flag: str, path: str | os.PathLike | None) -> None:
    """Refuse a file that cannot be written; None, for no file, is none.

    Raises:
        DitPatchError: it is a folder, or its folder is missing or cannot be written in.
    """
    if path is None:
        return
    path = Path(path)
    if path.is_dir():
        raise DitPatchError(f"{flag}: {quote(path, LONG)} is a folder; give the name of a file")
    if path.exists() and not os.access(path, os.W_OK):  # it could be replaced all the same
        raise DitPatchError(f"{flag}: {quote(path, LONG)} cannot be written: it is read-only")
    if not _is_special(path):
        check_place(flag, path)


def check_place(flag: str, path: str | os.PathLike) -> None:
    """Refuse a path, of a file or a folder, beside which no draft can be written.

    Raises:
        DitPatchError: its folder is missing or cannot be written in.
    """
    _try_to_write(flag, Path(path), Path(path).parent)


def check_folder(flag: str, path: str | os.PathLike) -> None:
    """Refuse a folder that cannot be written in; where it is missing, it and those above it will be made.

    Raises:
        DitPatchError: it is a file, or cannot be made or written in.
    """
    path = folder = Path(path)
    if path.exists() and not path.is_dir():
        raise DitPatchError(f"{flag}: {quote(path, LONG)} is a file; give a folder")
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    _try_to_write(flag, path, folder)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield the path of a draft with the same ending, which takes the place of `path` if nothing is raised.

    Where `path` is a device or a pipe, such as /dev/stdout, it is written directly. A link stays one.
    """
    path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    if _is_special(path):
        yield path
        return
    draft = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield draft
        if draft.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
        raise


@contextmanager
def write_errors(flag: str, path: str | os.PathLike) -> Iterator[None]:
    """Turn errors of writing into one that names the flag and the path."""
    try:
        yield
    except OSError as error:
        raise _cannot(flag, path, error) from error


def _try_to_write(flag: str, path: Path, folder: Path) -> None:
    """Try to make a file in the folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot(flag, path, error) from error


def _cannot(flag: str, path: str | os.PathLike, error: OSError) -> DitPatchError:
    return DitPatchError(f"{flag}: {quote(path, LONG)} cannot be written: {error.strerror or error}")


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()
