"""Time a generation of a small model."""

from __future__ import annotations

import time

import torch

from ..spec import mini
from ..spec.recipe import Case


def time_generation(model: torch.nn.Module, case: Case, number: int, device: str = "cpu") -> float:
    """Return the microseconds that a forward takes, the mean of a generation with inputs of its own."""
    made = list(mini.forwards(case, case.sizes[0], device=device, generation=number))
    _wait(device)
    start = time.perf_counter()
    with torch.no_grad():
        for arguments in made:
            model(**arguments)
    _wait(device)
    return (time.perf_counter() - start) / len(made) * 1e6


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
