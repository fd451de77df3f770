"""One handle in the journal, which holds its rows and not the handle: they outlive it, and its models."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from .reported import ReportedHandle
from .rows import Rows
from .text import report_text

_PATIENCE = 5.0
"""Seconds that workers may take to answer: somebody waits for the program to end."""


class KeptHandle:
    """The rows of one handle, asked for one last time when it is removed, collected, or its workers are about to go."""

    def __init__(self, handle: ReportedHandle) -> None:
        self.step_cache, self.max_bytes, self.is_remote = handle.options.step_cache, handle.max_bytes, handle.is_remote
        #: Whether everything was taken back.
        self.is_removed = False
        #: What the process had done before it forked this one.
        self.inherited: Rows | None = None
        #: Torch hooks that go with the handle.
        self.hooks: list[Any] = []
        self._rows: Rows | None = None
        self._handle = handle.reference()
        handle.on_end.append(self._on_end)
        handle.before_workers_end(self.update)

    def __repr__(self) -> str:
        return f"<KeptHandle of {self._handle()!r}>"

    def is_of(self, handle: ReportedHandle) -> bool:
        """Return whether this is about `handle`, or about another handle of the same workers."""
        return self._handle() == handle

    def document(self) -> dict[str, Any] | None:
        """Return what there is to report now, as JSON has it; None if all of it was done before a fork."""
        self.update()
        rows = self._rows or Rows()
        if self.inherited is not None:
            rows = rows.since(self.inherited)
            if not rows.has_calls:
                return None
        return {
            "removed": self.is_removed,
            "sites": [row.as_dict() for row in rows.sites],
            "steps": [row.as_dict() for row in rows.steps],
            "report": self._text(rows),
        }

    def update(self) -> None:
        """Take the handle's rows of now, if anybody can be asked for them."""
        handle = None if self.is_removed else self._handle()
        if handle is None:
            return
        if not self.is_remote:
            self._rows = handle.rows()
            return
        with suppress(Exception):  # the workers are gone, or busy
            _within(_PATIENCE, lambda: self._keep(handle.rows()))

    def fork(self) -> bool:
        """Count anew, in a forked child; False if nothing of the handle can happen in this process."""
        handle = self._handle()
        if self.is_removed or self.is_remote or handle is None:
            return False  # answers from a worker are for the parent
        self.inherited = handle.rows()
        return True

    def _text(self, rows: Rows) -> str:
        if self.is_remote and not rows.sites:
            return "dit_patch: patched in worker processes, which could not be asked any more what was saved"
        return report_text(rows, self.max_bytes, self.step_cache)

    def _keep(self, rows: Rows) -> None:
        self._rows = rows

    def _on_end(self, rows: Rows | None, is_removed: bool) -> None:
        if self.is_removed:
            return
        if rows is not None:
            self._rows = rows
        self.is_removed = is_removed
        for hook in self.hooks if is_removed else ():
            hook.remove()


def _within(seconds: float, act: Callable[[], Any]) -> None:
    """Call `act`, and give up after so many seconds.

    By a signal in the main thread, since no thread can be started any more when Python exits.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        with _alarm(seconds):
            act()
        return
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, ring)
    theirs: Sequence[float] = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *theirs)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
