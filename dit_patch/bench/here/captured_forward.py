"""A warm patched forward, replayed as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from ...handle import apply
from ...memo.results import tensors_in
from ..cuda_graphs import capture
from ..rotary.timing import Timed, in_turns
from .results import DIFFERS, Row
from .targets import Target
from .whole_forwards import NO_GPU, Subject


def captured_forward(part: str, target: Target, device: torch.device, seconds: float, *, tiny: bool) -> Iterator[Row]:
    """Yield the time of a warm patched forward, launched operation by operation and replayed as a CUDA graph."""
    if device.type != "cuda":
        yield Row(part, "a warm forward, replayed", note=NO_GPU)
        return
    end = time.monotonic() + seconds
    subject = Subject(*target.resolve(tiny=tiny), device)
    model = subject.build()
    arguments = subject.generation(0)[0]
    with apply(model, only=[subject.spec.name]), subject.autocast():
        graph, captured = capture(lambda: model(**arguments))
        expected = [tensor.clone() for tensor in tensors_in(model(**arguments))]
        graph.replay()
        torch.cuda.synchronize()
        is_equal = all(map(torch.equal, tensors_in(captured), expected))
        ways = [Timed(lambda: model(**arguments)), Timed(graph.replay)]
        eager, replayed = in_turns(ways, device, max(1.0, (end - time.monotonic()) / 3))
    note = "equal bits" if is_equal else DIFFERS
    yield Row(part, "a warm patched forward, replayed", "ms", eager.us / 1e3, replayed.us / 1e3, note)
