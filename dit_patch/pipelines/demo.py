"""`dit-patch demo`: generate with small pipelines, without patches and with them, and compare the frames bit by bit.

Two real pipelines with random weights show the exact caches. A small trained one then shows what a step cache gains and
costs. The demo needs no network and no GPU, and of patches it knows only `apply` and `remove`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import extras
from ..outputs import check_folder, replacing, write_errors
from ..upstream.verbosity import quiet_upstream
from . import tiny_pipelines
from .pictures import contact_sheet, difference, difference_text, labelled, write_gif, write_mp4

if TYPE_CHECKING:
    import torch

PROMPT = "a red balloon drifts over a quiet harbour at dawn"
NEGATIVE_PROMPT = "blurred details, static, low quality"
SIZE = (13, 160, 256)
SHAPES_PROMPT, STEP_CACHE_STEPS = "a green triangle moving up", 30
NEEDED = {
    "diffusers": "diffusers",
    "transformers": "transformers",
    "ftfy": "ftfy",
    "imageio": "imageio",
    "imageio_ffmpeg": "imageio-ffmpeg",
    "PIL": "pillow",
}
"""The modules that the demo imports, and the packages that bring them."""


@dataclass(frozen=True)
class Scene:
    """One pipeline of the demo: the name of its files, the function that builds it from a seed, its call arguments."""

    name: str
    build: Callable[[int], Any]
    guidance: dict[str, float]


SCENES = (
    Scene("wan", tiny_pipelines.wan_pipeline, {"guidance_scale": 5.0}),
    Scene("hunyuan_video", tiny_pipelines.hunyuan_video_pipeline, {"guidance_scale": 6.0, "true_cfg_scale": 4.0}),
)


@dataclass(frozen=True)
class Generated:
    """A video (frames, 3, height, width) in [0, 1], the seconds of the call, and those of each step."""

    video: torch.Tensor
    seconds: float
    steps: list[float]


def run_demo(
    out: Path,
    *,
    steps: int = 8,
    seed: int = 0,
    size: tuple[int, int, int] = SIZE,
    apply: Callable[[Any], Any] | None = None,
) -> int:
    """Generate with each pipeline plain, patched, and plain again; print the comparison and write pictures and videos.

    Args:
        out: the directory for a picture (.png) and a video (.mp4) per pipeline; made if missing.
        steps: denoising steps; each runs the transformer with the prompt and with the negative prompt.
        seed: of the weights and of the noise.
        size: frames, height and width in pixels; frames are a multiple of 4 plus 1, height and width multiples of 16.
        apply: patches a pipeline and returns the handle; `dit_patch.apply` by default.

    Returns:
        The exit code: 0 if every frame of every pipeline is the same with patches and after their removal, else 1.
    """
    extras.require("the demo", NEEDED, "demo")
    if apply is None:
        from .. import apply
    out = Path(out)
    check_folder("--out", out)
    with quiet_upstream():
        played = [_play(scene, out, steps, seed, size, apply) for scene in SCENES]
        if find_spec("cache_dit") is None or find_spec("skimage") is None:
            print("no step cache shown, since cache-dit or scikit-image is missing: pip install 'dit-patch[demo]'\n")
        else:
            played.append(_play_step_cache(out, seed, apply))
    for _, paths in played:
        print(*paths, sep="\n")
    return 0 if all(identical for identical, _ in played) else 1


def _play(scene: Scene, out: Path, steps: int, seed: int, size: tuple[int, int, int], apply) -> tuple[bool, list[Path]]:
    """Generate with and without patches, and print the comparison; return whether all was identical, and the files."""
    pipeline = scene.build(seed)
    frames, height, width = size
    print(f"{scene.name}: {type(pipeline).__name__}, random weights, {frames} frames of {height}x{width},", end=" ")
    print(f"{steps} steps with and without the prompt", flush=True)
    _generate(scene, "warm-up", pipeline, 1, seed, size)
    plain = _generate(scene, "plain", pipeline, steps, seed, size)
    handle = apply(pipeline)
    try:
        patched = _generate(scene, "patched", pipeline, steps, seed, size)
        report = str(handle)
    finally:
        handle.remove()
    removed = _generate(scene, "removed", pipeline, steps, seed, size)

    differs, remains = difference(plain.video, patched.video), difference(plain.video, removed.video)
    print(f"\n{report}\n")
    print(f"identical: {difference_text(differs, frames)}")
    print(f"removed:   {difference_text(remains, frames, same='identical again')}\n")
    print(_times_table(plain, patched, removed), flush=True)

    picture = out / f"{scene.name}.png"
    _save_picture(picture, {"plain": plain.video, "patched": patched.video})
    video = _write_video(out / f"{scene.name}.mp4", plain.video, patched.video)
    return differs is None and remains is None, [picture, video]


def _play_step_cache(out: Path, seed: int, apply) -> tuple[bool, list[Path]]:
    """Generate plain, patched and step-cached with a trained model; return whether patches change nothing, files."""
    from . import sampling, trained_example
    from .quality import likeness

    pipeline = trained_example.pipeline()
    pipeline.set_progress_bar_config(ncols=80)
    print(f"step cache: {type(pipeline).__name__}, small but trained, {STEP_CACHE_STEPS} steps, {SHAPES_PROMPT!r}")

    def generate(label: str) -> sampling.Sample:
        call = {**trained_example.CALL, "num_inference_steps": STEP_CACHE_STEPS}
        return sampling.generate(pipeline, SHAPES_PROMPT, seed, call, f"step cache {label:7}")

    generate("warm-up")
    plain = generate("plain")
    handle = apply(pipeline)
    try:
        patched = generate("patched")
    finally:
        handle.remove()
    handle = apply(pipeline, step_cache="performance")
    try:
        generate("warm-up")
        cached = generate("cached")
        report = str(handle).partition("step cache")
    finally:
        handle.remove()
    differs, like = difference(plain.frames, patched.frames), likeness(plain.frames, cached.frames)
    print(f"\n{report[1]}{report[2]}\n")
    print(f"identical with the exact caches: {difference_text(differs, len(plain.frames))}")
    print(
        f"with the step cache: {plain.seconds / cached.seconds:.2f}x as fast in this one run, "
        f"SSIM {like.mean_ssim:.3f} (worst frame {min(like.ssim):.3f}), PSNR {like.mean_psnr:.1f} dB\n"
    )
    picture = out / "step_cache.png"
    rows = {"plain": plain.frames, "patched": patched.frames, "step cache": cached.frames}
    _save_picture(
        picture, {label: frames.repeat_interleave(4, -1).repeat_interleave(4, -2) for label, frames in rows.items()}
    )
    return differs is None, [picture]


def _generate(scene: Scene, label: str, pipeline, steps: int, seed: int, size: tuple[int, int, int]) -> Generated:
    import torch

    frames, height, width = size
    pipeline.set_progress_bar_config(desc=f"{scene.name} {label:7}", ncols=80)
    moments = [time.perf_counter()]

    def note_moment(pipeline, step, timestep, tensors):
        moments.append(time.perf_counter())
        return tensors

    video = pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE_PROMPT,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=note_moment,
        output_type="pt",
        **scene.guidance,
    ).frames[0]
    seconds = time.perf_counter() - moments[0]
    return Generated(video, seconds, [end - start for start, end in pairwise(moments)])


def _times_table(plain: Generated, patched: Generated, removed: Generated) -> str:
    """Return the times as a table; both plain runs are in it, to show how much the machine itself varies."""
    runs = (plain, patched, removed)
    rows = [("generation", [run.seconds for run in runs]), ("fastest step", [min(run.steps) for run in runs])]
    lines = [f"{'seconds':12}{'plain':>9}{'patched':>9}{'removed':>9}"]
    for label, (before, during, after) in rows:
        lines.append(f"{label:12}{before:9.3f}{during:9.3f}{after:9.3f}")
    return "\n".join([*lines, "(one run each of a small model on this machine's CPU, not a benchmark)\n"])


def _write_video(path: Path, plain: torch.Tensor, patched: torch.Tensor) -> Path:
    """Write plain on the left, patched on the right, and return the path; a GIF if ffmpeg does not run."""
    import torch

    frames = torch.cat([labelled("plain", plain), labelled("patched", patched)], dim=-1)
    try:
        with replacing(path) as draft:
            write_mp4(draft, frames)
    except (ImportError, OSError, RuntimeError) as error:
        path = path.with_suffix(".gif")
        print(f"no mp4, since ffmpeg does not run here ({type(error).__name__}): {path.name} instead", file=sys.stderr)
        with write_errors("--out", path), replacing(path) as draft:
            write_gif(draft, frames)
    return path


def _save_picture(path: Path, rows: dict[str, torch.Tensor]) -> None:
    """Write a contact sheet with a row for each labelled video."""
    with write_errors("--out", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            contact_sheet(rows).save(draft)
