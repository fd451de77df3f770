"""`dit-patch run`, see `dit_patch.launch`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from ..launch import flags

_EPILOG = """\
examples:
  dit-patch run -- python generate.py --prompt "a cat"
  dit-patch run --step-cache -- torchrun --nproc-per-node 2 generate.py
  dit-patch run --patch-report run.json -- accelerate launch generate.py
  eval "$(dit-patch run --print-env --patch-report /shared/reports)"    # then start workers in your own way

Every Python process that COMMAND starts patches the models it makes, each at its first forward; the program itself is
not changed. Without --patch-model everything is patched that there is a spec for. At the end there is a report on each
process, on standard error or in a file.

The exit status is COMMAND's (128 + n where signal n ended it; 127 where there is no such command, 126 where it may not
be executed). With --strict it is 3 where COMMAND went well and something, or everything, was not patched.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "dit-patch run [--patch-model [WHAT]] [--step-cache [PRESET]] [--strict] [...] -- COMMAND ..."
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    flags.add_arguments(parser)
    parser.add_argument(
        "--strict", action="store_true", help="a model that cannot be patched is an error of the program, where it runs"
    )
    parser.add_argument(
        "--print-env",
        nargs="?",
        const="sh",
        choices=("sh", "json"),
        help="run nothing: print the variables under which processes that others start (Ray, Slurm, Kubernetes) patch "
        "themselves, for a shell or as JSON; --patch-report is then a folder, for `dit-patch report`",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to run, with its arguments")
    parser.set_defaults(refuse=parser.error)


def run(options: argparse.Namespace) -> int:
    if options.print_env is not None:
        return _print_environment(options)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        eaten = [text for text in (options.patch_model, options.step_cache) if text not in (None, flags.AUTO)]
        hint = f"; or is `{eaten[0]}` one? then put -- before it" if eaten else ""
        options.refuse(f"no COMMAND to run: dit-patch run -- python program.py{hint}")
    from ..launch import run_command

    try:
        return run_command.run_command(flags.Choice.from_args(options), command, strict=options.strict)
    except run_command.CommandError as error:
        print(f"dit-patch run: {error}", file=sys.stderr)
        return error.status


def _print_environment(options: argparse.Namespace) -> int:
    from ..launch.run_command import environment_for_workers

    if options.command:
        options.refuse("--print-env runs no COMMAND; leave it out")
    choice = flags.Choice.from_args(options)
    folder = None if choice.patch_report in (None, "-") else Path(choice.patch_report)
    variables = environment_for_workers(choice, folder, strict=options.strict)
    if options.print_env == "json":
        print(json.dumps(variables, indent=1))
    else:
        print(*(f"export {name}={shlex.quote(value)}" for name, value in variables.items()), sep="\n")
    return 0
