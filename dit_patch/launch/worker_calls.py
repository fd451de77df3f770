"""Calls into the worker processes of an executor: what is sent, what runs there, and what comes back.

    answers = call_workers(executor, call_handle, tokens, "clear")     # one of each worker
    error = error_of(answers)                                          # None if all went well

The executor's `collective_rpc` takes a function of this module to every worker. What runs there answers with plain data
and never raises: FastVideo ends the worker, and then the caller, when a call raises.
"""

from __future__ import annotations

import pickle
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import RemoteTraceback
from typing import Any

from .. import errors
from ..errors import DitPatchError
from ..findings import DitPatchWarning, Finding, FindingKind, warn
from ..handle import Handle, Options, apply, own_handle
from ..report.rows import Rows
from ..sites.pipeline_models import find_models
from ..upstream import fastvideo_internals


class WorkersGone(DitPatchError):
    """The workers, or what was patched in them, are no more."""

    @classmethod
    def shut_down(cls, what: str) -> WorkersGone:
        """Return the error for a generator, by its class, that was shut down."""
        return cls(f"this {what} has been shut down, and its workers with it; make a new one")


@dataclass(frozen=True)
class Failure:
    """What a worker raised, as it can be sent: `kind` is a class of `dit_patch.errors`, "" for anybody else's."""

    kind: str
    message: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return the error that is being handled, as it can be sent."""
        trace = traceback.format_exc()
        if isinstance(error, DitPatchError):
            return cls(type(error).__name__, str(error), trace)
        return cls("", f"{type(error).__name__}: {error}", trace)


@dataclass(frozen=True)
class Answer:
    """What one worker answers to one call."""

    rank: int
    pickled: bytes | None = None
    failure: Failure | None = None
    #: What we warned of in the worker.
    warnings: tuple[str, ...] = ()

    @property
    def value(self) -> Any:
        """What the function returned."""
        return pickle.loads(self.pickled)


@dataclass(frozen=True)
class Applied:
    """A worker's handle: its token, which is of the call that made it, and its options."""

    token: str
    options: Options


def call_workers(executor: Any, function: Callable, *args: Any) -> list[Answer]:
    """Call `function(worker, *args)` in every worker; what they warn of is warned of here.

    Raises:
        DitPatchError: the workers are gone, or do not answer.
    """
    if fastvideo_internals.is_streaming(executor):
        raise DitPatchError(
            "the workers are in FastVideo's streaming loop, and answer nothing else until it ends.\n"
            "    Call dit_patch.apply(generator) before the first reset(), or executor.disable_streaming() first."
        )
    try:
        answers = executor.collective_rpc(run_in_worker, args=(function, *args))
    except Exception as error:
        raise DitPatchError(
            f"the workers did not answer: {type(error).__name__}: {error}\n"
            "    If one of them has died, make a new generator; its machine must have dit_patch installed, too."
        ) from error
    if not answers:
        raise WorkersGone.shut_down("generator")
    if not all(isinstance(answer, Answer) for answer in answers):
        raise DitPatchError(
            "the workers gave the answer to another call; was a generation running in another thread?\n"
            "    Make a new generator, and let one call end before the next."
        )
    for ranks, warning in _by_rank((warning, answer.rank) for answer in answers for warning in answer.warnings):
        warn(Finding(FindingKind.IN_WORKER, ranks, warning), stacklevel=4)
    return answers


def error_of(answers: Sequence[Answer]) -> DitPatchError | None:
    """Return the first worker's error, with the messages of all; None if none of them failed."""
    failed = [answer for answer in answers if answer.failure]
    if not failed:
        return None
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


# What runs in a worker.


def run_in_worker(worker: Any, function: Callable, *args: Any) -> Answer:
    """Answer with what `function(worker, *args)` returns or raises, and with what we warn of in it."""
    pickled, failure = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", category=DitPatchWarning)
        try:
            pickled = pickle.dumps(function(worker, *args))  # here, where it can fail without ending the worker
        except Exception as error:
            failure = Failure.of(error)
    ours = [each.message.finding.warning for each in caught if isinstance(each.message, DitPatchWarning)]
    for each in caught:
        if not isinstance(each.message, DitPatchWarning):
            warnings.showwarning(each.message, each.category, each.filename, each.lineno)
    return Answer(getattr(worker, "rank", 0), pickled, failure, tuple(dict.fromkeys(ours)))


def patch_pipeline(worker: Any, options: dict[str, Any], token: str) -> Applied:
    """Patch the worker's pipeline; the handle gets the token, if this call has made it."""
    pipeline = worker.pipeline
    if getattr(pipeline, "post_init_called", True) is False:
        # FastVideo leaves the end of loading, compilation with it, to a worker's first generation.
        pipeline.post_init()
    existing = _existing_handle(pipeline)
    handle = apply(pipeline, **options)
    # A handle that was made in the worker itself is not this call's to undo.
    if handle.token is None:
        handle.token = token if existing is None else uuid.uuid4().hex
    return Applied(handle.token, handle.options)


def find_handle(worker: Any) -> Applied | None:
    """Return the worker's handle, if there is one; one that was made in the worker itself gets a token."""
    handle = _existing_handle(worker.pipeline)
    if handle is None:
        return None
    handle.token = handle.token or uuid.uuid4().hex
    return Applied(handle.token, handle.options)


def call_handle(worker: Any, tokens: dict[int, str], *methods: str) -> Rows | None:
    """Call methods of the worker's handle; its rows after that, or None if it is not there any more."""
    handle = _own(worker, tokens)
    if handle is None:
        return None
    for method in methods:
        getattr(handle, method)()
    return handle.rows()


def explain(worker: Any, tokens: dict[int, str]) -> str | None:
    """Return what the worker's handle explains, or None if it is not there any more."""
    handle = _own(worker, tokens)
    return None if handle is None else handle.explain()


def begin_generation(worker: Any, tokens: dict[int, str], steps: int | None) -> None:
    """Tell the worker's handle, if it is still there, that a generation begins."""
    handle = _own(worker, tokens)
    if handle is not None:
        handle.begin_generation(steps)


def _own(worker: Any, tokens: dict[int, str]) -> Handle | None:
    """Return the worker's handle, if it is the one that the tokens are of."""
    handle = _existing_handle(worker.pipeline)
    return handle if handle is not None and handle.token == tokens.get(worker.rank, "") else None


def _existing_handle(pipeline: Any) -> Handle | None:
    return next(filter(None, map(own_handle, find_models(pipeline).values())), None)
