"""The base of every handle: its rows, its report, and who is told when it ends.

The handle of models in this process and that of models in worker processes are both a `ReportedHandle`, so that the
journal need not know which it has.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..step_cache.stats import StepStats
from .html import report_html
from .rows import Rows, SiteStats
from .text import report_text


class ReportedHandle:
    """The handle of one `apply`: print it for the report, `remove()` it to take everything back.

    Usable in a `with` statement.
    """

    #: Whether the models live in other processes.
    is_remote = False

    def __init__(self, options: Any) -> None:
        self.options = options
        #: Called once with the last rows, when the handle is removed (True), or collected with its models (False). Rows
        #: that cannot be had any more are None.
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
        """Return a function that returns this handle, or an equal one, while there is one; it does not hold it."""
        raise NotImplementedError

    def before_workers_end(self, callback: Callable[[], None]) -> None:
        """Have `callback` called before worker processes with the models end, if there are any."""

    def rows(self) -> Rows:
        """Return all that the handle reports."""
        return Rows(tuple(self.stats()), tuple(self.step_stats()))

    def __str__(self) -> str:
        return report_text(self.rows(), self.max_bytes, self.options.step_cache)

    def _repr_html_(self) -> str:
        """Return the report as a notebook shows it."""
        return report_html(self.rows(), self.max_bytes, self.options.step_cache)

    def __enter__(self) -> ReportedHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _end(self, *, removed: bool) -> None:
        """Call what is in `on_end`, for the first time and the last."""
        callbacks, self.on_end = self.on_end, []
        rows = None
        if callbacks:
            with suppress(Exception):
                rows = self.rows()
        for callback in callbacks:
            callback(rows, removed)
