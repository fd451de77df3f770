"""How near two generations are, by raw frames: SSIM and PSNR by scikit-image, LPIPS where it is at hand.

All of them say how faithful one sample is to another. None says which of the two is the better video.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .. import extras
from ..errors import StepCacheError


@dataclass(frozen=True)
class Likeness:
    """Of each frame to the baseline's: `ssim` in [-1, 1], `psnr` in dB (inf where equal), `lpips` or None."""

    ssim: tuple[float, ...]
    psnr: tuple[float, ...]
    lpips: tuple[float, ...] | None
    equal: bool

    @property
    def mean_ssim(self) -> float:
        return sum(self.ssim) / len(self.ssim)

    @property
    def mean_psnr(self) -> float:
        return sum(self.psnr) / len(self.psnr)

    @property
    def worst(self) -> int:
        """The number of the frame with the lowest SSIM."""
        return min(range(len(self.ssim)), key=self.ssim.__getitem__)


def likeness(baseline: torch.Tensor, other: torch.Tensor) -> Likeness:
    """Compare two videos (frames, channels, height, width), float in [0, 1].

    Raises:
        StepCacheError: scikit-image is missing, or they have not the same number and size of frames; nothing is cut off
            to make them fit.
    """
    check_needed()
    if baseline.shape != other.shape:
        raise StepCacheError(f"frames cannot be compared: the baseline has {_size(baseline)}, the other {_size(other)}")
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    ssim, psnr = [], []
    for ours, theirs in zip(_images(baseline), _images(other)):
        same = bool((ours == theirs).all())
        ssim.append(1.0 if same else float(structural_similarity(ours, theirs, channel_axis=-1, data_range=1.0)))
        psnr.append(float("inf") if same else float(peak_signal_noise_ratio(ours, theirs, data_range=1.0)))
    return Likeness(tuple(ssim), tuple(psnr), _lpips(baseline, other), torch.equal(baseline, other))


def check_needed() -> None:
    """Refuse where frames cannot be compared, before hours were spent on them.

    Raises:
        StepCacheError: scikit-image is missing.
    """
    extras.require("comparing frames", {"skimage": "scikit-image"}, "cache-bench", StepCacheError)


def lpips_is_at_hand() -> bool:
    """Whether the lpips package and its backbone's weights are here; nothing is downloaded."""
    return _lpips_model() is not None


def _lpips(baseline: torch.Tensor, other: torch.Tensor) -> tuple[float, ...] | None:
    model = _lpips_model()
    if model is None:
        return None
    with torch.no_grad():
        return tuple(model(2 * baseline - 1, 2 * other - 1).flatten().tolist())


@cache
def _lpips_model() -> Any:
    from pathlib import Path

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not any(folder.glob("alexnet-*.pth")):
        return None
    try:
        import lpips
    except ImportError:
        return None
    return lpips.LPIPS(net="alex", verbose=False).eval()


def _images(video: torch.Tensor):
    return video.permute(0, 2, 3, 1).numpy()


def _size(video: torch.Tensor) -> str:
    frames, _, height, width = video.shape
    return f"{frames} frames of {width}x{height}"
