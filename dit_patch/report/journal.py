"""The journal of a process: what its handles did, kept past the lives of their models, and told at the end.

    journal.keep(handle)                    # which holds neither the handle nor its models
    journal.report_at_exit("report.json")

A forked child tells only of what it did itself. `dit-patch run` and `--patch-report` write in the journal, which knows
nothing of how models are patched.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from ..sites.scope import Hook
from .document import REFRESHED, document_text, has_content, path_of_process, process_facts, save
from .kept import KeptHandle
from .reported import ReportedHandle


class Journal:
    """What this process has to tell. There is one: `journal`."""

    def __init__(self) -> None:
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._on_fork)

    def __repr__(self) -> str:
        return f"<Journal of {len(self._kept)} handles, {len(self._failures)} failures>"

    def keep(self, handle: ReportedHandle, *, refreshing: bool = False) -> None:
        """Report what this handle does; `refreshing`: write it to the file of `record_in` now and then, too."""
        if any(kept.is_of(handle) for kept in self._kept):
            return
        kept = KeptHandle(handle)
        self._kept.append(kept)
        if kept.is_remote:
            # Whoever registers last is called first, and the executor ends its workers at exit, too.
            self._finish_at_exit()
        if refreshing:
            for model in handle.models.values():
                kept.hooks.append(model.register_forward_hook(Hook(self._on_forward_end, self)))
        self._refresh()

    def count_model(self, what: str, state: str, instead_of: str = "") -> None:
        """Count a model of the class `what` in this state; `instead_of`: and no longer in that one."""
        if instead_of:
            self._models[what, instead_of] -= 1
        self._models[what, state] += 1
        if not self._saved_at:
            self._refresh()

    def add_failure(self, what: str, message: str) -> None:
        """Report that `what` could not be patched, and why; the same is said once."""
        self._failures[what, message] += 1
        self._refresh()

    def report_at_exit(self, path: str) -> None:
        """Print the report (`-`), or write it to a file, when the process ends; as JSON if the file's name ends so.

        Child processes, and all ranks but the first, write to files of their own beside it.
        """
        self._path = path
        self._finish_at_exit()

    def record_in(self, folder: str) -> None:
        """Keep a JSON file on this process in `folder`, written after changes, now and then, and at the end."""
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
        error = getattr(sys, "last_value", None)
        return {
            **process_facts(),
            "ended": self._is_finished,
            "uncaught": f"{type(error).__name__}: {error}" if self._is_finished and error is not None else None,
            "handles": [told for kept in self._kept if (told := kept.document()) is not None],
            "failures": [{"what": what, "message": message} for what, message in self._failures],
            "models": [
                {"class": what, "state": state, "count": count}
                for (what, state), count in self._models.items()
                if count > 0
            ],
        }

    def finish(self) -> None:
        """Write the report for the last time; does nothing when repeated."""
        if self._is_finished:
            return
        self._is_finished = True
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
        if self._path == "-" or not self._save(path_of_process(self._path, child=self._child), document):
            print(document_text(document), file=sys.stderr, flush=True)

    def _save(self, path: str, document: dict[str, Any], *, quiet: bool = False) -> bool:
        try:
            save(path, document, document_text)
        except Exception as error:
            if not quiet:
                print(f"dit_patch: the report could not be written to `{path}`: {error}", file=sys.stderr)
            return False
        return True

    def _refresh(self) -> None:
        """Write the file of `record_in` anew."""
        if self._file is None or self._is_finished:
            return
        self._saved_at = time.monotonic()
        with suppress(Exception):
            document = self.document
            if has_content(document):
                self._save(self._file, document, quiet=True)

    def _on_forward_end(self, *_: Any) -> None:
        if time.monotonic() - self._saved_at > REFRESHED and not self._is_finished:
            self._refresh()

    def _reset(self) -> None:
        self._kept: list[KeptHandle] = []
        #: How many models of a class are in a state.
        self._models: Counter[tuple[str, str]] = Counter()
        #: How often a class could not be patched, with which message.
        self._failures: Counter[tuple[str, str]] = Counter()
        #: Where the report goes at exit; "-" prints it.
        self._path: str | None = None
        #: Where the file is that is kept current, and when it was last written.
        self._folder: str | None = None
        self._file: str | None = None
        self._saved_at = 0.0
        self._is_finished = False
        #: Whether another process started this one with `multiprocessing`, or forked it.
        self._child = False

    def _finish_at_exit(self) -> None:
        atexit.unregister(self.finish)
        atexit.register(self.finish)
        process = sys.modules.get("multiprocessing.process")
        if process is not None and process.parent_process() is not None:
            self._child = True
            # Forked ones leave without running what atexit has, spawned ones run both.
            from multiprocessing.util import Finalize

            Finalize(None, self.finish, exitpriority=-1)

    def _on_fork(self) -> None:
        kept, path, folder = self._kept, self._path, self._folder
        self._reset()
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
