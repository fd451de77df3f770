"""`dit-patch generate`: a diffusers pipeline from disk or the hub, its frames, how long they took, and the report.

Knows of patches only the flags. Whatever can be found wrong with the command line is, before any weights are read.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .. import extras
from ..errors import DitPatchError, quote
from ..launch import flags
from . import call_arguments, loading, pictures

NAMES = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "image": "image",
    "height": "height",
    "width": "width",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}
"""The flags that are parameters of pipelines, and what those call them."""
_OURS = {"generator": "--seed", "output_type": "--out", "callback_on_step_end": "the timings", "return_dict": "--out"}
_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Generated:
    """What one call of the pipeline made, and how long it took.

    `rate` is denoising steps per second after the first of `steps`, where the pipeline says when one ends; `peak` is
    the most bytes that were allocated on a CUDA device.
    """

    videos: list[torch.Tensor]
    seconds: float
    steps: int
    rate: float | None
    peak: int | None


def run(options: argparse.Namespace) -> int:
    """Generate, print timings and report, write the file; 1 where `--compare` finds a difference that should not be."""
    choice = _choice(options)
    _check(options)
    dtype, device = loading.dtype(["bfloat16", *(options.dtype or ())]), loading.device(options.device)
    if options.offload in ("model", "sequential") and device.type == "cpu":
        raise DitPatchError(
            f"--offload: {quote(options.offload)} needs an accelerator, and --device is {quote(device)}"
        )
    call = _call(options)
    cls = loading.pipeline_class(options.model, options.revision)
    if cls is not None:
        _check_call(cls, options, call)

    start = time.perf_counter()
    pipeline = loading.load(options.model, dtype, variant=options.variant, revision=options.revision)
    _check_call(pipeline, options, call)
    _place(pipeline, device, options.offload, prefetch=not choice.options["step_cache"])
    _compile(pipeline, options.compile)
    print(f"{type(pipeline).__name__} on {device}, loaded in {time.perf_counter() - start:.1f} s", flush=True)

    plain = None
    if options.compare:
        _warm_up(pipeline, call, options.seed, device, choice)
        plain = _generate(pipeline, call, options.seed, device, "plain")
        _print_timings("plain", plain)
    handle = flags.from_args(pipeline, vars(options) | {"patch_model": choice.patch_model})
    label = "generating" if handle is None else "patched"
    made = _generate(pipeline, call, options.seed, device, label)
    _print_timings("generated" if handle is None else "patched", made)
    print(f"\n{handle}\n" if handle is not None else "nothing patched; --patch-model does, losslessly")

    out = options.out or Path("dit-patch.mp4" if any(len(video) > 1 for video in made.videos) else "dit-patch.png")
    status, files = 0, _write(out, made.videos, options.fps)
    if plain is not None:
        differs = _compare(plain, made, lossless=not choice.options["step_cache"])
        if differs:
            files += _write(out.with_name(f"{out.stem}-plain{out.suffix}"), plain.videos, options.fps)
        status = 1 if differs and not choice.options["step_cache"] else 0
    print(*files, sep="\n")
    return status


def _choice(options: argparse.Namespace) -> flags.Choice:
    """What is to be patched; `--compare` alone compares with the lossless patches."""
    choice = flags.Choice.from_args(options)
    if not options.compare or choice.is_wanted:
        return choice
    if choice.patch_model == flags.OFF:
        raise DitPatchError(f"--compare: there is nothing to compare with, since --patch-model is {quote(flags.OFF)}")
    return flags.Choice.from_args(vars(options) | {"patch_model": flags.AUTO})


def _check(options: argparse.Namespace) -> None:
    """What is wrong with the command line whatever the pipeline."""
    for name in ("height", "width", "frames", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise DitPatchError(f"--{name}: {quote(value)} is less than 1")
    if not options.fps > 0:
        raise DitPatchError(f"--fps: {quote(options.fps)} is not above 0")
    out = options.out or Path("dit-patch.mp4")
    pictures.writer(out)
    extras.require(f"generate to {out.name}", pictures.NEEDED[out.suffix.lower()], "generate")
    if out.suffix and out.is_dir():
        raise DitPatchError(f"--out: {quote(out)} is a folder")
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)


def _call(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says the pipeline is to be called with."""
    given = {name: getattr(options, flag) for flag, name in NAMES.items() if getattr(options, flag) is not None}
    if options.image is not None:
        given["image"] = _picture(options.image)
    for name, value in call_arguments.pairs("--call", options.call).items():
        if name in _OURS:
            raise DitPatchError(f"--call: {quote(name)} is for {_OURS[name]} to say")
        if name in given:
            flag = next(flag for flag, own in NAMES.items() if own == name).replace("_", "-")
            raise DitPatchError(f"--call: {quote(name)} is given by --{flag} already")
        given[name] = value
    return given


def _picture(path: Path) -> Any:
    extras.require("--image", {"PIL": "pillow"}, "generate")
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise DitPatchError(f"--image: {quote(path)}: {error.strerror or error}") from error


def _check_call(pipeline: Any, options: argparse.Namespace, call: Mapping[str, Any]) -> None:
    """Refuse what this pipeline does not take, and ask for a prompt where it takes one."""
    by_name = {
        name: f"--{flag.replace('_', '-')}" for flag, name in NAMES.items() if getattr(options, flag) is not None
    }
    call_arguments.check(pipeline, {name: by_name.get(name, "--call") for name in call})
    known = call_arguments.parameters(pipeline)
    if "prompt" in known and not {"prompt", "prompt_embeds"} & set(call):
        cls = pipeline if isinstance(pipeline, type) else type(pipeline)
        raise DitPatchError(f"--prompt: {cls.__name__} takes one, and none is given")


