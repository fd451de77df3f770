"""`--patch-model` and its companions: on anybody's command line, in the environment, and from there to `apply`.

    parser = argparse.ArgumentParser()
    dit_patch.add_arguments(parser)
    ...
    handle = dit_patch.from_args(pipeline, parser.parse_args())

This module knows how choices are written down, and nothing of models. It imports no torch before there is something
to patch.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import DitPatchError, quote

if TYPE_CHECKING:
    from ..handle import Handle
    from .workers import RemoteHandle

AUTO, OFF = "auto", "off"
_PATCH_MODEL = (
    "patch the pipeline's transformers, losslessly: `auto` (or nothing after it) patches whatever there is a spec for; "
    "names of specs (diffusers/wan) or kinds of sites (rope,mask), with commas between them, patch only those; "
    "`off` patches nothing"
)
_STEP_CACHE = (
    "also skip blocks where a step changes little, which CHANGES THE OUTPUT: quality, balanced (where nothing "
    "follows), performance, or a .yaml file of knobs"
)
_MAX_BYTES = "what the caches of all patched models of a pipeline may hold, such as 2GiB or 500MB (default: 256MiB)"
_REPORT = "write what was patched and what it saved to PATH when the program ends; as JSON if PATH ends so; - prints it"


_BYTES = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>([kmgt]i?)?b?)", re.IGNORECASE)
_UNITS = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class Choice:
    """What the user chose to patch: the fields hold it as it was written, `options` is what it means for `apply`."""

    patch_model: str | None = None
    step_cache: str | None = None
    spec_dir: tuple[str, ...] = ()
    trust_specs: bool = False
    patch_report: str | None = None
    max_bytes: int | None = None

    @classmethod
    def from_args(cls, args: Any, environ: Mapping[str, str] | None = None) -> Choice:
        """Read parsed arguments, a Namespace or a mapping as click has it; where they say nothing, the environment.

        Raises:
            DitPatchError: a value has another type than its flag takes.
        """
        given = dict(args) if isinstance(args, Mapping) else vars(args)
        choice = cls.from_environment(os.environ if environ is None else environ)
        return replace(choice, **{name: value for name, value in _read_values(given).items() if value})

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Choice:
        """Read the variables in `VARIABLES`.

        Raises:
            DitPatchError: `DIT_PATCH_TRUST_SPECS` is neither 1 nor 0.
        """
        return cls(**_read_values({name: environ.get(variable) for name, variable in VARIABLES.items()}))

    def to_environment(self) -> dict[str, str]:
        """Return the variables from which `from_environment` reads this choice."""
        is_file = self.step_cache is not None and os.path.isfile(self.step_cache)
        texts = {
            "patch_model": self.patch_model,
            "step_cache": os.path.abspath(self.step_cache) if is_file else self.step_cache,
            "spec_dir": os.pathsep.join(map(os.path.abspath, self.spec_dir)),
            "trust_specs": "1" if self.trust_specs else "",
            "patch_report": self.patch_report,
            "max_bytes": str(self.max_bytes) if self.max_bytes else "",
        }
        return {VARIABLES[name]: text for name, text in texts.items() if text}

    @property
    def is_wanted(self) -> bool:
        """Whether anything is to be patched."""
        return _is_on(self.patch_model) or _is_on(self.step_cache)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for `dit_patch.apply`."""
        # Whoever asks for a step cache alone gets the lossless caches beside it, unless they were said to be off.
        words = [word.strip() for word in (self.patch_model or AUTO).split(",") if word.strip()]
        only = None if AUTO in words else () if words == [OFF] else tuple(words)
        step_cache = self.step_cache if _is_on(self.step_cache) else None
        options = {"only": only, "step_cache": step_cache, "specs": self.spec_dir, "trust": self.trust_specs}
        return options if self.max_bytes is None else {**options, "max_bytes": self.max_bytes}


