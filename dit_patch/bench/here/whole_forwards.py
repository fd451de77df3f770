"""Whole forwards of one model, plain and patched in turns, beside compiled blocks; copies, waits, the GPU's share."""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ...contribute.verify import first_difference, run
from ...handle import apply
from ...spec import mini
from ...spec.model import Spec
from ...spec.recipe import Case
from .results import DIFFERS, SKIPPED, Row
from .targets import Target

NO_GPU = f"{SKIPPED}: needs a CUDA device"
_TURNS = 3  # at the least
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Subject:
    """What is called: how its inputs are made, and on what."""

    spec: Spec
    case: Case
    device: torch.device
    #: Of a generation.
    steps: int = 4

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and inputs: bfloat16 on a GPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def build(self) -> torch.nn.Module:
        """Return the model with random weights, on the device."""
        return mini.build(self.spec, self.case, dtype=self.dtype).to(self.device)

    def generation(self, number: int) -> list[dict[str, Any]]:
        """Return the arguments of each forward of a generation with contents of its own."""
        size = self.case.sizes[0]
        made = mini.forwards(self.case, size, steps=self.steps, dtype=self.dtype, device=self.device, generation=number)
        return mini.repeat(list(made))

    def autocast(self):
        """Return the autocast that the library's pipelines run the model under."""
        return mini.autocast(self.spec, self.dtype, self.device)

    def call(self, model: torch.nn.Module, forwards: list[dict[str, Any]]) -> None:
        """Run these forwards."""
        with self.autocast():
            for arguments in forwards:
                model(**arguments)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of the model that shares its weights and buffers, so that two take the memory of one."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def measure(part: str, target: Target, device: torch.device, seconds: float, *, tiny: bool) -> Iterator[Row]:
    """Yield the rows of one model, within about so many seconds."""
    end = time.monotonic() + seconds
    subject = Subject(*target.resolve(tiny=tiny), device, steps=1 if tiny else 4)
    plain = subject.build()
    patched = twin(plain)
    handle = apply(patched, only=[subject.spec.name])
    forwards = subject.generation(0)
    with subject.autocast():
        differs = first_difference(run(patched, forwards), run(plain, forwards))
    number = len(forwards)
    words = f"equal bits in {number} forwards" if differs is None else f"{DIFFERS}: first in forward {differs}"
    yield Row(part, "outputs", note=words)
    ways = {"plain": plain, "patched": patched}
    times = _in_turns(subject, ways, (end - time.monotonic()) / 3)
    yield from _rows(part, "a forward", times)
    yield from _profiled(part, subject, ways, times)
    ways = {"plain": twin(plain), "patched": twin(plain)}
    compiled = apply(ways["patched"], only=[subject.spec.name])
    for model in ways.values():
        compile_blocks(subject, model)
    for model in ways.values():
        subject.call(model, subject.generation(0))
    yield from _rows(part, "a forward, blocks compiled", _in_turns(subject, ways, end - time.monotonic()))
    yield Row(part, "sites", note=f"{sum(row.hits for row in handle.stats())} hits, {handle.nbytes / 2**20:.1f} MiB")
    compiled.remove()
    handle.remove()


def compile_blocks(subject: Subject, model: torch.nn.Module) -> None:
    """Compile each of the model's blocks in place; in a dry run on a CPU the first of each list is traced, no more."""
    is_dry = subject.device.type != "cuda"
    for blocks in subject.spec.blocks:
        for block in [*model.get_submodule(blocks.at)][: 1 if is_dry else None]:
            block.compile(backend="eager" if is_dry else "inductor")


@dataclass(frozen=True)
class Times:
    """Milliseconds that a forward takes: in all, until the host has launched it, and by CUDA events on a GPU."""

    wall: float
    host: float
    events: float | None


def _in_turns(subject: Subject, ways: Mapping[str, torch.nn.Module], seconds: float) -> dict[str, Times]:
    found: dict[str, list[Times]] = defaultdict(list)
    start, number = time.monotonic(), 0
    while number <= _TURNS or time.monotonic() - start < seconds:
        for name, model in ways.items():
            found[name].append(_time(subject, model, number))
        number += 1
    return {name: _medians(each[1:]) for name, each in found.items()}  # the first warms up


def _time(subject: Subject, model: torch.nn.Module, number: int) -> Times:
    forwards = subject.generation(number)
    has_events = subject.device.type == "cuda"
    first, last = (torch.cuda.Event(enable_timing=True) if has_events else None for _ in range(2))
    subject.wait()
    start = time.perf_counter()
    if has_events:
        first.record()
    subject.call(model, forwards)
    if has_events:
        last.record()
    host = time.perf_counter() - start
    subject.wait()
    wall = time.perf_counter() - start
    share = 1e3 / len(forwards)
    return Times(wall * share, host * share, first.elapsed_time(last) / len(forwards) if has_events else None)


def _medians(times: list[Times]) -> Times:
    events = [each.events for each in times if each.events is not None]
    return Times(
        statistics.median(each.wall for each in times),
        statistics.median(each.host for each in times),
        statistics.median(events) if events else None,
    )


def _rows(part: str, what: str, times: Mapping[str, Times]) -> Iterator[Row]:
    before, after = times["plain"], times["patched"]
    yield Row(part, what, "ms", before.wall, after.wall, "until it has ended")
    yield Row(part, what, "ms", before.host, after.host, "until the host has launched it")
    if before.events is None:
        yield Row(part, what, note=f"{NO_GPU} (CUDA events)")
    else:
        yield Row(part, what, "ms", before.events, after.events, "by CUDA events")


def _profiled(
    part: str, subject: Subject, ways: Mapping[str, torch.nn.Module], times: Mapping[str, Times]
) -> Iterator[Row]:
    """Yield what the profiler counts in a warm generation, for each forward."""
    if subject.device.type != "cuda":
        yield Row(part, "copies, waits, the GPU's share", note=NO_GPU)
        return
    counted = {}
    for name, model in ways.items():
        forwards = subject.generation(1)
        subject.call(model, forwards)
        subject.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            subject.call(model, forwards)
            subject.wait()
        events = profiler.events()
        waits = sum(event.name in _WAITS for event in events) - 1  # the last one is ours
        on_device = [event for event in events if event.device_type is torch.autograd.DeviceType.CUDA]
        copies = sum(event.name.startswith("Memcpy HtoD") for event in on_device)
        busy = sum(event.time_range.elapsed_us() for event in on_device) / 1e3
        counted[name] = [each / len(forwards) for each in (copies, waits, busy)]
    (copies, waits, busy), (fewer_copies, fewer_waits, less_busy) = counted["plain"], counted["patched"]
    yield Row(part, "copies to the GPU, a forward", "", copies, fewer_copies)
    yield Row(part, "waits for the GPU, a forward", "", waits, fewer_waits)
    shares = busy / times["plain"].wall * 100, less_busy / times["patched"].wall * 100
    yield Row(part, "the GPU is busy", "%", *shares, "of the time a forward takes")
