"""`dit-patch bench step-cache`: a baseline and cached generations with the same seeds, side by side, with controls.

The controls say what the figures are worth. The baseline against itself: how far two runs of the same are apart. Fewer
steps, for as many block calls: what the same speed costs without any cache. cache-dit driven directly: what we add.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import StepCacheError
from ...extras import version
from ...handle import apply
from ...outputs import replacing
from ...pipelines import sampling
from ...pipelines.quality import Likeness, likeness, lpips_is_at_hand
from ...spec.model import Spec
from ...step_cache import requirements
from ...step_cache.config import StepCache
from ...step_cache.model_step_cache import ModelStepCache
from ...upstream import cache_dit_internals
from ..surroundings import environment

BASELINE, AGAIN = "baseline", "baseline again"


@dataclass(frozen=True)
class Variant:
    """One way to generate: cached by `config`, by us or by cache-dit alone (`direct`); or with fewer `steps`."""

    name: str
    config: StepCache | None = None
    steps: int | None = None
    direct: bool = False


@dataclass
class Run:
    """What one variant made of one prompt: `frames` of the first repeat, times in seconds of all.

    `cached` are the numbers of the skipped steps by block list and pass, `skipped` the share of block calls left out.
    """

    variant: Variant
    prompt: str
    seed: int
    frames: torch.Tensor
    calls: int
    cached: Mapping[str, tuple[int, ...]]
    skipped: float
    notes: tuple[str, ...] = ()
    repeats_itself: bool = True
    seconds: list[float] = field(default_factory=list)
    dit_seconds: list[float] = field(default_factory=list)
    likeness: Likeness | None = None

    @property
    def spread(self) -> float:
        """The interquartile range of the seconds."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low


@dataclass(frozen=True)
class Generation:
    """One generation that was timed; the order of the fields is that of the columns in `generations.csv`."""

    variant: str
    prompt: str
    seed: int
    seconds: float
    dit_seconds: float
    calls: int


@dataclass(frozen=True)
class Summary:
    """One variant over all prompts. Times are medians over the prompts, each the median of its repeats; `spread` is the
    widest interquartile range of one prompt's repeats. Likeness is to the baseline; `equal` counts equal prompts."""

    name: str
    seconds: float
    spread: float
    dit_seconds: float
    speedup: float
    dit_speedup: float
    calls: int
    skipped: float
    ssim: float
    worst_prompt_ssim: float
    worst_frame_ssim: float
    psnr: float
    worst_prompt_psnr: float
    lpips: float | None
    equal: int


@dataclass(frozen=True)
class Result:
    """All of a comparison. `failures` is empty where it may be believed; `remarks` is what there is to say besides."""

    runs: list[Run]
    summaries: list[Summary]
    failures: list[str]
    remarks: list[str]
    about: Mapping[str, str]


def compare(
    pipeline: Any,
    prompts: Sequence[str],
    configs: Mapping[str, StepCache],
    call: dict[str, Any],
    *,
    steps: int,
    seed: int = 0,
    repeats: int = 3,
    direct: bool = False,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[Generation], None] = lambda generation: None,
) -> Result:
    """Generate every prompt with every variant, in turns, and compare the frames with the baseline's.

    Args:
        pipeline: a diffusers pipeline, not patched.
        configs: the step caches to try, by name.
        call: what to call the pipeline with besides prompt, seed and steps.
        steps: denoising steps of the baseline.
        seed: of the first prompt; the next one has the next.
        repeats: how often each generation is timed, after a warm-up of each variant.
        direct: also drive cache-dit itself, on copies of the transformers.
        say: is told of each generation.
        keep: gets each generation as soon as it is timed.

    Raises:
        StepCacheError: the pipeline does not take what it is called with, or a cache cannot be switched on.
    """
    if not prompts or not configs:
        raise StepCacheError(f"nothing to compare: no {'step caches' if prompts else 'prompts'}")
    sampling.check_call(pipeline, call)
    comparison = _Comparison(pipeline, list(prompts), call, steps, seed, say, keep)
    variants = [Variant(BASELINE), Variant(AGAIN)]
    for name, config in configs.items():  # next to each other, for their times are compared pairwise
        variants += [Variant(name, config), *[Variant(_alone(name), config, direct=True)] * direct]
    comparison.warm_up(variants)
    fewer = comparison.fewer_steps()
    comparison.warm_up(fewer)
    comparison.measure([*variants, *fewer], repeats)
    failures, remarks = comparison.judge(configs, direct)
    about = {
        **environment(str(comparison.device)),
        "cache-dit": version("cache-dit") or "none",
        "scikit-image": version("scikit-image") or "none",
        "pipeline": type(pipeline).__name__,
        "call": " ".join(f"{name}={value}" for name, value in call.items()),
        "steps": str(steps),
        "first seed": str(seed),
        "repeats": str(repeats),
        "LPIPS": "measured" if lpips_is_at_hand() else "not measured: lpips or its backbone's weights are not at hand",
    }
    summaries = [comparison.summary(variant.name) for variant in (*variants, *fewer)]
    return Result(list(comparison.runs.values()), summaries, failures, remarks, about)


