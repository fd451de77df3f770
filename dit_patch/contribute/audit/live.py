"""Audit one model while the program that it belongs to runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...handle import apply
from ...launch.find_pipeline import pipeline_of
from ...memo.context import transparent_modes
from ...sites.scope import Hook, parameters
from ...spec.mini import spec_without_sites
from ...spec.recipe import Case
from ...spec.registry import Registry
from . import operations, transfers
from .audit import Audit, Forward, joined, left_over
from .recorder import Recorder, content
from .repeats import Moment, Observation
from .subject import Subject


class LiveAudit:
    """Records forwards of one model: plain, and then patched if there is a spec.

    Args:
        model: is hooked.
        forwards: how many to record each time.
        patch: record patched ones, too.
    """

    def __init__(self, model: torch.nn.Module, forwards: int, *, patch: bool) -> None:
        self._wanted = forwards
        self._spec = Registry().find(type(model))
        self._patch = patch and self._spec is not None
        self._plain = _Recording(model)
        self._patched: _Recording | None = None
        self._left_over: dict[str, str] = {}
        self._notes: list[str] = []
        self._running: _Recording | None = None
        self._handle: Any = None
        self._weights = sum(each.numel() for each in model.parameters())
        model.register_forward_pre_hook(Hook(self._before, self), with_kwargs=True)
        model.register_forward_hook(Hook(self._after, self), with_kwargs=True, always_call=True)

    def __repr__(self) -> str:
        return f"<LiveAudit of {len(self._plain.forwards)} forwards>"

    def found(self) -> dict[str, Any] | None:
        """Return what was found out, or None where too little was recorded."""
        plain = self._plain.forward()
        if plain is None:
            return None
        forward, observed, names = plain
        patched = None if self._patched is None else self._patched.forward(observed)
        cls = self._plain.cls
        return {
            "class": f"{cls.__module__}.{cls.__qualname__}",
            "spec": None if self._spec is None else self._spec.name,
            "observed": observed,
            "plain": forward,
            "patched": None if patched is None else patched[0],
            "weights": self._weights,
            "notes": [*self._plain.notes(names), *self._notes],
            "left_over": self._left_over,
        }

    def _before(self, model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        recording = self._recording(model)
        if recording is not None and not torch.compiler.is_compiling():
            arguments = {**dict(zip(parameters(model), args)), **kwargs}
            self._running = recording if recording.begin(arguments) else None

    def _after(self, model: torch.nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.end()
        if self._handle is not None and self._patched is not None and len(self._patched.forwards) >= self._wanted:
            self._left_over = left_over(self._handle)
            handle, self._handle = self._handle, None
            handle.remove()

    def _recording(self, model: torch.nn.Module) -> _Recording | None:
        """Return what records the forward that begins now, patching the model before the first that is to be so."""
        if len(self._plain.forwards) < self._wanted:
            return self._plain
        if not self._patch or (self._patched is not None and len(self._patched.forwards) >= self._wanted):
            return None
        if self._patched is None:
            self._patched = _Recording(model)
            try:
                pipeline = pipeline_of(model)
                self._handle = apply(model if pipeline is None else pipeline)
            except Exception as error:
                self._patch = False
                self._notes.append(f"not counted with patches: {error}")
                return None
            return None  # the frame of the first patched forward is not open
        return self._patched


class _Recording:
    """The forwards that were recorded in one state of the model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.cls = type(model)
        self.forwards: list[tuple[dict[str, int], list[operations.Operation]]] = []
        self.device = str(next((each.device for each in model.parameters()), "cpu"))
        names = parameters(model)
        self._recorder = Recorder(model, digests=True, changing=frozenset(names[:1]))
        self._mode: _Mode | None = None
        self._contents: dict[str, int] = {}
        self.failures: Counter[str] = Counter()  # of reading an operation, which runs all the same
        self._first: tuple[int | None] | None = None  # the content of the first timestep that was seen

    def __repr__(self) -> str:
        return f"<_Recording of {len(self.forwards)} forwards>"

    def notes(self, what: str) -> list[str]:
        """Return in words how this came about."""
        found = [f"{len(self.forwards)} forwards of the program, on {self.device}: {what}"]
        if self.failures:
            found.append(f"{sum(self.failures.values())} operations could not be read: {next(iter(self.failures))}")
        return found

    def begin(self, arguments: dict[str, Any]) -> bool:
        """Begin a forward, and return whether it is recorded: not before another step has begun than the first seen."""
        self._contents = {name: content(value) for name, value in arguments.items()}
        if not self.forwards:
            name = timestep_name(arguments)
            time = self._contents.get(name) if name is not None else None
            self._first = self._first or (time,)
            if name is not None and time == self._first[0]:
                return False
        self._recorder.begin(arguments)
        self._mode = _Mode(self._recorder, self.failures)
        self._mode.__enter__()
        return True

    def end(self) -> None:
        """End the forward that was begun."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)
            self.forwards.append((self._contents, self._recorder.end()))

    def forward(self, observed: Any = None) -> tuple[Forward, Any, str] | None:
        """Return the forwards of the last whole step, what repeats, and in words what was recorded."""
        if len(self.forwards) < 2:
            return None
        moments = moments_of([contents for contents, _ in self.forwards])
        observation = Observation()
        for moment, (contents, found) in zip(moments, self.forwards, strict=True):
            observation.begin_with(moment, contents)
            observation.end(found)
        observed = observed or observation.observed()
        passes = max(moment.number for moment in moments) + 1
        last = max((moment.generation, moment.step) for moment in moments if moment.number == passes - 1)
        costs = [
            cost
            for moment, (_, found) in zip(moments, self.forwards, strict=True)
            if (moment.generation, moment.step) == last
            for cost in joined(found, observed, is_first_pass=moment.number == 0)
        ]
        steps = len({(moment.generation, moment.step) for moment in moments})
        words = f"{steps} steps with {passes} {'pass' if passes == 1 else 'passes'} each"
        return Forward(costs, passes, self._recorder.peak_nbytes), observed, words


def moments_of(contents: Sequence[dict[str, int]]) -> list[Moment]:
    """Return when each forward runs, told from the content of its timestep.

    A step has one timestep, and each of its forwards is a pass. A timestep that was there earlier begins a generation
    anew. Without an argument of that name, each forward is a step.
    """
    name = timestep_name(contents[0])
    if name is None:
        return [Moment(0, step, 0) for step in range(len(contents))]
    found: list[Moment] = []
    seen: list[int] = []
    for each in contents:
        time = each[name]
        if not found:
            found.append(Moment(0, 0, 0))
        elif time == seen[-1]:
            found.append(found[-1]._replace(number=found[-1].number + 1))
            continue
        elif time in seen:
            found.append(Moment(found[-1].generation + 1, 0, 0))
            seen = []
        else:
            found.append(Moment(found[-1].generation, found[-1].step + 1, 0))
        seen.append(time)
    return found


def timestep_name(names: Iterable[str]) -> str | None:
    """Return the name of the argument that is the timestep, or None."""
    return next((each for each in names if each == "t" or "timestep" in each), None)


def subject_of(found: dict[str, Any]) -> Subject:
    """Return the subject that stands for what was audited live."""
    spec = None if found["spec"] is None else next(each for each in Registry() if each.name == found["spec"])
    if spec is None:
        spec = spec_without_sites(found["class"])
    empty = Case(sizes=({},))
    return Subject(found["class"].rpartition(".")[2], spec, empty, empty, tuple(found["notes"]))


def audit_of(found: dict[str, Any]) -> Audit:
    """Return the audit of what was recorded."""
    subject = subject_of(found)
    return Audit(
        subject,
        found["observed"],
        found["plain"],
        found["patched"],
        found["weights"],
        tuple(found["notes"]),
        found["left_over"],
    )


class _Mode(TorchDispatchMode):
    """Tells a recorder of every operation on a real device."""

    def __init__(self, recorder: Recorder, failures: Counter[str]) -> None:
        super().__init__()
        self._recorder, self._failures = recorder, failures

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                self._tell(operation, args, kwargs, result)
        except Exception as error:  # of a kind of tensor or of operation that is not known here
            self._failures[f"{operation}: {type(error).__name__}: {error}"] += 1
        return result

    def _tell(self, operation: Any, args: tuple, kwargs: dict, result: Any) -> None:
        name = operations.name_of(operation)
        ours = [*operations.tensors_in((args, kwargs)), *operations.tensors_in(result)]
        on_device = any(map(transfers.is_on_device, operations.tensors_in(result)))
        copies = transfers.copies(name, args, on_device)
        waits = transfers.syncs(name, args, kwargs) if any(map(transfers.is_on_device, ours)) else []
        self._recorder.operation(operation, args, kwargs, result, copies, waits)


transparent_modes.add(_Mode)
