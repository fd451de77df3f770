"""`dit-patch run`: start a command whose Python processes patch themselves, and print the report when it has ended.

It imports no torch: the programs do.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DitPatchError, quote
from ..outputs import check_file, check_folder, write_errors
from ..report.document import path_of_process, save
from .chosen_specs import chosen_specs
from .flags import AUTO, VARIABLES, Choice
from .run_folder import CLASSES, CLASSES_VARIABLE, FOLDER, SITE, STRICT
from .summary import Summary

NOT_PATCHED = 3
"""The exit status of a run with `--strict` in which the command itself went well, and not everything was patched."""

_FORWARDED = ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_KEYS = ("SIGINT", "SIGQUIT")  # which a terminal sends to all processes in the foreground by itself


def run_command(choice: Choice, command: Sequence[str], *, strict: bool = False) -> int:
    """Run `command`, and return its exit status, as a shell gives it (128 and more: ended by a signal).

    Raises:
        DitPatchError: the choice makes no sense, before anything is started.
    """
    choice = _with_default(choice)
    if not choice.is_wanted:
        print("dit-patch run: --patch-model off: the command runs as it is", file=sys.stderr)
        return wait_for(command, _without_flags(os.environ))
    hint = "\n    If it begins the command, put -- before it: dit-patch run --patch-model -- COMMAND ..."
    classes = chosen_specs(choice, hint=hint, strict=strict)
    report = _report_file(choice.patch_report)
    folder = Path(tempfile.mkdtemp(prefix="dit-patch-run-"))
    try:
        (folder / CLASSES).write_text("".join(f"{name}\n" for name in classes), "utf-8")
        status = wait_for(command, _environment(choice, folder, strict))
        summary = Summary.from_folder(folder, command, status)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _print_summary(summary, report)
    if strict and not status and (summary.why_nothing or summary.failures):
        return NOT_PATCHED
    return status


def environment_for_workers(choice: Choice, folder: Path | None, *, strict: bool = False) -> dict[str, str]:
    """Return the variables under which Python processes patch themselves, wherever somebody else starts them.

    Args:
        choice: of the command line.
        folder: where each process leaves its report, for `dit-patch report`; it is made. None prints each report when
            its process ends.
        strict: a model that cannot be patched is an error of its program.

    Raises:
        DitPatchError: the choice makes no sense, or the folder cannot be written in.
    """
    choice = _with_default(choice)
    classes = chosen_specs(choice, strict=strict)
    if folder is not None:
        check_folder("--patch-report", folder)
        with write_errors("--patch-report", folder):
            folder.mkdir(parents=True, exist_ok=True)
    environment = _environment(choice, folder, strict)
    ours = {name: value for name, value in environment.items() if name == "PYTHONPATH" or name.startswith("DIT_PATCH_")}
    return {**ours, CLASSES_VARIABLE: " ".join(classes)}


def _with_default(choice: Choice) -> Choice:
    """Return the choice with everything patched where nothing was said of it."""
    return choice if choice.patch_model is not None else replace(choice, patch_model=AUTO)


def _report_file(path: str | None) -> str | None:
    """Return the absolute path of the report, or None for standard error.

    Raises:
        DitPatchError: no file can be written there. It is checked before the command starts, which may run for hours.
    """
    if path is None or path == "-":
        return None
    path = os.path.abspath(path_of_process(path))
    check_file("--patch-report", path)
    return path


def _environment(choice: Choice, folder: Path | None, strict: bool) -> dict[str, str]:
    environment = _without_flags(os.environ)
    environment |= replace(choice, patch_report=None).to_environment()
    if folder is not None:
        environment[FOLDER] = str(folder.absolute())
    if strict:
        environment[STRICT] = "1"
    return environment | python_path(environment)


def python_path(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that has Python processes begin with our `sitecustomize`, before what is on it already."""
    theirs = environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(SITE), theirs] if theirs else [str(SITE)])}


def _without_flags(environ: Mapping[str, str]) -> dict[str, str]:
    ours = {*VARIABLES.values(), FOLDER, STRICT, CLASSES_VARIABLE}
    return {name: value for name, value in environ.items() if name not in ours}


class CommandError(DitPatchError):
    """The command could not be started; `status` is what a shell returns then."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    name = command[0]
    try:
        return subprocess.Popen(list(command), env=environment)
    except PermissionError as error:
        python = f"\n    Did you mean `python {name} ...`?" if name.endswith(".py") else ""
        raise CommandError(f"{quote(name)} may not be executed ({error.strerror}){python}", 126) from None
    except OSError as error:
        python = f"\n    Did you mean `python {name} ...`?" if os.path.isfile(name) and name.endswith(".py") else ""
        raise CommandError(f"no command {quote(name)} ({error.strerror}){python}", 127) from None


def wait_for(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command to its end, and return its exit status as a shell gives it."""
    with _forwarded_signals() as forward_to:
        process = _start(command, environment)
        forward_to(process)
        status = process.wait()
    return 128 - status if status < 0 else status


@contextmanager
def _forwarded_signals() -> Iterator[Callable[[subprocess.Popen], None]]:
    """Send signals on to the command; those of a terminal's keys it gets by itself.

    Yields a function to be called with the command's process. Signals that come earlier are sent then.
    """
    started: list[subprocess.Popen] = []
    early: list[int] = []

    def forward(number: int, frame: Any) -> None:
        if signal.Signals(number).name in _KEYS and _in_foreground():
            return
        if not started:
            early.append(number)
            return
        with suppress(ProcessLookupError):
            started[0].send_signal(number)

    def forward_to(process: subprocess.Popen) -> None:
        started.append(process)
        while early:
            forward(early.pop(0), None)

    numbers = [getattr(signal, name) for name in _FORWARDED if hasattr(signal, name)]
    # What nohup has set to be ignored stays ignored.
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, forward)
    try:
        yield forward_to
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _in_foreground() -> bool:
    """Return whether a terminal sends its keys to our process group."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDONLY)
    except (OSError, AttributeError):
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _print_summary(summary: Summary, report: str | None) -> None:
    if report is not None:
        try:
            save(report, summary.document, lambda _: str(summary))
        except OSError as error:
            print(f"dit-patch run: the report could not be written to `{report}`: {error}", file=sys.stderr)
            report = None
    if report is None:
        print(f"\n{summary}", file=sys.stderr, flush=True)
        return
    print(f"\n{summary.headline}; the report is in {report}", file=sys.stderr, flush=True)
    if summary.verdict is not None:
        print(summary.verdict, file=sys.stderr, flush=True)
