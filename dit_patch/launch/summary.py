"""What a run under `dit-patch run` did: the reports of its processes in one, and why where nothing was patched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..report.document import PATCHED, document_text, has_content
from .run_folder import PYTHONS, REPORTS, UNREACHABLE


@dataclass(frozen=True)
class Summary:
    """What one run did.

    Attributes:
        command: the program, with its arguments.
        status: its exit status.
        processes: what `dit_patch.report.journal` wrote in each process that made a model with a spec.
        pythons: the number of Python processes in the run.
        unreachable: the messages of interpreters that have no dit_patch.
    """

    command: Sequence[str]
    status: int
    processes: Sequence[dict[str, Any]]
    pythons: int
    unreachable: Sequence[str]

    @classmethod
    def from_folder(cls, folder: Path, command: Sequence[str], status: int) -> Summary:
        """Read the files that the processes of the run have written."""
        processes = []
        for path in folder.glob(REPORTS):
            with suppress(OSError, ValueError):
                document = json.loads(path.read_text("utf-8"))
                if has_content(document):
                    processes.append((document["rank"] or 0, int(path.name.partition("-")[2][:-5]), document))
        return cls(
            command,
            status,
            [document for *_, document in sorted(processes, key=lambda each: each[:2])],
            len(list(folder.glob(PYTHONS))),
            [path.read_text("utf-8", "replace") for path in sorted(folder.glob(UNREACHABLE))],
        )

    @property
    def patched(self) -> int:
        """The number of processes in which something was patched."""
        return sum(bool(document["handles"]) for document in self.processes)

    @property
    def failures(self) -> list[str]:
        """What could not be patched, and why, each once."""
        messages = (f"{each['what']}: {each['message']}" for process in self.processes for each in process["failures"])
        return [*dict.fromkeys(messages), *self.unreachable]

    @property
    def why_nothing(self) -> str | None:
        """Why nothing was patched anywhere; None where something was."""
        if self.patched:
            return None
        if self.failures:
            return "\n    ".join(self.failures)
        states = {
            f"{model['class'].rpartition('.')[2]}: {model['state']}"
            for process in self.processes
            for model in process["models"]
        }
        if any(state != PATCHED for state in states):
            return "\n    ".join(sorted(states))
        if not self.pythons:
            return (
                "no Python process of this command came by. It is no Python program; or Python was started with -I, -E "
                "or -S, or without the PYTHONPATH of this run."
            )
        what = "the Python process" if self.pythons == 1 else f"none of the {self.pythons} Python processes"
        return (
            f"{what} made {'no' if self.pythons == 1 else 'a'} model that there is a spec for (`dit-patch list`), "
            "of those that were asked for."
        )

    @property
    def document(self) -> dict[str, Any]:
        """The whole summary as values for JSON."""
        return {
            "command": list(self.command),
            "status": self.status,
            "pythons": self.pythons,
            "patched": self.patched,
            "why_nothing": self.why_nothing,
            "failures": self.failures,
            "processes": list(self.processes),
        }

    @property
    def verdict(self) -> str | None:
        """The warning that nothing was patched, or not everything, and why; None where all went well."""
        if self.why_nothing is not None:
            return f"dit-patch run: NOTHING WAS PATCHED: {self.why_nothing}"
        if self.failures:
            return "dit-patch run: NOT EVERYTHING WAS PATCHED: " + "\n    ".join(self.failures)
        return None

    @property
    def headline(self) -> str:
        """One line: how many processes were patched, and how many others there were."""
        others = self.pythons - len(self.processes)
        rest = f"; {_count(others, 'more Python ')} made none of these models" if others > 0 else ""
        return f"dit-patch run: {_count(self.patched)} patched{rest}"

    def __str__(self) -> str:
        parts = [self.headline, *map(document_text, self.processes), *filter(None, [self.verdict])]
        return "\n\n".join(parts)


def _count(number: int, what: str = "") -> str:
    return f"{number} {what}{'process' if number == 1 else 'processes'}"
