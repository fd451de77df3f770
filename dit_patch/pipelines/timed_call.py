"""One call of a diffusers pipeline, timed: its videos, the rate of its steps, the memory that it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ..errors import DitPatchError, quote
from . import call_arguments, pictures


@dataclass(frozen=True)
class Generated:
    """What one call of a pipeline returned, and how long it took.

    Attributes:
        videos: float32 tensors (frames, channels, height, width) in [0, 1], on the CPU.
        seconds: of the whole call.
        steps: the number of denoising steps; 0 where the pipeline does not say when one ends.
        steps_per_second: after the first step; None where there are fewer than two.
        peak_bytes: the most bytes that were allocated on a CUDA device; None on others.
    """

    videos: list[torch.Tensor]
    seconds: float
    steps: int
    steps_per_second: float | None
    peak_bytes: int | None


def generate(pipeline: Any, call: dict[str, Any], seed: int, device: torch.device, label: str) -> Generated:
    """Call the pipeline, and time it.

    Args:
        call: the arguments, besides those that this function gives itself.
        seed: of the noise.
        label: of the progress bar.

    Raises:
        DitPatchError: the pipeline refuses the arguments, or the memory does not suffice.
    """
    pipeline.set_progress_bar_config(desc=label)
    parameters = call_arguments.parameters(pipeline)
    clock = StepClock(device)
    ours = {"output_type": "pt", "generator": torch.Generator().manual_seed(seed)}
    if "callback_on_step_end" in parameters:
        ours["callback_on_step_end"] = clock.on_step_end
    for name in ("output_type", "generator"):
        if name not in parameters:
            del ours[name]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _wait(device)
    start = time.perf_counter()
    with _explained(pipeline, call, clock):
        result = pipeline(**call, **ours)
    _wait(device)
    seconds = time.perf_counter() - start
    if getattr(result, "audio", None) is not None:
        print("it has made sound, too, which is not written")
    return Generated(
        videos=pictures.videos(result),
        seconds=seconds,
        steps=len(clock.moments),
        steps_per_second=clock.steps_per_second(),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


@contextmanager
def _explained(pipeline: Any, call: Mapping[str, Any], clock: StepClock) -> Iterator[None]:
    """Turn what a pipeline refuses before its first step ends into an error of the command line."""
    try:
        yield
    except DitPatchError:
        raise
    except torch.OutOfMemoryError as error:
        raise DitPatchError(
            f"out of memory: {str(error).splitlines()[0]}\n"
            "    --offload model or group, a narrower --dtype, or a smaller --height, --width or --frames help."
        ) from error
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if clock.moments:
            raise
        arguments = ", ".join(f"{name}={quote(value)}" for name, value in call.items())
        raise DitPatchError(
            f"{type(pipeline).__name__}: {type(error).__name__}: {error or 'it says no more'}\n"
            f"    Called with: {arguments}."
        ) from error


class StepClock:
    """Records when each denoising step ends; on CUDA with events, so that nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.moments: list[Any] = []

    def __repr__(self) -> str:
        return f"<StepClock after {len(self.moments)} steps>"

    def on_step_end(self, pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        """Record the moment: the pipeline's `callback_on_step_end`."""
        if self._cuda:
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())
        return tensors

    def steps_per_second(self) -> float | None:
        """Return the steps per second without the first, which includes the time of the text encoder."""
        if len(self.moments) < 2:
            return None
        if self._cuda:
            seconds = sum(start.elapsed_time(end) for start, end in pairwise(self.moments)) / 1e3
        else:
            seconds = self.moments[-1] - self.moments[0]
        return (len(self.moments) - 1) / seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
