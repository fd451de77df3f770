"""`apply` for pipelines that live in worker processes, as those of FastVideo's `VideoGenerator` do.

    handle = dit_patch.apply(generator)     # patches the pipeline in every worker
    print(handle)                           # the rows of all workers

Knows nothing of how models are patched, and imports no FastVideo. `worker_calls` is what is sent to the workers.
"""

from __future__ import annotations

import os
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..handle import Options, apply, handle_of, remove
from ..handle.entry import Elsewhere, register
from ..report.reported import ReportedHandle
from ..report.rows import Rows, SiteStats
from ..sites import layers
from ..step_cache.stats import StepStats
from .worker_calls import (
    Answer,
    WorkersGone,
    begin_generation,
    call_handle,
    call_workers,
    error_of,
    explain,
    find_handle,
    patch_pipeline,
)

__all__ = ["RemoteHandle", "apply", "apply_in_workers", "handle_of", "is_remote", "remove"]


def is_remote(target: Any) -> bool:
    """Return whether the models of `target` live in worker processes, or did until it was shut down."""
    executor = getattr(target, "executor", None)
    if callable(getattr(executor, "collective_rpc", None)):
        return True
    if isinstance(target, torch.nn.Module):
        return False
    if any(isinstance(getattr(target, name, None), Mapping) for name in ("components", "modules")):
        return False
    return executor is not None or callable(getattr(target, "generate_video", None))


def apply_in_workers(target: Any, **options: Any) -> RemoteHandle:
    """Patch the pipeline in each worker of `target`, in all of them or in none; `options` as for `dit_patch.apply`.

    It keeps the workers busy, as a generation does: not to be called while one runs in another thread.

    Raises:
        UnsupportedModelError: the executor has no `collective_rpc`.
        DitPatchError: the workers are gone, or do not answer.
        The class of error that a worker's own `apply` raised, with its message and rank.
    """
    executor = _executor(target)
    token = uuid.uuid4().hex
    answers = call_workers(executor, patch_pipeline, _portable(options), token)
    if error_of(answers) is not None:
        undone = call_workers(executor, call_handle, {answer.rank: token for answer in answers}, "remove")
        raise error_of([*answers, *undone])
    return _remote_handle(executor, answers)


def handle_in_workers(target: Any) -> RemoteHandle | None:
    """Return the handle of what was patched in the workers of `target`; None if nothing is.

    Raises:
        DitPatchError: the workers are gone, or do not answer.
    """
    executor = _executor(target)
    answers = call_workers(executor, find_handle)
    if error_of(answers) is not None:
        raise error_of(answers)
    patched = [answer for answer in answers if answer.value is not None]
    return _remote_handle(executor, patched) if patched else None


def _remote_handle(executor: Any, answers: Sequence[Answer]) -> RemoteHandle:
    """Return the handle of the workers that have answered with what they `Applied`."""
    return RemoteHandle(executor, {each.rank: each.value.token for each in answers}, answers[0].value.options)


