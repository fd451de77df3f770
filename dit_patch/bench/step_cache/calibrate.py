"""Which threshold meets a target: from the residuals of one uncached run, played through cache-dit's own decisions.

A sample of what the first blocks add is kept of each step. With those, any threshold's decisions can be made again in
milliseconds, and its speed predicted from the time that the middle blocks took.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ...errors import StepCacheError, quote
from ...pipelines import sampling
from ...pipelines.quality import check_needed, likeness
from ...step_cache.block_list import CachedBlockList
from ...step_cache.calibration import Calibration, Point
from ...step_cache.config import StepCache
from ...step_cache.model_step_cache import ModelStepCache

SAMPLE = 1 << 16
"""Elements of a residual that are kept of each step; the mean over them is the decision's to about a percent."""
GRID = tuple(round(0.01 * 1.12**step, 4) for step in range(41))  # 0.01 to 0.93


def calibrate(
    pipeline: Any,
    prompts: Sequence[str],
    target: str | None = None,
    *,
    ssim: float | None = None,
    step_cache: StepCache | str | Mapping[str, Any] = "balanced",
    seed: int = 0,
    **call: Any,
) -> StepCache:
    """See `StepCache.calibrate`."""
    from ...handle import apply

    base = StepCache.of(step_cache)
    speed = _speed(target, ssim)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise StepCacheError("calibrate: no prompts")
    check_needed()
    sampling.check_call(pipeline, call)
    runs = []
    uncached = StepCache(fn=base.fn, bn=base.bn, threshold=0.0, warmup=0, min_steps=0, release=True)
    with apply(pipeline, only=(), step_cache=uncached) as handle:
        # What is done once, the proof of parity among it, is not timed.
        sampling.generate(pipeline, prompts[0], seed, {**call, "num_inference_steps": 2}, "calibrate: warm-up")
        for number, prompt in enumerate(prompts, 1):
            recorder = Recorder(handle.step_caches)
            label = f"calibrate: prompt {number} of {len(prompts)}, uncached"
            sample = sampling.generate(pipeline, prompt, seed, call, label)
            if not recorder.steps:
                raise StepCacheError("calibrate: no transformer of this pipeline has run")
            runs.append((prompt, sample, recorder))
    points = {threshold: _predicted(runs, dataclasses.replace(base, threshold=threshold)) for threshold in GRID}
    if speed is not None:
        chosen = next((point for point in points.values() if point.speedup >= speed), None)
        if chosen is None:
            best = max(points.values(), key=lambda point: point.speedup)
            raise StepCacheError(
                f"calibrate: {target} cannot be reached with {base}: at most {best.speedup:.2f}x is predicted, with "
                f"{best.cached} of {best.steps} steps cached.\n"
                "    A smaller warmup, fn or bn, a larger max_continuous, or more steps leave more to skip."
            )
        tried = _tried(pipeline, runs, base, chosen, seed, call)
        points[tried.threshold] = chosen = tried
    else:
        chosen = _nearest(pipeline, runs, base, points, ssim, seed, call)
    asked = target if speed is not None else f"SSIM {ssim:g}"
    shown = tuple(_distinct(points.values()))
    return dataclasses.replace(base, threshold=chosen.threshold, calibration=Calibration(asked, shown, chosen))


