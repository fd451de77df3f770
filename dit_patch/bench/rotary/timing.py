"""Time several ways to do the same in turns, so that whatever else the machine does slows all of them alike.

This module knows devices and clocks, and nothing of what is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...memo.keys import flat

_ROUNDS = 5  # at the least
_TURN = 0.01  # seconds; what is quicker is called several times in a turn
_MOST = 100  # calls in a turn
_L2 = 256 << 20  # bytes, more than any GPU's L2 cache
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Clock = Callable[[Callable[[], Any], int], list[float]]


@dataclass(frozen=True)
class Timed:
    """A `call` to be timed, which does `count` things, and what is called untimed before each turn."""

    call: Callable[[], Any]
    count: int = 1
    begin: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Times:
    """Microseconds for one thing: the median, and what 20 % and 80 % of the calls stay below."""

    us: float
    us_20: float
    us_80: float


def in_turns(ways: Sequence[Timed], device: torch.device, seconds: float, *, turn: float = _TURN) -> list[Times]:
    """Return the times of each way, in rounds until each has taken `seconds` on average.

    A round takes `turn` seconds of each way, at least one call. A first round is not counted.
    """
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    calls = [_calls(clock, way, turn) for way in ways]
    for way, number in zip(ways, calls):
        _turn(clock, way, number)
    times: list[list[float]] = [[] for _ in ways]
    rounds, start = 0, time.perf_counter()
    while rounds < _ROUNDS or time.perf_counter() - start < seconds * len(ways):
        rounds += 1
        for way, number, found in zip(ways, calls, times):
            found += _turn(clock, way, number)
    return [_summary(found, way.count) for way, found in zip(ways, times)]


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return the most memory that the call allocates at a time, or None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def differing(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> float:
    """Return the share of elements whose bits differ; where shape or dtype differ, all of them count."""
    different = elements = 0
    for one, other in zip(ours, theirs, strict=True):
        elements += other.numel()
        if one.shape != other.shape or one.dtype != other.dtype:
            different += other.numel()
        elif other.numel():
            integer = _INTEGERS[one.element_size()]
            different += int((flat(one).view(integer) != flat(other).view(integer)).sum())
    return different / elements if elements else 0.0


def _calls(clock: Clock, way: Timed, turn: float) -> int:
    """Return how many calls take that long, judged by the second of two."""
    return max(1, min(_MOST, int(turn / max(_turn(clock, way, 2)[-1], 1e-9)))) if turn else 1


def _turn(clock: Clock, way: Timed, number: int) -> list[float]:
    if way.begin is not None:
        way.begin()
    return clock(way.call, number)


def _cpu_clock(call: Callable[[], Any], number: int) -> list[float]:
    seconds = []
    for _ in range(number):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _cuda_clock(device: torch.device) -> Clock:
    cache = torch.empty(_L2, dtype=torch.uint8, device=device)

    def clock(call: Callable[[], Any], number: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
        for start, end in pairs:
            cache.zero_()  # so that nothing is in the L2 cache that would not be there in a model
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    return clock


def _summary(seconds: list[float], count: int) -> Times:
    low, _, _, high = statistics.quantiles(seconds, n=5, method="inclusive")
    return Times(*(each * 1e6 / count for each in (statistics.median(seconds), low, high)))
