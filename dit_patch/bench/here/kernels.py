"""The rotation against a clone of the same tensor, and a warm patched forward as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from ...handle import apply
from ...memo.results import tensors_in
from ..rotary.cases import CASES
from ..rotary.contestants import CLONE, CONTESTANTS, EAGER, OURS
from ..rotary.operations import measure as measure_operations
from ..rotary.timing import Timed, in_turns
from .results import DIFFERS, FAILED, SKIPPED, Row
from .targets import Target
from .whole_forwards import NO_GPU, Subject

_TINY = (1, 64, 2, 16)
_NAMES = ("wan-1.3b-480p", "matrix-game-2")


def rotation(part: str, device: torch.device, seconds: float, *, tiny: bool) -> Iterator[Row]:
    """Yield for each case the library's function beside ours, and our bandwidth beside a clone's."""
    for name in _NAMES:
        case = replace(CASES[name], shape=_TINY) if tiny and name == _NAMES[0] else CASES[name]
        chosen = {each: CONTESTANTS[each] for each in (EAGER, OURS, CLONE)}
        rows = {row.contestant: row for row in measure_operations(case, device, seconds / (3 * len(_NAMES)), chosen)}
        ours, eager, clone = (rows.get(each) for each in (OURS, EAGER, CLONE))
        if ours is None or ours.us is None:
            note = next((row.note for row in rows.values() if row.note), "not measured")
            yield Row(part, name, note=note if note.startswith((FAILED, SKIPPED)) else f"{SKIPPED}: {note}")
            continue
        note = DIFFERS if ours.differing else "equal bits"
        yield Row(part, name, "us", eager.us, ours.us, note)
        if clone.gb_per_s and ours.gb_per_s:
            yield Row(part, f"{name}, a clone", "GB/s", clone.gb_per_s, ours.gb_per_s, f"{ours.of_clone:.0%} of it")


def capture(part: str, target: Target, device: torch.device, seconds: float, *, tiny: bool) -> Iterator[Row]:
    """Yield the time of a warm patched forward, launched operation by operation and replayed as a CUDA graph."""
    if device.type != "cuda":
        yield Row(part, "a warm forward, replayed", note=NO_GPU)
        return
    end = time.monotonic() + seconds
    subject = Subject(*target.resolve(tiny=tiny), device)
    model = subject.build()
    arguments = subject.generation(0)[0]
    with apply(model, only=[subject.spec.name]), subject.autocast():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                expected = [tensor.clone() for tensor in tensors_in(model(**arguments))]
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(**arguments)
        graph.replay()
        torch.cuda.synchronize()
        is_equal = all(map(torch.equal, tensors_in(captured), expected))
        ways = [Timed(lambda: model(**arguments)), Timed(graph.replay)]
        eager, replayed = in_turns(ways, device, max(1.0, (end - time.monotonic()) / 3))
    note = "equal bits" if is_equal else DIFFERS
    yield Row(part, "a warm patched forward, replayed", "ms", eager.us / 1e3, replayed.us / 1e3, note)