class Recorder:
    """What an uncached run leaves: of each block list and pass a sample of every residual, and the middle's seconds."""

    def __init__(self, step_caches: Sequence[ModelStepCache]) -> None:
        self.steps: dict[tuple[CachedBlockList, str], list[torch.Tensor]] = {}
        self.seconds: dict[tuple[CachedBlockList, str], list[float]] = {}
        self._step_caches = {blocks: step_cache for step_cache in step_caches for blocks in step_cache.block_lists}
        self._device = next(step_caches[0].model.parameters()).device
        for blocks in self._step_caches:
            blocks.observer = self

    def middle_begins(self, blocks: CachedBlockList, label: str, residual: torch.Tensor) -> None:
        flat = residual.detach().flatten()
        stride = -(-flat.numel() // SAMPLE)
        self.steps.setdefault((blocks, label), []).append(flat[::stride].clone())
        self._start = self._now()

    def middle_ends(self, blocks: CachedBlockList, label: str) -> None:
        self.seconds.setdefault((blocks, label), []).append(self._now() - self._start)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def decide(self, config: StepCache) -> tuple[int, int, float]:
        """With that threshold: steps cached, steps in all, and the seconds of the middle blocks that are saved."""
        cached = total = 0
        saved = 0.0
        for (blocks, label), residuals in self.steps.items():
            skipped = self._step_caches[blocks].replay(blocks, config, residuals)
            cached, total = cached + len(skipped), total + len(residuals)
            saved += sum(self.seconds[blocks, label][step] for step in skipped)
        return cached, total, saved


def _speed(target: str | None, ssim: float | None) -> float | None:
    if (target is None) == (ssim is None):
        raise StepCacheError('calibrate: give either a speed-up, target="1.5x", or a similarity, ssim=0.95')
    if target is None:
        if isinstance(ssim, bool) or not isinstance(ssim, (int, float)) or not 0 < ssim <= 1:
            raise StepCacheError(f"calibrate: ssim={quote(repr(ssim))}: expected a number above 0, at most 1")
        return None
    try:
        speed = float(str(target).strip().removesuffix("x"))
    except ValueError:
        speed = 0.0
    if speed <= 1:
        raise StepCacheError(f'calibrate: target={quote(repr(target))}: expected a speed-up above 1, such as "1.5x"')
    return speed


def _predicted(runs: Sequence, config: StepCache) -> Point:
    decided = [recorder.decide(config) for _, _, recorder in runs]
    seconds = sum(sample.seconds for _, sample, _ in runs)
    cached, steps = sum(each[0] for each in decided), sum(each[1] for each in decided)
    return Point(config.threshold, cached, steps, seconds / (seconds - sum(each[2] for each in decided)))


def _tried(pipeline: Any, runs: Sequence, base: StepCache, point: Point, seed: int, call: dict[str, Any]) -> Point:
    """The point with what it really does: time against the uncached runs, and the worst prompt's mean SSIM."""
    from ...handle import apply

    config = dataclasses.replace(base, threshold=point.threshold, min_steps=0)
    seconds, worst = 0.0, 1.0
    with apply(pipeline, only=(), step_cache=config) as handle:
        for step_cache in handle.step_caches:
            step_cache.skip_proof()  # by the uncached runs
        for prompt, uncached, _ in runs:
            label = f"calibrate: threshold {point.threshold:g}"
            sample = sampling.generate(pipeline, prompt, seed, call, label)
            seconds += sample.seconds
            worst = min(worst, likeness(uncached.frames, sample.frames).mean_ssim)
    return dataclasses.replace(point, measured=sum(sample.seconds for _, sample, _ in runs) / seconds, ssim=worst)


def _nearest(pipeline, runs, base, points: dict[float, Point], ssim: float, seed: int, call) -> Point:
    """The largest threshold with at least that SSIM, by bisection over those that decide differently."""
    candidates = [point for point in _distinct(points.values()) if point.cached]
    found, low, high = None, 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        tried = _tried(pipeline, runs, base, candidates[middle], seed, call)
        points[tried.threshold] = tried
        if tried.ssim >= ssim:
            found, low = tried, middle + 1
        else:
            high = middle
    if found is None:
        raise StepCacheError(
            f"calibrate: SSIM {ssim:g} cannot be reached with {base}: {_least(points)}.\n"
            "    A larger warmup or fn, a smaller max_continuous, or a calibrator keep nearer to the uncached frames."
        )
    return found


def _least(points: Mapping[float, Point]) -> str:
    """What the smallest threshold that was tried came to."""
    tried = [point for point in points.values() if point.ssim is not None]
    if not tried:
        return "nothing would be cached at any threshold"
    least = min(tried, key=lambda point: point.threshold)
    return (
        f"at the threshold of {least.threshold:g} it is {least.ssim:.4f} with {least.cached} of {least.steps} "
        "steps cached"
    )


def _distinct(points: Collection[Point]) -> list[Point]:
    """Of the points that cache the same number of steps only the first, and those that were tried."""
    kept: dict[int, Point] = {}
    for point in sorted(points, key=lambda point: point.threshold):
        kept.setdefault(point.cached, point)
    tried = [point for point in points if point.measured is not None]
    every = {point.threshold: point for point in (*kept.values(), *tried)}
    return [every[threshold] for threshold in sorted(every)]
