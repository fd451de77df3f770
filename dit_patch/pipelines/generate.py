"""`dit-patch generate`: load a diffusers pipeline, patch it, generate, and print timings and the report.

Of patches it knows only the flags. Mistakes in the command line are found before any weights are read.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import extras
from ..errors import DitPatchError, UnsupportedModelError, quote
from ..launch import flags
from ..launch.chosen_specs import chosen_specs
from ..outputs import check_file, replacing, write_errors
from ..spec.model import Spec
from ..step_cache import requirements
from . import call_arguments, loading, pictures
from .timed_call import Generated, generate

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
"""The parameter of a pipeline that each of these flags sets."""
_FLAGS = {parameter: flag for flag, parameter in NAMES.items()}
_SET_ELSEWHERE = {
    "generator": "--seed",
    "output_type": "--out",
    "callback_on_step_end": "the timings",
    "return_dict": "--out",
}
"""What sets parameters that `--call` may not."""
_WARM_UP_STEPS = 2


def run_generate(options: argparse.Namespace) -> int:
    """Generate, print timings and the report, and write the file.

    Returns:
        The exit status: 1 where `--compare` finds a difference although no step cache was asked for, else 0.
    """
    choice = _choice(options)
    _check_options(options, choice.patch_report)
    specs = chosen_specs(choice) if choice.is_wanted else {}
    if choice.options["step_cache"] is not None:
        requirements.cache_dit()
    dtype, device = loading.dtype(["bfloat16", *(options.dtype or ())]), loading.device(options.device)
    if options.offload in ("model", "sequential") and device.type == "cpu":
        raise DitPatchError(
            f"--offload: {quote(options.offload)} needs an accelerator, and --device is {quote(device)}"
        )
    call = _call_from(options)
    index = loading.read_index(options.model, options.revision)
    cls = loading.pipeline_class(index)
    if cls is not None:
        _check_call(cls, options, call)
    if choice.is_wanted:
        _check_models(options.model, loading.model_classes(index), specs)

    start = time.perf_counter()
    pipeline = loading.load(options.model, dtype, variant=options.variant, revision=options.revision)
    _check_call(pipeline, options, call)
    _move(pipeline, device, options.offload, prefetch=not choice.options["step_cache"])
    _compile(pipeline, options.compile)
    print(f"{type(pipeline).__name__} on {device}, loaded in {time.perf_counter() - start:.1f} s", flush=True)

    plain = None
    if options.compare:
        _warm_up(pipeline, call, options.seed, device, choice)
        plain = generate(pipeline, call, options.seed, device, "plain")
        _print_timings("plain", plain)
    handle = flags.from_args(pipeline, vars(options) | {"patch_model": choice.patch_model})
    label = "generating" if handle is None else "patched"
    made = generate(pipeline, call, options.seed, device, label)
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
    """Return what is to be patched; `--compare` alone compares with the lossless patches."""
    choice = flags.Choice.from_args(options)
    if not options.compare or choice.is_wanted:
        return choice
    if choice.patch_model == flags.OFF:
        raise DitPatchError(f"--compare: there is nothing to compare with, since --patch-model is {quote(flags.OFF)}")
    return flags.Choice.from_args(vars(options) | {"patch_model": flags.AUTO})


def _check_options(options: argparse.Namespace, report: str | None) -> None:
    """Refuse what is wrong with the command line whatever the pipeline."""
    out = options.out or Path("dit-patch.mp4")
    pictures.find_writer(out)
    extras.require(f"generate to {out.name}", pictures.NEEDED[out.suffix.lower()], "generate")
    if report != "-":
        check_file("--patch-report", report)
    if out.suffix:
        check_file("--out", out)
    else:
        pictures.check_folder_of_frames("--out", out)


def _check_models(model: str, classes: Sequence[type], specs: Mapping[str, Spec]) -> None:
    """Refuse a pipeline of diffusers' own models none of which is to be patched, before its weights are read."""
    if any(name.startswith("transformers.") for name in specs):
        return  # models of these are inside others
    if classes and not any(
        f"{base.__module__}.{base.__qualname__}" in specs for cls in classes for base in cls.__mro__
    ):
        known = ", ".join(sorted({spec.name for spec in specs.values()})) or "none"
        raise UnsupportedModelError(
            f"--model: {quote(model)}: no spec for {', '.join(cls.__name__ for cls in classes)}, so nothing "
            f"would be patched\n    Asked for: {known}."
        )