class RemoteHandle(ReportedHandle):
    """The handles of all workers in one: print it for the report, `remove()` it to take everything back.

    Does what a `Handle` does; its `models` are none, since they live in the workers. Each worker may hold the
    `max_bytes` that were asked for. With several workers each row names its rank.
    """

    is_remote = True

    def __init__(self, executor: Any, tokens: Mapping[int, str], options: Options) -> None:
        super().__init__(options)
        self._executor = executor
        #: By rank, the token of the handle in that worker.
        self._tokens = dict(tokens)
        #: The rows that `remove` left.
        self._last_rows: Rows | None = None

    def __repr__(self) -> str:
        return f"<RemoteHandle of {len(self._tokens)} workers>"

    def remove(self) -> None:
        """Take every patch back in every worker; harmless when repeated, and when the workers are gone."""
        if self._last_rows is None:
            with suppress(WorkersGone):
                self._last_rows = self._call("remove")
        self._end(removed=True)

    def clear(self) -> None:
        """Forget every cached result; counters stay."""
        if self._last_rows is None:
            self._call("clear")

    def repair(self) -> None:
        """Put back the patches that another library has displaced."""
        self._call("repair")

    def begin_generation(self, steps: int | None = None) -> None:
        """Say that a generation begins, as `Handle.begin_generation`; FastVideo's own stages tell it by themselves."""
        if self._last_rows is None:
            self._ask(begin_generation, steps)

    def explain(self) -> str:
        """Return what `Handle.explain` returns in every worker; nothing after `remove`."""
        if self._last_rows is not None:
            return ""
        texts = {answer.rank: answer.value or "" for answer in self._ask(explain)}
        if len(texts) == 1:
            return next(iter(texts.values()))
        return "\n".join(f"rank {rank}:\n{text}" for rank, text in texts.items())

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        """The patched models that live in this process: none."""
        return {}

    def rows(self) -> Rows:
        """Return the rows of every worker; after `remove` those that it left."""
        return self._call() if self._last_rows is None else self._last_rows

    def stats(self) -> list[SiteStats]:
        """Return the rows of `Handle.stats` of every worker; after `remove` those that it left."""
        return list(self.rows().sites)

    def step_stats(self) -> list[StepStats]:
        """Return the rows of `Handle.step_stats` of every worker; after `remove` those that it left."""
        return list(self.rows().steps)

    @property
    def nbytes(self) -> int:
        """The bytes that all caches of all workers hold now."""
        return self.rows().nbytes

    @property
    def max_bytes(self) -> int:
        """The bytes that the caches of all workers may hold together."""
        return self.options.max_bytes * len(self._tokens)

    def reference(self) -> Callable[[], RemoteHandle | None]:
        """Return a function that makes a handle of the same workers, for as long as their executor is there."""
        reference, tokens, options = weakref.ref(self._executor), self._tokens, self.options

        def remake() -> RemoteHandle | None:
            executor = reference()
            return None if executor is None else RemoteHandle(executor, tokens, options)

        return remake

    def before_workers_end(self, callback: Callable[[], None]) -> None:
        """Have `callback` called before the executor shuts its workers down."""

        def call_before(original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
            callback()
            return original(*args, **kwargs)

        if callable(getattr(self._executor, "shutdown", None)):
            layers.install(self._executor, "shutdown", call_before)

    def __eq__(self, other: object) -> bool:
        return self._tokens == other._tokens if isinstance(other, RemoteHandle) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._tokens.items()))

    def _call(self, *methods: str) -> Rows:
        """Call methods of every worker's handle; returns the rows after that."""
        answers = self._ask(call_handle, *methods)
        rows_of = {answer.rank: rows for answer in answers if (rows := answer.value) is not None}
        if not rows_of:
            raise WorkersGone(
                "nothing of this handle is left in the workers: it was removed, or the models were loaded anew.\n"
                "    Call dit_patch.apply(generator) again."
            )
        if len(answers) > 1:
            rows_of = {rank: rows.with_rank(rank) for rank, rows in rows_of.items()}
        return Rows(
            tuple(row for rows in rows_of.values() for row in rows.sites),
            tuple(row for rows in rows_of.values() for row in rows.steps),
        )

    def _ask(self, function: Callable, *args: Any) -> list[Answer]:
        """Call a function of `worker_calls` in every worker, with the tokens of the handles there."""
        answers = call_workers(self._executor, function, self._tokens, *args)
        if (error := error_of(answers)) is not None:
            raise error
        return answers


def _executor(target: Any) -> Any:
    """Return what calls the workers of `target`; refuse if there is nothing that can."""
    executor = getattr(target, "executor", None)
    if executor is None:
        raise WorkersGone.shut_down(type(target).__name__)
    if not callable(getattr(executor, "collective_rpc", None)):
        raise UnsupportedModelError(
            f"the models of this {type(target).__name__} are out of reach: its executor, a {type(executor).__name__}, "
            "has no `collective_rpc`.\n"
            '    Use one of FastVideo\'s own (distributed_executor_backend="mp" or "ray"), or call '
            "dit_patch.apply(pipeline) in the process that holds the pipeline."
        )
    return executor


def _portable(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `apply` as another process understands them."""
    portable = dict(options)
    only, specs = portable.get("only"), portable.get("specs", ())
    if only is not None and not isinstance(only, str):
        portable["only"] = tuple(only)
    specs = (specs,) if isinstance(specs, (str, os.PathLike)) else specs
    portable["specs"] = tuple(os.path.abspath(each) for each in specs)
    return portable


register(Elsewhere(is_remote, apply_in_workers, handle_in_workers))
