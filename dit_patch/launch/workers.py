"""`apply` for pipelines that live in worker processes, as those of FastVideo's `VideoGenerator` do.

The executor's `collective_rpc` takes a function of this module to every worker, where it makes the handle of that
worker's pipeline, or finds it through the hooks of the models. It answers with plain data and never raises: FastVideo
ends the worker, and then the caller, when a call raises. Knows nothing of how models are patched, imports no FastVideo.
"""

from __future__ import annotations

import os
import pickle
import traceback
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.pool import RemoteTraceback
from typing import Any

import torch

from .. import errors
from ..errors import DitPatchError, UnsupportedModelError
from ..findings import DitPatchWarning, Finding, FindingKind, warn
from ..handle import Handle, Options, apply, handle_of
from ..handle.entry import register
from ..report.reported import ReportedHandle
from ..report.rows import Rows, SiteStats
from ..sites import layers
from ..sites.pipeline_models import find_models
from ..step_cache.stats import StepStats
from ..upstream import fastvideo_internals


def is_remote(target: Any) -> bool:
    """Whether the models of `target` live in worker processes; true of a `VideoGenerator` that was shut down, too."""
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

    Like a generation it keeps the workers busy: not to be called while one runs in another thread.

    Raises:
        UnsupportedModelError: the executor has no `collective_rpc`.
        DitPatchError: the workers are gone, or do not answer.
        The class of error that a worker's own `apply` raised, with its message and rank.
    """
    executor = _executor(target)
    token = uuid.uuid4().hex
    answers = _ask(executor, _apply, _portable(options), token)
    if any(answer.failure for answer in answers):
        undone = _ask(executor, _call, {answer.rank: token for answer in answers}, "remove")
        raise _error([*answers, *undone])
    applied = {answer.rank: answer.value for answer in answers}
    return RemoteHandle(executor, {rank: each.token for rank, each in applied.items()}, answers[0].value.options)


class RemoteHandle(ReportedHandle):
    """The handles of all workers in one: print it for the report, `remove()` it to take everything back.

    Does everything that a `Handle` does, but has no `models`, and no `begin_generation`, which FastVideo's stages say
    themselves. The `max_bytes` that was asked for is what each worker may hold. Where there are several, each row says
    of which rank it is.
    """

    is_remote = True

    def __init__(self, executor: Any, tokens: Mapping[int, str], options: Options) -> None:
        super().__init__(options)
        self._executor = executor
        self._tokens = dict(tokens)
        self._last: Rows | None = None

    def __repr__(self) -> str:
        return f"<RemoteHandle of {len(self._tokens)} workers>"

    def remove(self) -> None:
        """Take every patch back in every worker; harmless when repeated, and when the workers are gone."""
        if self._last is None:
            with suppress(_Gone):
                self._last = self._call("remove")
        self._end(removed=True)

    def clear(self) -> None:
        """Forget every cached result; counters stay."""
        if self._last is None:
            self._call("clear")

    def repair(self) -> None:
        """Put back the patches that another library has displaced."""
        self._call("repair")

    def rows(self) -> Rows:
        """The rows from every worker; after `remove` those that it left."""
        return self._call() if self._last is None else self._last

    def stats(self) -> list[SiteStats]:
        """The rows of `Handle.stats` from every worker; after `remove` those that it left."""
        return list(self.rows().sites)

    def step_stats(self) -> list[StepStats]:
        """The rows of `Handle.step_stats` from every worker; after `remove` those that it left."""
        return list(self.rows().steps)

    @property
    def nbytes(self) -> int:
        """Bytes that all caches of all workers hold now."""
        return self.rows().nbytes

    @property
    def max_bytes(self) -> int:
        """The bytes that the caches of all workers may hold together."""
        return self.options.max_bytes * len(self._tokens)

    def reference(self) -> Callable[[], RemoteHandle | None]:
        """Return a function that gives a handle of the same workers, for as long as their executor is there."""
        executor, tokens, options = weakref.ref(self._executor), self._tokens, self.options

        def of_the_same_workers() -> RemoteHandle | None:
            living = executor()
            return None if living is None else RemoteHandle(living, tokens, options)

        return of_the_same_workers

    def before_workers_end(self, callback: Callable[[], None]) -> None:
        """Have `callback` called before the executor shuts its workers down."""

        def shutting_down(original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
            callback()
            return original(*args, **kwargs)

        if callable(getattr(self._executor, "shutdown", None)):
            layers.install(self._executor, "shutdown", shutting_down)

    def __eq__(self, other: object) -> bool:
        return self._tokens == other._tokens if isinstance(other, RemoteHandle) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._tokens.items()))

    def _call(self, *methods: str) -> Rows:
        """Call methods of every worker's handle; the rows after that."""
        answers = _ask(self._executor, _call, self._tokens, *methods)
        if any(answer.failure for answer in answers):
            raise _error(answers)
        found = {answer.rank: rows for answer in answers if (rows := answer.value) is not None}
        if not found:
            raise _Gone(
                "nothing of this handle is left in the workers: it was removed, or the models were loaded anew.\n"
                "    Call dit_patch.apply(generator) again."
            )
        if len(answers) > 1:
            found = {rank: rows.with_rank(rank) for rank, rows in found.items()}
        return Rows(
            tuple(row for rows in found.values() for row in rows.sites),
            tuple(row for rows in found.values() for row in rows.steps),
        )


class _Gone(DitPatchError):
    """The workers, or what was patched in them, are no more."""


@dataclass(frozen=True)
class _Failure:
    """What a worker raised, as it can be sent: `kind` is a class of `dit_patch.errors`, "" for anybody else's."""

    kind: str
    message: str
    trace: str