def _call_from(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the pipeline's call that the command line gives."""
    call = loading.call_defaults(options.model)
    call |= {name: getattr(options, flag) for flag, name in NAMES.items() if getattr(options, flag) is not None}
    if options.image is not None:
        call["image"] = _read_picture(options.image)
    for name, value in call_arguments.parse_pairs("--call", options.call).items():
        if name in _SET_ELSEWHERE:
            raise DitPatchError(f"--call: {quote(name)} is for {_SET_ELSEWHERE[name]} to say")
        if name in NAMES.values() and getattr(options, _FLAGS[name]) is not None:
            raise DitPatchError(f"--call: {quote(name)} is given by --{_FLAGS[name].replace('_', '-')} already")
        call[name] = value
    return call


def _read_picture(path: Path) -> Any:
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
    call_arguments.check_parameters(pipeline, {name: by_name.get(name, "--call") for name in call})
    if "prompt" in call_arguments.parameters(pipeline) and not {"prompt", "prompt_embeds"} & set(call):
        cls = pipeline if isinstance(pipeline, type) else type(pipeline)
        raise DitPatchError(f"--prompt: {cls.__name__} takes one, and none is given")


def _move(pipeline: Any, device: torch.device, offload: str, *, prefetch: bool) -> None:
    """Bring the pipeline to the device, or set up offloading.

    `prefetch`: load the next layer while one runs. Not with a step cache, whose skipped blocks would not load the next.
    """
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
                    use_stream=prefetch and device.type == "cuda",
                )


def _compile(pipeline: Any, what: str) -> None:
    """Compile the models that denoise, or their blocks, in place."""
    if what == "none":
        return
    denoisers = {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, torch.nn.Module) and name.startswith(("transformer", "unet"))
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
    """Generate a few steps with the patches, so that neither of the runs to be compared is the first.

    A patch that is refused is refused here, and not after a whole generation.
    """
    from ..handle import apply

    if "num_inference_steps" in call_arguments.parameters(pipeline) and not {"timesteps", "sigmas"} & set(call):
        call = call | {"num_inference_steps": min(_WARM_UP_STEPS, call.get("num_inference_steps", _WARM_UP_STEPS))}
    handle = apply(pipeline, **choice.options)
    try:
        with warnings.catch_warnings():
            # Two steps are too few for a step cache, or for a hit: the warnings of that are no news.
            warnings.filterwarnings("ignore", message="dit_patch")
            generate(pipeline, call, seed, device, "warm-up")
    finally:
        handle.remove()


def _print_timings(label: str, made: Generated) -> None:
    count, height, width = len(made.videos[0]), *made.videos[0].shape[-2:]
    what = f"{count} frames" if count > 1 else "a picture"
    what = f"{len(made.videos)} times {what}" if len(made.videos) > 1 else what
    steps = f", {made.steps} steps" if made.steps else ""
    rate = f" at {made.steps_per_second:.2f} a second" if made.steps_per_second else ""
    peak = f", at most {made.peak_bytes / 2**30:.2f} GiB on the device" if made.peak_bytes else ""
    print(f"{label}: {what} of {height}x{width} in {made.seconds:.2f} s{steps}{rate}{peak}", flush=True)


def _compare(plain: Generated, patched: Generated, *, lossless: bool) -> bool:
    """Print whether the frames differ, and how long each run took; return whether they differ."""
    any_differs = False
    for one, other in zip(plain.videos, patched.videos, strict=True):
        if one.shape != other.shape:
            raise DitPatchError(f"plain is {tuple(one.shape)}, patched {tuple(other.shape)}")
        differs = pictures.difference(one, other)
        expected = "" if lossless or differs is None else " (as a step cache was asked for)"
        print(f"identical: {pictures.difference_text(differs, len(one))}{expected}")
        any_differs = any_differs or differs is not None
    print(
        f"plain {plain.seconds:.2f} s, patched {patched.seconds:.2f} s: {plain.seconds / patched.seconds:.2f}x as fast "
        "(one run each, one after the other, after a warm-up)"
    )
    return any_differs


def _write(out: Path, videos: list[torch.Tensor], fps: float) -> list[Path]:
    """Write each video, and return the paths; several videos get numbers in their names."""
    write = pictures.find_writer(out)
    paths = [out.with_name(f"{out.stem}-{number}{out.suffix}") for number, _ in enumerate(videos)]
    paths = [out] if len(videos) == 1 else paths
    for path, video in zip(paths, videos):
        with write_errors("--out", path), replacing(path) as draft:
            write(draft, video, fps)
    return paths
