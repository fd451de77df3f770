"""Packages: those that only a part of dit_patch needs, looked for before that part begins, and their versions."""

from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec

from .errors import DitPatchError


def require(what: str, needed: Mapping[str, str], extra: str, error: type[DitPatchError] = DitPatchError) -> None:
    """Refuse where one of the modules in `needed`, each with the package that brings it, cannot be imported.

    Raises:
        DitPatchError: or `error`; it names the packages and the extra that has them.
    """
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        raise error(f"{what} needs {', '.join(missing)}: pip install 'dit-patch[{extra}]'")


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def installed_version(package: str) -> str:
    """Return the installed version of a package; 0.0.0 where it is a plain checkout."""
    return version(package) or "0.0.0"
