"""What the handles of this process did, kept past the lives of their models, and told when the process ends.

A model holds its handle, and both go together: the journal keeps neither alive (`kept`). At the end it writes a
document (`document`). A forked child tells only of what it did itself.

Knows nothing of how models are patched; `dit-patch run` and `--patch-report` write in it.
"""

from __future__ import annotations

import atexit
import os
import platform
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from ..extras import installed_version
from ..sites.scope import Hook
from .document import NEVER_CALLED, PATCHED, REFRESHED, has_content, own_path, save, text, world_size
from .kept import KeptHandle
from .reported import ReportedHandle

__all__ = ["NEVER_CALLED", "PATCHED", "Journal", "journal", "own_path", "save", "text"]


class Journal:
    """What this process has to tell. There is one: `journal`."""

    def __init__(self) -> None:
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def keep(self, handle: ReportedHandle, *, refreshing: bool = False) -> None:
        """Report what this handle does; `refreshing`, also while it does, where there is a file (`record_in`)."""
        if any(kept.is_of(handle) for kept in self._kept):
            return
        kept = KeptHandle(handle)
        self._kept.append(kept)
        if kept.is_remote:
            # Whoever registers last is called first: the executor ends its workers at exit, too.
            self._finish_at_exit()
        if refreshing:
            for model in handle.models.values():
                kept.hooks.append(model.register_forward_hook(Hook(self._forward_ended, self)))
        self._write_now()

    def note(self, what: str, state: str, instead_of: str = "") -> None:
        """A model of class `what` has come into this state, and is no more in the other."""
        if instead_of:
            self._models[what, instead_of] -= 1
        self._models[what, state] += 1
        if not self._written:
            self._write_now()

    def failed(self, what: str, message: str) -> None:
        """This could not be patched."""
        self._failures.setdefault((what, message), 0)
        self._failures[what, message] += 1
        self._write_now()

    def report_at_exit(self, path: str) -> None:
        """When the process ends, print the report (`-`) or write it to a file, as JSON if the name ends so.

        Of several ranks all but the first, and child processes, write to files of their own beside it.
        """
        self._path = path
        self._finish_at_exit()

    def record_in(self, folder: str) -> None:
        """From now on have a file on this process in `folder`, as JSON: after changes, now and then, and at the end."""
        if self._folder != folder:
            self._folder = folder
            self._file = os.path.join(folder, f"{os.getpid()}-{time.time_ns()}.json")
            self._finish_at_exit()

    @property
    def failures(self) -> tuple[tuple[str, str], ...]:
        """What could not be patched, each with the message."""
        return tuple(self._failures)

    @property
    def document(self) -> dict[str, Any]:
        """All that there is to tell, as JSON has it."""
        handles = []
        for kept in self._kept:
            rows = kept.rows()
            if kept.inherited is not None and not rows.anything:
                continue
            handles.append(
                {
                    "removed": kept.is_removed,
                    "sites": [row.as_dict() for row in rows.sites],
                    "steps": [row.as_dict() for row in rows.steps],
                    "report": kept.text(rows),
                }
            )
        torch = sys.modules.get("torch")
        rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK")
        error = getattr(sys, "last_value", None)
        return {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "rank": int(rank) if rank and rank.isdigit() else None,
            "world_size": world_size(),
            "argv": list(getattr(sys, "argv", [])),
            "python": platform.python_version(),
            "versions": {
                "dit_patch": installed_version("dit-patch"),
                "torch": str(getattr(torch, "__version__", "")) or None,
            },
            "ended": self._ended,
            "uncaught": f"{type(error).__name__}: {error}" if self._ended and error is not None else None,
            "handles": handles,
            "failures": [{"what": what, "message": message} for what, message in self._failures],
            "models": [
                {"class": what, "state": state, "count": count}
                for (what, state), count in self._models.items()
                if count > 0
            ],
        }

    def finish(self) -> None:
        """Write everything down for good; only once."""
        if self._finished:
            return
        self._finished = self._ended = True
        try:
            document = self.document
        except Exception as error:  # an exit is no place to raise
            print(f"dit_patch: no report: {type(error).__name__}: {error}", file=sys.stderr)
            return
        if self._child and not has_content(document):
            return
        if self._file is not None:
            self._save(self._file, document, quiet=True)
        if self._path is not None:
            self._publish(document)

    def _publish(self, document: dict[str, Any]) -> None:
        if self._path == "-" or not self._save(own_path(self._path, child=self._child), document):
            print(text(document), file=sys.stderr, flush=True)

    def _save(self, path: str, document: dict[str, Any], *, quiet: bool = False) -> bool:
        try:
            save(path, document, text)
        except Exception as error:
            if not quiet:
                print(f"dit_patch: the report could not be written to `{path}`: {error}", file=sys.stderr)
            return False
        return True

    def _write_now(self) -> None:
        if self._file is None or self._finished:
            return
        self._written = time.monotonic()
        with suppress(Exception):
            document = self.document
            if has_content(document):
                self._save(self._file, document, quiet=True)

    def _forward_ended(self, *_: Any) -> None:
        if time.monotonic() - self._written > REFRESHED and not self._finished:
            self._write_now()

    def _begin(self) -> None:
        self._kept: list[KeptHandle] = []
        self._models: Counter[tuple[str, str]] = Counter()
        self._failures: dict[tuple[str, str], int] = {}
        self._path: str | None = None
        self._folder: str | None = None
        self._file: str | None = None
        self._written = 0.0
        self._finished = self._ended = self._child = False

    def _finish_at_exit(self) -> None:
        atexit.unregister(self.finish)
        atexit.register(self.finish)
        process = sys.modules.get("multiprocessing.process")
        if process is not None and process.parent_process() is not None:
            self._child = True
            # Forked ones leave without running what atexit has, spawned ones run both.
            from multiprocessing.util import Finalize

            Finalize(None, self.finish, exitpriority=-1)

    def _forked(self) -> None:
        kept, path, folder = self._kept, self._path, self._folder
        self._begin()
        self._child = True
        with suppress(Exception):
            self._kept = [each for each in kept if each.fork()]
        if path is not None:
            self.report_at_exit(path)
        if folder is not None:
            self.record_in(folder)
        util = sys.modules.get("multiprocessing.util")
        if util is not None and (path is not None or folder is not None):
            # It forgets what was to be finalized only after this.
            util.register_after_fork(self, Journal._finish_at_exit)


journal = Journal()