def _place(pipeline: Any, device: torch.device, offload: str, *, prefetch: bool) -> None:
    if offload == "none":
        pipeline.to(device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        from diffusers.hooks import apply_group_offloading

        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                apply_group_offloading(
                    component,
                    onload_device=device,
                    offload_type="leaf_level",
                    use_stream=prefetch
                    and device.type == "cuda",  # a step cache skips blocks that would bring the next
                )


def _compile(pipeline: Any, what: str) -> None:
    """Compile the models that denoise, or their blocks, in place."""
    if what == "none":
        return
    denoisers = {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module) and name.startswith(("transformer", "unet"))
    }
    if not denoisers:
        raise DitPatchError(f"--compile: {type(pipeline).__name__} has neither a transformer nor a unet")
    for name, model in denoisers.items():
        if what == "model":
            model.compile()
            continue
        try:
            model.compile_repeated_blocks()
        except (AttributeError, ValueError):
            print(
                f"--compile blocks: {name} ({type(model).__name__}) does not say which of its blocks repeat, so it "
                "runs uncompiled; --compile model compiles the whole, in which nothing can be cached"
            )


def _warm_up(pipeline: Any, call: dict[str, Any], seed: int, device: torch.device, choice: flags.Choice) -> None:
    """A short generation with the patches, so that neither run to be compared pays for what comes first.

    A patch that cannot be had is told here, and not after a whole generation.
    """
    from ..handle import apply

    if "num_inference_steps" in call_arguments.parameters(pipeline) and not {"timesteps", "sigmas"} & set(call):
        call = call | {"num_inference_steps": min(_WARM_UP_STEPS, call.get("num_inference_steps", _WARM_UP_STEPS))}
    handle = apply(pipeline, **choice.options)
    try:
        with warnings.catch_warnings():
            # That two steps are too few for a step cache, or for a hit, is no news.
            warnings.filterwarnings("ignore", message="dit_patch")
            _generate(pipeline, call, seed, device, "warm-up")
    finally:
        handle.remove()


def _generate(pipeline: Any, call: dict[str, Any], seed: int, device: torch.device, label: str) -> Generated:
    pipeline.set_progress_bar_config(desc=label)
    known = call_arguments.parameters(pipeline)
    clock = _Clock(device)
    asked = {"output_type": "pt", "generator": torch.Generator().manual_seed(seed)}
    if "callback_on_step_end" in known:
        asked["callback_on_step_end"] = clock.step_ended
    for name in ("output_type", "generator"):
        if name not in known:
            del asked[name]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _wait(device)
    start = time.perf_counter()
    with _explained(pipeline, call, clock):
        result = pipeline(**call, **asked)
    _wait(device)
    seconds = time.perf_counter() - start
    if getattr(result, "audio", None) is not None:
        print("it has made sound, too, which is not written")
    return Generated(
        videos=pictures.videos(result),
        seconds=seconds,
        steps=len(clock.moments),
        rate=clock.rate(),
        peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


@contextmanager
def _explained(pipeline: Any, call: Mapping[str, Any], clock: _Clock) -> Iterator[None]:
    """What a pipeline refuses before its first step ends is for the command line to change."""
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
        said = ", ".join(f"{name}={quote(value)}" for name, value in call.items())
        raise DitPatchError(
            f"{type(pipeline).__name__}: {type(error).__name__}: {error or 'it says no more'}\n    Called with: {said}."
        ) from error


class _Clock:
    """When each denoising step ends; on CUDA when the device gets there, which is not waited for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.moments: list[Any] = []

    def step_ended(self, pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if self._cuda:
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())
        return tensors

    def rate(self) -> float | None:
        """Steps per second after the first, which is left out as it has the text encoder's time in it."""
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


def _print_timings(label: str, made: Generated) -> None:
    count, height, width = len(made.videos[0]), *made.videos[0].shape[-2:]
    what = f"{count} frames" if count > 1 else "a picture"
    what = f"{len(made.videos)} times {what}" if len(made.videos) > 1 else what
    steps = f", {made.steps} steps" if made.steps else ""
    rate = f" at {made.rate:.2f} a second" if made.rate else ""
    peak = f", at most {made.peak / 2**30:.2f} GiB on the device" if made.peak else ""
    print(f"{label}: {what} of {height}x{width} in {made.seconds:.2f} s{steps}{rate}{peak}", flush=True)


def _compare(plain: Generated, patched: Generated, *, lossless: bool) -> bool:
    """Print whether the frames differ, and how long each run took; whether they do."""
    found = False
    for one, other in zip(plain.videos, patched.videos, strict=True):
        if one.shape != other.shape:
            raise DitPatchError(f"plain is {tuple(one.shape)}, patched {tuple(other.shape)}")
        differs = pictures.difference(one, other)
        expected = "" if lossless or differs is None else " (as a step cache was asked for)"
        print(f"identical: {pictures.verdict(differs, len(one))}{expected}")
        found = found or differs is not None
    print(
        f"plain {plain.seconds:.2f} s, patched {patched.seconds:.2f} s: {plain.seconds / patched.seconds:.2f}x as fast "
        "(one run each, one after the other, after a warm-up)"
    )
    return found


def _write(out: Path, videos: list[torch.Tensor], fps: float) -> list[Path]:
    """Write each video; several get a number in their names."""
    write = pictures.writer(out)
    paths = [out.with_name(f"{out.stem}-{number}{out.suffix}") for number, _ in enumerate(videos)]
    paths = [out] if len(videos) == 1 else paths
    for path, video in zip(paths, videos):
        with _writing(path):
            write(path, video, fps)
    return paths


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DitPatchError(f"--out: {quote(path)} cannot be written: {error.strerror or error}") from error