@dataclass(frozen=True)
class _Answer:
    """What one worker says to one call."""

    rank: int
    pickled: bytes | None = None
    failure: _Failure | None = None
    warnings: tuple[str, ...] = ()

    @property
    def value(self) -> Any:
        return pickle.loads(self.pickled)


@dataclass(frozen=True)
class _Applied:
    """A worker's handle: the name that the call gave it which made it, and its options."""

    token: str
    options: Options


def _answer(worker: Any, act: Callable, *args: Any) -> _Answer:
    """Runs in a worker, and is what `collective_rpc` takes there: `act(worker, *args)`, with what we warn of in it."""
    pickled, failure = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", category=DitPatchWarning)
        try:
            pickled = pickle.dumps(act(worker, *args))  # here, where it can fail without ending the worker
        except Exception as error:
            ours = isinstance(error, DitPatchError)
            message = str(error) if ours else f"{type(error).__name__}: {error}"
            failure = _Failure(type(error).__name__ if ours else "", message, traceback.format_exc())
    ours, others = [], []
    for each in caught:
        (ours if isinstance(each.message, DitPatchWarning) else others).append(each)
    for each in others:
        warnings.showwarning(each.message, each.category, each.filename, each.lineno)
    said = tuple(dict.fromkeys(each.message.finding.warning for each in ours))
    return _Answer(getattr(worker, "rank", 0), pickled, failure, said)


def _apply(worker: Any, options: dict[str, Any], token: str) -> _Applied:
    pipeline = worker.pipeline
    if getattr(pipeline, "post_init_called", True) is False:
        # FastVideo leaves the end of loading, compilation with it, to a worker's first generation.
        pipeline.post_init()
    existing = _existing(pipeline)
    applied = apply(pipeline, **options)
    # One that was made in the worker itself is not this call's to undo.
    if applied.token is None:
        applied.token = token if existing is None else uuid.uuid4().hex
    return _Applied(applied.token, applied.options)


def _call(worker: Any, tokens: dict[int, str], *methods: str) -> Rows | None:
    """Call methods of this worker's handle; its rows after that, or None where it is not there any more."""
    existing = _existing(worker.pipeline)
    if existing is None or existing.token != tokens.get(worker.rank, ""):
        return None
    for method in methods:
        getattr(existing, method)()
    return existing.rows()


def _existing(pipeline: Any) -> Handle | None:
    return next(filter(None, map(handle_of, find_models(pipeline).values())), None)


def _executor(target: Any) -> Any:
    executor = getattr(target, "executor", None)
    if executor is None:
        raise _Gone(_shut_down(type(target).__name__))
    if not callable(getattr(executor, "collective_rpc", None)):
        raise UnsupportedModelError(
            f"the models of this {type(target).__name__} are out of reach: its executor, a {type(executor).__name__}, "
            "has no `collective_rpc`.\n"
            '    Use one of FastVideo\'s own (distributed_executor_backend="mp" or "ray"), or call '
            "dit_patch.apply(pipeline) in the process that holds the pipeline."
        )
    return executor


def _portable(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `apply` as another process understands them."""
    portable = dict(options)
    only, specs = portable.get("only"), portable.get("specs", ())
    if only is not None and not isinstance(only, str):
        portable["only"] = tuple(only)
    specs = (specs,) if isinstance(specs, (str, os.PathLike)) else specs
    portable["specs"] = tuple(os.path.abspath(each) for each in specs)
    return portable


def _ask(executor: Any, act: Callable, *args: Any) -> list[_Answer]:
    """Have every worker do `act`; what they warn of is warned of here."""
    if fastvideo_internals.is_streaming(executor):
        raise DitPatchError(
            "the workers are in FastVideo's streaming loop, and answer nothing else until it ends.\n"
            "    Call dit_patch.apply(generator) before the first reset(), or executor.disable_streaming() first."
        )
    try:
        answers = executor.collective_rpc(_answer, args=(act, *args))
    except Exception as error:
        raise DitPatchError(
            f"the workers did not answer: {type(error).__name__}: {error}\n"
            "    If one of them has died, make a new generator; its machine must have dit_patch installed, too."
        ) from error
    if not answers:
        raise _Gone(_shut_down("generator"))
    if not all(isinstance(answer, _Answer) for answer in answers):
        raise DitPatchError(
            "the workers gave the answer to another call; was a generation running in another thread?\n"
            "    Make a new generator, and let one call end before the next."
        )
    for ranks, warning in _by_rank((warning, answer.rank) for answer in answers for warning in answer.warnings):
        warn(Finding(FindingKind.IN_WORKER, ranks, warning), stacklevel=4)
    return answers


def _shut_down(what: str) -> str:
    return f"this {what} has been shut down, and its workers with it; make a new one"


def _error(answers: Sequence[_Answer]) -> DitPatchError:
    """Return the first worker's error, with the messages of all."""
    failed = [answer for answer in answers if answer.failure]
    first = failed[0].failure
    messages = _by_rank((answer.failure.message, answer.rank) for answer in failed)
    error_class = getattr(errors, first.kind, DitPatchError)
    error = error_class("\n".join(f"{ranks}: {message}" for ranks, message in messages))
    if not first.kind:
        error.__cause__ = RemoteTraceback(first.trace)
    return error


def _by_rank(messages: Iterable[tuple[str, int]]) -> list[tuple[str, str]]:
    """Pair each different message with the ranks that it comes from, in words; of (message, rank) pairs."""
    ranks_of: dict[str, dict[int, None]] = {}
    for message, rank in messages:
        ranks_of.setdefault(message, {})[rank] = None
    return [
        (f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}", message)
        for message, ranks in ranks_of.items()
    ]


register(is_remote, apply_in_workers)
