"""Read the command line of `dit-patch`, and run the subcommand.

It starts without torch: each subcommand imports what it needs when it runs. argparse does, since the flags are added to
other programs' argparse parsers too, and the command has no dependency of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import IO

from ..errors import DitPatchError, quote, suggest
from ..extras import installed_version

COMMANDS = {
    "list": "the models that there are specs for",
    "show": "one spec: its model, its sites and what their results depend on",
    "run": "run a program of somebody else's, unmodified, with the models in it patched",
    "report": "what processes have left that others started, under `run --print-env`",
    "generate": "generate with a diffusers pipeline: prompt in, video or image out, patched or not",
    "demo": "generate with small real pipelines, unpatched and patched, and compare the frames",
    "check": "try a spec on its model, patched against unpatched, and say what is wrong with it",
    "audit": "what a forward repeats, copies and waits for, at full size, without a GPU and without weights",
    "new": "write the beginning of a spec for a class of models",
    "doctor": "what this environment has, and what patching does with the models in it; for bug reports",
    "schema": "the JSON Schema of a spec, for your editor",
    "bench": "measure what patching saves: hit cost, site times at real sizes, whole forwards",
    "bench step-cache": "what step caching gains and costs: baseline and cached side by side, with controls",
    "bench here": "what patching brings on this GPU, in minutes: whole forwards of real sizes, kernels, a CUDA graph",
    "bench host": "what patching costs or saves the host: whole forwards, calls inside them, growth",
    "bench rotary": "applying RoPE: eager, compiled, ours and others' side by side, then whole forwards",
}
"""The subcommands, each with what it does; each has a module here with `arguments` and `run`."""

_DESCRIPTION = "Makes existing diffusion transformers faster from outside: one line, the same bits, a way back."
_EPILOG = """\
to begin with:
  dit-patch demo                                            see it work, offline
  dit-patch run -- python generate.py                       your program, patched, with a report at its end
  dit-patch generate --model PATH --prompt "..." --patch-model

in a program of your own:
  handle = dit_patch.apply(pipeline); print(handle); handle.remove()

`dit-patch COMMAND --help` says what a command takes.
"""
_INTERRUPTED, _PIPE_CLOSED = 130, 141  # what a shell makes of SIGINT and SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dit-patch`.

    Returns:
        The exit status: 0 when everything went well, 1 after a result or an error that says no, 130 after Ctrl-C, 141
        where nobody reads the output any more. A command line that cannot be read ends in `SystemExit(2)`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _flushed(lambda: _run(arguments))
    except DitPatchError as error:
        return _fail(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        _drop_output()
        return _PIPE_CLOSED
    except OSError as error:
        if _output_works():
            raise
        _drop_output()
        return _fail(f"standard output cannot be written: {error.strerror or error}")


def _run(arguments: list[str]) -> int:
    """Find the subcommand, which has one word or two, and run it."""
    for count in (2, 1):
        name = " ".join(arguments[:count])
        if len(arguments) >= count and name in COMMANDS:
            options = _parser(name).parse_args(arguments[count:])
            return options.run(options)
    parser = _overview()
    if arguments and not arguments[0].startswith("-"):
        parser.error(f"no command {quote(arguments[0])}{suggest(arguments[0], COMMANDS)}")
    if not parser.parse_args(arguments).version:
        parser.error("no COMMAND is given")
    print(f"dit-patch {installed_version('dit-patch')}")
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse's, which keeps to itself that its help could not be written."""

    def print_help(self, file: IO[str] | None = None) -> None:
        print(self.format_help(), end="", file=file)


def _parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of one subcommand."""
    # A flag that is cut short might be one that changes the output.
    parser = _Parser(prog=f"dit-patch {name}", allow_abbrev=False, description=_sentence(name))
    module = import_module(f".{name.replace(' ', '_').replace('-', '_')}", __package__)
    module.arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def _overview() -> argparse.ArgumentParser:
    """Return the parser of a command line without a subcommand: it has the help on all of them."""
    parser = _Parser(
        prog="dit-patch",
        usage="dit-patch [--help] [--version] COMMAND ...",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="show the version")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser


def _sentence(name: str) -> str:
    return f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}."


def _flushed(run: Callable[[], int]) -> int:
    """Run, and then write what is still in the buffer of standard output: here its errors can be told."""
    try:
        status = run()
    except SystemExit:  # argparse's, after its help
        _flush()
        raise
    _flush()
    return status


def _flush() -> None:
    if sys.stdout is not None:  # it was closed before Python began
        sys.stdout.flush()


def _output_works() -> bool:
    """Return whether standard output can be written, by an empty line, since not all of it need be buffered."""
    try:
        _flush()
        if sys.stdout is not None:
            os.write(sys.stdout.fileno(), b"\n")
    except (OSError, ValueError):
        return False
    return True


def _drop_output() -> None:
    """Let the interpreter find nothing at its end that it would complain about."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int = 1) -> int:
    print(f"dit-patch: {message}", file=sys.stderr)
    return status
