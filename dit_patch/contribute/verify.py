"""Run the same forwards with and without dit_patch: whether the outputs have the same bits, and how long each takes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..handle import apply
from ..memo.keys import same_bits
from ..memo.results import tensors_in
from ..report.rows import SiteStats
from ..spec.mini import repeat


@dataclass(frozen=True)
class Verdict:
    """`equal`: all outputs, bit for bit; `first_difference`: the number of the first forward that differs.

    Times are host seconds of all forwards, measured one after the other in this process.
    """

    equal: bool
    first_difference: int | None
    seconds_plain: float
    seconds_patched: float
    stats: tuple[SiteStats, ...]


def run(model: torch.nn.Module, forwards: Iterable[Mapping[str, Any]]) -> list[list[torch.Tensor]]:
    """Return copies of the output tensors of each forward, run without autograd."""
    outputs = []
    with torch.no_grad():
        for arguments in repeat(forwards):
            result = model(**arguments)
            result = tuple(result.values()) if isinstance(result, Mapping) else result
            outputs.append([tensor.clone() for tensor in tensors_in(result)])
    return outputs


def first_difference(ours: list[list[torch.Tensor]], theirs: list[list[torch.Tensor]]) -> int | None:
    """Return the number of the first forward whose outputs differ in any bit, or None."""
    for number, (one, other) in enumerate(zip(ours, theirs)):
        if len(one) != len(other) or not all(map(same_bits, one, other)):
            return number
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def compare(model: torch.nn.Module, forwards: Iterable[Mapping[str, Any]], **options: Any) -> Verdict:
    """Run `forwards` on `model` unpatched, then with `apply(model, **options)`, then remove the patch."""
    forwards = list(forwards)
    start = time.perf_counter()
    plain = run(model, forwards)
    middle = time.perf_counter()
    with apply(model, **options) as handle:
        patched = run(model, forwards)
        end = time.perf_counter()
        stats = tuple(handle.stats())
    difference = first_difference(plain, patched)
    return Verdict(difference is None, difference, middle - start, end - middle, stats)
