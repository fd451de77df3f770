"""What every handle can be asked for: its rows, its report, and to say when it ends.

A handle of this process and one of worker processes are both a `ReportedHandle`, so that the report and the journal
need not know which they have.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..step_cache.stats import StepStats
from .rows import Rows, SiteStats
from .text import report_text


class ReportedHandle:
    """The handle of one `apply`: print it for the report, `remove()` it to take everything back.

    Usable in a `with` statement. Whoever wants its last rows appends a function to `on_end`, which is called with them
    once: when the handle is removed, or when it is collected together with its models.
    """

    #: Whether the models live in other processes.
    is_remote = False

    def __init__(self, options: Any) -> None:
        self.options = options
        self.on_end: list[Callable[[Rows | None, bool], None]] = []

    def remove(self) -> None:
        """Take every patch back; harmless when repeated."""
        raise NotImplementedError

    def stats(self) -> list[SiteStats]:
        """Return one row per site."""
        raise NotImplementedError

    def step_stats(self) -> list[StepStats]:
        """Return one row per block list and pass of the last generation."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """The bytes that all caches hold now, without the step cache's."""
        raise NotImplementedError

    @property
    def max_bytes(self) -> int:
        """The bytes that all caches may hold together."""
        return self.options.max_bytes

    def reference(self) -> Callable[[], ReportedHandle | None]:
        """Return a function that gives this handle, or an equal one, for as long as it is there, without holding it."""
        raise NotImplementedError

    def before_workers_end(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when worker processes that hold the models are about to end, if there are any."""

    def rows(self) -> Rows:
        """Return all that the handle reports, as data that outlives it."""
        return Rows(tuple(self.stats()), tuple(self.step_stats()))

    def __str__(self) -> str:
        return report_text(self.rows(), self.max_bytes, self.nbytes, self.options.step_cache)

    def __enter__(self) -> ReportedHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _end(self, *, removed: bool) -> None:
        """Tell whoever asked for the last rows; None stands for rows that cannot be had any more."""
        callbacks, self.on_end = self.on_end, []
        rows = None
        if callbacks:
            with suppress(Exception):
                rows = self.rows()
        for callback in callbacks:
            callback(rows, removed)