def thresholds(values: Sequence[float], base: StepCache) -> dict[str, StepCache]:
    """The same step cache at several thresholds, by name."""
    return {f"R{value:g}": dataclasses.replace(base, threshold=value) for value in values}


def write_csv(folder: Path, result: Result) -> list[Path]:
    """`runs.csv`, a row per variant and prompt with the environment, and `frames.csv`, a row per frame; their paths."""
    head = "variant prompt seed calls seconds spread dit_seconds skipped cached ssim worst_frame_ssim psnr lpips equal"
    runs, frames = folder / "runs.csv", folder / "frames.csv"
    with replacing(runs) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*head.split(), *result.about])
        for run in result.runs:
            like = run.likeness
            lpips = "" if like.lpips is None else statistics.fmean(like.lpips)
            cached = "; ".join(f"{where}: {' '.join(map(str, steps))}" for where, steps in run.cached.items())
            writer.writerow(
                [run.variant.name, run.prompt, run.seed, run.calls, statistics.median(run.seconds), run.spread]
                + [statistics.median(run.dit_seconds), run.skipped, cached]
                + [like.mean_ssim, min(like.ssim), like.mean_psnr, lpips, like.equal, *result.about.values()]
            )
    with replacing(frames) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "prompt", "seed", "frame", "ssim", "psnr"])
        for run in result.runs:
            for frame, values in enumerate(zip(run.likeness.ssim, run.likeness.psnr)):
                writer.writerow([run.variant.name, run.prompt, run.seed, frame, *values])
    return [runs, frames]


