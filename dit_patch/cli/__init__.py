"""The `dit-patch` command: `command` reads the command line, and there is a module for each of its subcommands."""

from .command import COMMANDS, main

__all__ = ["COMMANDS", "main"]
