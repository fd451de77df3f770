"""Read the command line of `dit-patch`, and run the subcommand.

It starts without torch: each subcommand imports what it needs when it runs. argparse does, since the flags are added to
other programs' argparse parsers too, and the command has no dependency of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from ..errors import DitPatchError

COMMANDS = {
    "list": "the models that there are specs for",
    "show": "one spec: its model, its sites and what their results depend on",
    "run": "run a program of somebody else's, unmodified, with the models in it patched",
    "generate": "generate with a diffusers pipeline: prompt in, video or image out, patched or not",
    "demo": "generate with small real pipelines, unpatched and patched, and compare the frames",
    "check": "try a spec on its model, patched against unpatched, and say what is wrong with it",
    "new": "write the beginning of a spec for a class of models",
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dit-patch`; the exit status is 0 when everything went well, 1 after a result or an error that says no."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if " ".join(arguments[:2]) in COMMANDS:  # a command of two words, beside one of the first alone
        arguments[:2] = [" ".join(arguments[:2])]
    options = _parser(arguments[0] if arguments else "").parse_args(arguments)
    try:
        return options.run(options)
    except DitPatchError as error:
        print(f"dit-patch: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1


def _parser(chosen: str) -> argparse.ArgumentParser:
    """Return the parser of all commands; only the chosen one has its arguments, since they need its imports."""
    parser = argparse.ArgumentParser(
        prog="dit-patch", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == chosen:
            module = import_module(f".{name.replace(' ', '_').replace('-', '_')}", __package__)
            module.arguments(command)
            command.set_defaults(run=module.run)
    return parser