VARIABLES = {
    "patch_model": "DIT_PATCH_MODEL",
    "step_cache": "DIT_PATCH_STEP_CACHE",
    "spec_dir": "DIT_PATCH_SPEC_DIR",
    "trust_specs": "DIT_PATCH_TRUST_SPECS",
    "patch_report": "DIT_PATCH_REPORT",
    "max_bytes": "DIT_PATCH_MAX_BYTES",
}
"""The environment variable that stands in for each flag; `DIT_PATCH_SPEC_DIR` is a list as PATH is one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--patch-model`, `--step-cache`, `--max-bytes`, `--spec-dir`, `--trust-specs` and `--patch-report`.

    Where a flag is not given, its environment variable counts (`DIT_PATCH_MODEL`, `DIT_PATCH_STEP_CACHE`,
    `DIT_PATCH_MAX_BYTES`, `DIT_PATCH_SPEC_DIR`, `DIT_PATCH_TRUST_SPECS`, `DIT_PATCH_REPORT`); without either nothing
    is patched.
    """
    group = parser.add_argument_group("dit_patch", f"or by {', '.join(VARIABLES.values())} in the environment")
    group.add_argument("--patch-model", nargs="?", const=AUTO, metavar="WHAT", help=_PATCH_MODEL)
    group.add_argument("--step-cache", nargs="?", const="balanced", metavar="PRESET", help=_STEP_CACHE)
    group.add_argument("--max-bytes", metavar="N", help=_MAX_BYTES)
    add_spec_arguments(group)
    group.add_argument("--patch-report", metavar="PATH", help=_REPORT)


def add_spec_arguments(parser: argparse._ActionsContainer) -> None:
    """Add `--spec-dir` and `--trust-specs`."""
    parser.add_argument("--spec-dir", action="append", default=[], metavar="DIR", help="another directory with specs")
    parser.add_argument("--trust-specs", action="store_true", help="let those specs name code of their own")


def from_args(pipeline: Any, args: Any) -> Handle | RemoteHandle | None:
    """Patch `pipeline` as the command line (or else the environment) says; None where it says nothing, or `off`.

    Args:
        pipeline: what `dit_patch.apply` takes.
        args: what the parser of `add_arguments` returned; or a mapping with any of the keys `patch_model`,
            `step_cache`, `max_bytes`, `spec_dir`, `trust_specs` and `patch_report`, for click, typer and others.

    Raises:
        DitPatchError: as `dit_patch.apply`.
    """
    choice = Choice.from_args(args)
    if not choice.is_wanted:
        return None
    from ..report.journal import journal
    from .workers import apply  # which knows of generators with workers, too

    handle = apply(pipeline, **choice.options)
    if choice.patch_report:
        journal.keep(handle)
        journal.report_at_exit(choice.patch_report)
    return handle


def _read_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Choice` from what an argument parser or the environment gives for each."""
    return {
        "patch_model": _read_text("patch_model", values, bare=AUTO),
        "step_cache": _read_text("step_cache", values, bare="balanced"),
        "spec_dir": _read_directories(values.get("spec_dir")),
        "trust_specs": _read_switch("trust_specs", values),
        "patch_report": _read_text("patch_report", values, bare=AUTO),
        "max_bytes": _read_bytes(values.get("max_bytes")),
    }


def _read_text(name: str, values: Mapping[str, Any], *, bare: str) -> str | None:
    """Return the text of a flag; `bare` for True, which click and typer give for a flag without a value."""
    value = values.get(name)
    if value is True:
        return bare
    if value is None or value is False:
        return None
    if not isinstance(value, (str, os.PathLike)):
        raise DitPatchError(f"{name}: {quote(repr(value))} is a {type(value).__name__}; expected text")
    return os.fspath(value) or None


def _read_directories(value: Any) -> tuple[str, ...]:
    """Return the directories of a sequence, or of text that lists them as PATH does."""
    if isinstance(value, str):
        value = value.split(os.pathsep)
    return tuple(os.fspath(each) for each in value or () if each)


def _read_bytes(value: Any) -> int | None:
    """Return a number of bytes from text with a unit (2GiB, 500MB, 4096), or from a number."""
    if value is None or value == "":
        return None
    found = _BYTES.fullmatch(str(value).strip())
    unit = found and found["unit"].lower()
    number = 0 if found is None else int(float(found["number"]) * (1024 if "i" in unit else 1000) ** _UNITS[unit[:1]])
    if number < 1:
        raise DitPatchError(f"max_bytes: {quote(value)} is no number of bytes; write 2GiB, 500MB or 268435456")
    return number


def _read_switch(name: str, values: Mapping[str, Any]) -> bool:
    value = values.get(name)
    if not isinstance(value, str):
        return bool(value)
    if value.lower() not in ("", "0", "1", "false", "true", "no", "yes"):
        raise DitPatchError(f"{VARIABLES[name]}: {quote(value)} is neither 1 nor 0")
    return value.lower() in ("1", "true", "yes")


def _is_on(text: str | None) -> bool:
    return bool(text) and text != OFF