class _Comparison:
    """The generations of one `compare`, and what they come to."""

    def __init__(self, pipeline, prompts: list[str], call: dict, steps: int, seed: int, say, keep) -> None:
        self.pipeline, self.prompts, self.call = pipeline, prompts, call
        self.steps, self.seed, self.say, self.keep = steps, seed, say, keep
        self.device = sampling.device_of(pipeline)
        self.runs: dict[tuple[str, int], Run] = {}
        self._alone: dict[str, Any] = {}
        self._passes = 1
        self._skipped: dict[str, float] = {}

    def warm_up(self, variants: Sequence[Variant]) -> None:
        """What is done once is not timed: allocations, lazy imports, the proof of parity."""
        for variant in variants:
            self._generate(variant, 0, warm_up=True)

    def fewer_steps(self) -> list[Variant]:
        """For each step cache a baseline with as many steps as have the block calls that it has left."""
        counts = {max(1, round(self.steps * (1 - skipped))) for skipped in self._skipped.values() if skipped}
        return [Variant(f"{count} steps", steps=count) for count in sorted(counts, reverse=True)]

    def measure(self, variants: Sequence[Variant], repeats: int) -> None:
        """Each variant once before any has its second turn, so that whatever else the machine does falls on all."""
        for number, prompt in enumerate(self.prompts):
            for repeat in range(repeats):
                for variant in variants:
                    seconds = self._generate(variant, number)
                    self.say(f"{variant.name}, {prompt!r}, {repeat + 1} of {repeats}: {seconds:.2f} s")

    def judge(self, configs: Mapping[str, StepCache], direct: bool) -> tuple[list[str], list[str]]:
        """Compare all frames with the baseline's; what makes the comparison void, and what there is to say of it."""
        failures, remarks = [], []
        for (name, number), run in self.runs.items():
            where = f"{name}, {run.prompt!r}"
            try:
                run.likeness = likeness(self.runs[BASELINE, number].frames, run.frames)
            except StepCacheError as error:
                raise StepCacheError(f"{where}: {error}") from error
            if not run.repeats_itself:
                remarks.append(f"{where}: another repeat with the same seed gave other frames")
            if run.variant.config is not None and not any(run.cached.values()):
                failures.append(f"{where}: {'; '.join(run.notes) or 'nothing was cached'}")
        if not all(self.runs[AGAIN, number].likeness.equal for number in range(len(self.prompts))):
            remarks.append(
                "two runs of the baseline differ, so no likeness can be expected above that of `baseline again`"
            )
        for name in configs if direct else ():
            ours, theirs = (
                [self.runs[each, number] for number in range(len(self.prompts))] for each in (name, _alone(name))
            )
            skips = all(sorted(a.cached.values()) == sorted(b.cached.values()) for a, b in zip(ours, theirs))
            bits = all(torch.equal(a.frames, b.frames) for a, b in zip(ours, theirs))
            pairs = ((a.dit_seconds, b.dit_seconds) for a, b in zip(ours, theirs))
            over = statistics.median(one / other - 1 for pair in pairs for one, other in zip(*pair))
            remarks.append(
                f"{name} beside cache-dit alone: {'the same' if skips else 'OTHER'} skips, "
                f"{'the same' if bits else 'OTHER'} bits, {over:+.1%} time in the transformers (median of pairs)"
            )
        return failures, remarks

    def summary(self, name: str) -> Summary:
        runs = [self.runs[name, number] for number in range(len(self.prompts))]
        alike = [run.likeness for run in runs]
        lpips = [statistics.fmean(each.lpips) for each in alike if each.lpips is not None]
        return Summary(
            name=name,
            seconds=self._seconds(name),
            spread=max(run.spread for run in runs),
            dit_seconds=self._seconds(name, dit=True),
            speedup=self._seconds(BASELINE) / self._seconds(name),
            dit_speedup=self._seconds(BASELINE, dit=True) / self._seconds(name, dit=True),
            calls=runs[0].calls,
            skipped=statistics.fmean(run.skipped for run in runs),
            ssim=statistics.fmean(each.mean_ssim for each in alike),
            worst_prompt_ssim=min(each.mean_ssim for each in alike),
            worst_frame_ssim=min(min(each.ssim) for each in alike),
            psnr=statistics.fmean(each.mean_psnr for each in alike),
            worst_prompt_psnr=min(each.mean_psnr for each in alike),
            lpips=statistics.fmean(lpips) if lpips else None,
            equal=sum(each.equal for each in alike),
        )

    def _seconds(self, name: str, *, dit: bool = False) -> float:
        runs = (self.runs[name, number] for number in range(len(self.prompts)))
        return statistics.median(statistics.median(run.dit_seconds if dit else run.seconds) for run in runs)

    def _generate(self, variant: Variant, number: int, *, warm_up: bool = False) -> float:
        prompt, seed = self.prompts[number], self.seed + number
        call = {**self.call, "num_inference_steps": variant.steps or self.steps}
        with self._switched_on(variant, proved=not warm_up) as (pipeline, read), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "dit_patch: step cache of")  # what it says is among the failures
            sample = sampling.generate(pipeline, prompt, seed, call)
            cached, skipped, notes = read()
        if variant.name == BASELINE:
            self._passes = max(1, round(sample.calls / self.steps))
        if warm_up:
            self._skipped[variant.name] = skipped
            return sample.seconds
        self.keep(Generation(variant.name, prompt, seed, sample.seconds, sample.dit_seconds, sample.calls))
        run = self.runs.get((variant.name, number))
        if run is None:
            run = Run(variant, prompt, seed, sample.frames, sample.calls, cached, skipped, notes)
            self.runs[variant.name, number] = run
        run.repeats_itself &= torch.equal(run.frames, sample.frames)
        run.seconds.append(sample.seconds)
        run.dit_seconds.append(sample.dit_seconds)
        return sample.seconds

    @contextmanager
    def _switched_on(self, variant: Variant, *, proved: bool) -> Iterator[tuple[Any, Callable]]:
        """The pipeline as the variant has it, and a function that says what was cached."""
        if variant.config is None:
            yield self.pipeline, lambda: ({}, 0.0, ())
        elif variant.direct:
            if variant.name not in self._alone:
                self._alone[variant.name] = _cache_dit_alone(self.pipeline, variant.config, self._passes)
            pipeline, refresh, read = self._alone[variant.name]
            refresh()
            yield pipeline, read
        else:
            with apply(self.pipeline, only=(), step_cache=dataclasses.replace(variant.config, min_steps=0)) as handle:
                for step_cache in handle.step_caches if proved else ():
                    step_cache.skip_proof()
                yield self.pipeline, lambda: _read(handle)


