"""Run the forwards of a subject, and join what they repeat with what they cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import DitPatchError
from ...handle import Handle, Options, patch_models
from ...hosts.fastvideo import give_stage_caches
from ...spec import mini
from ...spec.recipe import Case
from .accelerator import DEVICE, SUPPORTED, Accelerator, to_accelerator
from .operations import Operation
from .recorder import Recorder
from .repeats import Moment, Observation, Observed, Repeats, keys
from .shapes import NoNumbersError
from .subject import Subject

LARGEST = 1 << 20
"""Tensors of up to that many numbers have them at full size, too: tables, indices, the content of masks."""

_STEPS, _WARM_STEPS, _GENERATIONS = 3, 2, 2


@dataclass(frozen=True)
class Cost:
    """An operation of a forward at full size, and how often its result is known to repeat, and was seen to."""

    operation: Operation
    known: Repeats
    seen: Repeats


@dataclass(frozen=True)
class Forward:
    """The warm forwards of one step at full size.

    Attributes:
        costs: of all its operations.
        passes: how many forwards these are.
        peak_nbytes: the most that was on the device at once, weights included.
    """

    costs: Sequence[Cost]
    passes: int
    peak_nbytes: int


@dataclass(frozen=True)
class Audit:
    """What an audit found out.

    Attributes:
        subject: what was audited.
        observed: what repeats in the small model.
        plain: the forwards of one step at full size, or, where that could not be run, of the small model.
        patched: the same with the spec's sites patched; None where there is nothing to patch.
        weights: how many there are at full size.
        notes: what the reader has to know of how this came about.
        left_over: what the patched sites say of themselves: the address, and why nothing is kept.
        is_full_size: what is counted is of full size.
    """

    subject: Subject
    observed: Observed
    plain: Forward
    patched: Forward | None
    weights: int
    notes: tuple[str, ...]
    left_over: Mapping[str, str]
    is_full_size: bool = True


def audit(
    subject: Subject,
    *,
    dtype: torch.dtype = torch.bfloat16,
    patch: bool = True,
    max_bytes: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Audit:
    """Audit a subject.

    Args:
        dtype: of the model at full size.
        patch: count with the spec's sites patched, too.
        max_bytes: the budget of the caches, as for `apply`.
        say: is told what is done.

    Raises:
        DitPatchError: this torch cannot simulate a device, or the tiny model cannot be called.
    """
    if not SUPPORTED:
        raise DitPatchError(f"torch {torch.__version__} cannot simulate a device; audit needs torch 2.9 or later")
    say(f"{subject.name}: what repeats, in forwards of a small model with numbers ...")
    try:
        observed = observe(subject)
    except DitPatchError:
        raise
    except Exception as error:  # the model's own
        raise DitPatchError(f"{subject.name}: the small model cannot be built or called: {_words(error)}") from error
    notes = list(subject.notes)
    say(f"{subject.name}: what it costs, at full size, in shapes ...")
    plain, weights, case, dtype, largest = _first_that_runs(subject, observed, dtype, notes)
    patched, said = None, {}
    if patch and subject.is_patchable:
        say(f"{subject.name}: the same, patched ...")
        options = Options(check="never", **({} if max_bytes is None else {"max_bytes": max_bytes}))
        try:
            patched, _, said = _warm_forward(subject, case, observed, dtype, largest, options)
        except Exception as error:
            notes.append(f"not counted with patches: {_words(error)}")
    return Audit(subject, observed, plain, patched, weights, tuple(notes), said, largest is not None)


def _first_that_runs(
    subject: Subject, observed: Observed, dtype: torch.dtype, notes: list[str]
) -> tuple[Forward, int, Case, torch.dtype, int | None]:
    """Return the forwards of one step at full size, or else of the small model, and how it was run.

    A model that does not run in the dtype is run in float32: some need an autocast that only their pipelines know.
    """
    dtypes = tuple(dict.fromkeys((dtype, torch.float32)))
    problems: list[str] = []
    for case, largest in ((subject.full, LARGEST), (subject.toy, None)):
        for each in dtypes:
            try:
                plain, weights, _ = _warm_forward(subject, case, observed, each, largest)
            except Exception as error:  # the model's own, or of a size that it does not take
                problems.append(str(error) if isinstance(error, NoNumbersError) else _words(error))
                continue
            if largest is None:
                last = problems[len(dtypes) - 1]
                notes.append(f"NOT of full size, but of the small model, whose shares say little: {last}")
            if each is not dtype:
                name = str(dtype).removeprefix("torch.")
                notes.append(f"in float32: in {name} it does not run: {problems[-1]}")
            return plain, weights, case, each, largest
    raise DitPatchError(f"{subject.name}: the model cannot be run: {problems[0]}")


def observe(subject: Subject) -> Observed:
    """Run two generations of the small model, and return what repeats in them."""
    observation = Observation()
    case = subject.toy
    with Accelerator() as accelerator, torch.no_grad():
        model = to_accelerator(mini.build(subject.spec, case))
        accelerator.observer = recorder = Recorder(model, digests=True)
        for generation in range(_GENERATIONS):
            steps = _STEPS if case.rollout is None else _WARM_STEPS  # of each block of a rollout, which has one more
            options = {"steps": steps, "generation": generation, "device": DEVICE}
            for number, arguments in enumerate(mini.forwards(case, _quickest(case), **options)):
                moment = Moment(generation, *divmod(number, len(mini.PASSES)))
                recorder.begin(arguments)
                observation.begin(moment, arguments)
                model(**arguments)
                observation.end(recorder.end())
    renewed = {name: recipe.new for name, recipe in case.inputs.items() if not recipe.is_value}
    return observation.observed(renewed)


def _quickest(case: Case) -> Mapping[str, int]:
    """Return the size with the shortest rollout, or the first."""
    return min(case.sizes, key=lambda size: size.get("blocks", 0))


def _warm_forward(
    subject: Subject,
    case: Case,
    observed: Observed,
    dtype: torch.dtype,
    largest: int | None,
    options: Options | None = None,
) -> tuple[Forward, int, dict[str, str]]:
    """Return the last step of a short generation, the number of weights, and what patched sites say of themselves."""
    passes = len(mini.PASSES)
    with ExitStack() as stack:
        accelerator = stack.enter_context(Accelerator(largest))
        stack.enter_context(torch.no_grad())
        model = to_accelerator(mini.build(subject.spec, case, dtype=dtype))
        stack.enter_context(mini.autocast(subject.spec, dtype, DEVICE))
        forwards = list(mini.forwards(case, case.sizes[0], steps=_WARM_STEPS, dtype=dtype, device=DEVICE))
        pipeline = mini.pipeline(subject.spec, model)
        if options is None and case.rollout is None:
            forwards = [forwards[0], *forwards[-passes:]]  # enough for what the model keeps itself
        handle = stack.enter_context(_patched(model, pipeline, subject, options))
        if pipeline is not None:
            give_stage_caches(pipeline, forwards, case.sizes[0])
        accelerator.observer = recorder = Recorder(model)
        costs: list[Cost] = []
        for number, arguments in enumerate(forwards):
            last = number - (len(forwards) - passes)
            recorder.begin(arguments, keep=last >= 0)
            model(**arguments)
            costs += joined(recorder.end(), observed, is_first_pass=not last)
        said = left_over(handle)
        weights = sum(each.numel() for each in model.parameters())
    return Forward(costs, passes, recorder.peak_nbytes), weights, said


def joined(operations: Sequence[Operation], observed: Observed, *, is_first_pass: bool) -> Iterator[Cost]:
    """Yield the operations of one forward, each with how often its result repeats."""
    for operation, key in zip(operations, keys(operations), strict=True):
        known, seen = observed.of(operation, key)
        if is_first_pass:  # what the passes of a step share is made in the first of them
            known, seen = replace(known, passes=0.0), replace(seen, passes=0.0)
        yield Cost(operation, known, seen)


@contextmanager
def _patched(
    model: torch.nn.Module, pipeline: Any, subject: Subject, options: Options | None
) -> Iterator[Handle | None]:
    if options is None:
        yield None
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said of sites is in the rows below
        root = model if pipeline is None else pipeline
        with patch_models(root, {"transformer": (model, subject.spec)}, options) as handle:
            yield handle


def left_over(handle: Handle | None) -> dict[str, str]:
    """Return what the sites of a handle say of themselves, by their addresses."""
    rows = handle.stats() if handle is not None else ()
    return {row.at: "; ".join(row.notes or row.bypassed) for row in rows if (row.notes or row.bypassed)}


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
