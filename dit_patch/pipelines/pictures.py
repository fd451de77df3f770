"""Videos and pictures as tensors (frames, 3, height, width) in [0, 1]: compare two, and write them to files.

This module knows nothing of patches, and of pipelines only what they return. It imports no torch before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DitPatchError, quote
from ..outputs import check_folder, check_place

if TYPE_CHECKING:
    import torch
    from PIL import Image

FRAMES_PER_SECOND = 8
_BAR = 16  # pixels
_FRAME = re.compile(r"\d{4,}\.png")


@dataclass(frozen=True)
class Difference:
    """How two videos differ: the first frame that does, and the largest difference of a value in all frames."""

    frame: int
    largest: float


def difference(first: torch.Tensor, second: torch.Tensor) -> Difference | None:
    """Return how two videos of one size differ, or None if they have the same bits."""
    import torch

    same = (first.contiguous().view(torch.uint8) == second.contiguous().view(torch.uint8)).flatten(1).all(1)
    if same.all():
        return None
    return Difference(frame=int(same.int().argmin()), largest=float((first - second).abs().max()))


def difference_text(differs: Difference | None, frames: int, same: str = "yes") -> str:
    """Return a difference in words, or `same` if there is none."""
    if differs is None:
        return same
    return f"no, first in frame {differs.frame} of {frames}; largest difference {differs.largest:.3g}"


def videos(result: Any, error: type[DitPatchError] = DitPatchError) -> list[torch.Tensor]:
    """Return the videos in what a diffusers pipeline returned with `output_type="pt"`: float32, on the CPU.

    A picture becomes a video of one frame.

    Raises:
        DitPatchError: or `error`; the result has neither frames nor images, or not as a tensor.
    """
    import torch

    tensor = getattr(result, "frames", None)
    if tensor is None:
        tensor = getattr(result, "images", None)
    if not isinstance(tensor, torch.Tensor) or tensor.dim() not in (4, 5):
        raise error(
            f"expected a pipeline's frames or images as a tensor, got {type(tensor).__name__}; only diffusers' "
            'pipelines that know output_type="pt" can be used'
        )
    tensor = tensor.detach().float().cpu()
    return list(tensor if tensor.dim() == 5 else tensor.unsqueeze(1))


def contact_sheet(rows: dict[str, torch.Tensor], columns: int = 5) -> Image.Image:
    """Return a picture with a row for each labelled video: `columns` frames from the first to the last."""
    from PIL import Image, ImageDraw

    rows = {label: to_bytes(frames) for label, frames in rows.items()}
    count, height, width, _ = next(iter(rows.values())).shape
    columns = min(columns, count)
    chosen = [round(column * (count - 1) / max(columns - 1, 1)) for column in range(columns)]
    left, top, gap = 64, 20, 4
    sheet = Image.new("RGB", (left + columns * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, frame in enumerate(chosen):
        draw.text((left + column * (width + gap), gap), f"frame {frame}", fill="black")
    for row, (label, video) in enumerate(rows.items()):
        y = top + row * (height + gap)
        draw.text((gap, y), label, fill="black")
        for column, frame in enumerate(chosen):
            sheet.paste(Image.fromarray(video[frame]), (left + column * (width + gap), y))
    return sheet


def labelled(label: str, video: torch.Tensor) -> torch.Tensor:
    """Return the video, 3-channelled, with a white bar on top of each frame that has the label in it."""
    import numpy
    import torch
    from PIL import Image, ImageDraw

    count, _, _, width = video.shape
    bar = Image.new("RGB", (width, _BAR), "white")
    ImageDraw.Draw(bar).text((4, 2), label, fill="black")
    pixels = torch.from_numpy(numpy.array(bar)).permute(2, 0, 1).to(video) / 255
    return torch.cat([pixels.expand(count, -1, -1, -1), video.expand(-1, 3, -1, -1)], dim=-2)


def write_mp4(path: Path, frames: torch.Tensor, fps: float = FRAMES_PER_SECOND) -> None:
    """Write H.264; the encoder rounds a side of odd length up.

    Raises:
        OSError: the file is not whole. The encoder, a process of its own, does not say so: its file is counted.
    """
    import imageio
    from imageio_ffmpeg import count_frames_and_secs

    with imageio.get_writer(path, fps=fps, quality=8, macro_block_size=2) as writer:
        for frame in to_bytes(frames):
            writer.append_data(frame)
    try:
        written, _ = count_frames_and_secs(path)
    except (RuntimeError, OSError) as error:
        raise OSError("the encoder has left no video there; is the disk full?") from error
    if written != len(frames):
        raise OSError(f"only {written} of {len(frames)} frames are in it; is the disk full?")


def write_gif(path: Path, frames: torch.Tensor, fps: float = FRAMES_PER_SECOND) -> None:
    """Write an animation that repeats for ever; GIF counts time in hundredths of a second."""
    from PIL import Image

    first, *rest = map(Image.fromarray, to_bytes(frames))
    first.save(path, save_all=True, append_images=rest, duration=10 * max(1, round(100 / fps)), loop=0)


def write_png(path: Path, frames: torch.Tensor, fps: float = FRAMES_PER_SECOND) -> None:
    """Write the picture if there is one frame, else a contact sheet."""
    from PIL import Image

    sheet = Image.fromarray(to_bytes(frames)[0]) if len(frames) == 1 else contact_sheet({"": frames})
    sheet.save(path)


def write_folder(path: Path, frames: torch.Tensor, fps: float = FRAMES_PER_SECOND) -> None:
    """Write every frame as a .png of its own, numbered from 0."""
    from PIL import Image

    path.mkdir()
    for number, frame in enumerate(to_bytes(frames)):
        Image.fromarray(frame).save(path / f"{number:04}.png")


def check_folder_of_frames(flag: str, path: Path) -> None:
    """Refuse a folder that cannot be written, or that holds anything but frames of an earlier video.

    Raises:
        DitPatchError: it is to be replaced, and something in it would be lost.
    """
    check_folder(flag, path)
    check_place(flag, path)
    others = [each.name for each in path.iterdir() if not _FRAME.fullmatch(each.name)] if path.is_dir() else []
    if others:
        raise DitPatchError(f"{flag}: {quote(path)} holds other files, such as {quote(min(others))}; give a new folder")


WRITERS: dict[str, Callable[..., None]] = {
    ".mp4": write_mp4,
    ".gif": write_gif,
    ".png": write_png,
    "": write_folder,
}
NEEDED = {
    ".mp4": {"imageio": "imageio", "imageio_ffmpeg": "imageio-ffmpeg"},
    ".gif": {"PIL": "pillow"},
    ".png": {"PIL": "pillow"},
    "": {"PIL": "pillow"},
}
"""The modules that each of `WRITERS` imports, and the packages that bring them."""


def find_writer(path: Path, flag: str = "--out") -> Callable[..., None]:
    """Return the function that writes files with that ending: `find_writer(path)(path, frames, fps)`.

    Raises:
        DitPatchError: there is none.
    """
    try:
        return WRITERS[path.suffix.lower()]
    except KeyError:
        raise DitPatchError(
            f"{flag}: {quote(path)}: expected a name that ends in .mp4, .gif or .png, or a folder for all frames, "
            f"not {quote(path.suffix)}"
        ) from None


def to_bytes(video: torch.Tensor):
    """Return a video as a uint8 array (frames, height, width, 3); a grey one becomes RGB."""
    video = video.expand(-1, 3, -1, -1) if video.shape[1] == 1 else video
    return (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