def _read(handle: Any) -> tuple[dict[str, tuple[int, ...]], float, tuple[str, ...]]:
    rows = handle.step_stats()
    every = sum(row.steps * row.count for row in rows)
    left_out = sum(row.skipped * row.steps * row.count for row in rows)
    notes = tuple(dict.fromkeys(row.notes[0] for row in rows if row.notes))
    cached = {f"{row.model} {row.blocks} {row.label}": row.cached for row in rows}
    return cached, left_out / every if every else 0.0, notes


def _alone(name: str) -> str:
    return f"{name}, cache-dit alone"


def enable_cache_dit(
    model: torch.nn.Module, spec: Spec, decisions: Sequence[Any], calibrator: Any, *, cfg: bool
) -> None:
    """cache-dit's own switch on a model: a `DBCacheConfig` for each block list, and a calibrator's configuration."""
    caching = requirements.cache_dit()
    for each in decisions:
        each.enable_separate_cfg = cfg
    adapter = caching.BlockAdapter(
        pipe=type("Alone", (caching.FakeDiffusionPipeline,), {})(),
        transformer=model,
        blocks=[getattr(model, blocks.at) for blocks in spec.blocks],
        blocks_name=[blocks.at for blocks in spec.blocks],
        forward_pattern=[caching.ForwardPattern[f"Pattern_{blocks.pattern}"] for blocks in spec.blocks],
        check_forward_pattern=False,
        has_separate_cfg=cfg,
    )
    modifiers = [caching.ParamsModifier(cache_config=each) for each in decisions]
    caching.enable_cache(adapter, cache_config=decisions[0], calibrator_config=calibrator, params_modifiers=[modifiers])


def _cache_dit_alone(pipeline: Any, config: StepCache, passes: int) -> tuple[Any, Callable, Callable]:
    """cache-dit's own switch on copies of the transformers, for it does not leave a model as it found it."""
    caching = requirements.cache_dit()
    copied = copy.copy(pipeline)
    models = []
    for name, (model, spec) in sampling.transformers(pipeline).items():
        # Its numbers for cache-dit, without any of our layers.
        step_cache = ModelStepCache(name, model, spec, pipeline, config)
        model = copy.deepcopy(model)
        setattr(copied, name, model)
        enable_cache_dit(model, spec, step_cache.block_configs(), step_cache.cache_dit.calibrator(), cfg=passes > 1)
        models.append(model)

    def refresh() -> None:
        for model in models:
            caching.refresh_context(model)

    def read() -> tuple[dict[str, tuple[int, ...]], float, tuple[str, ...]]:
        cached = {}
        for model in models:
            for name, cond, uncond in cache_dit_internals.cached_steps(model):
                cached[f"{name} cond"] = cond
                if passes > 1:
                    cached[f"{name} uncond"] = uncond
        return cached, 0.0, ()

    return copied, refresh, read
