"""What `dit-patch bench here` can measure, the most telling part first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import targets
from .captured_forward import captured_forward
from .results import Row
from .rotation import rotation
from .targets import Target
from .whole_forwards import measure


@dataclass(frozen=True)
class Setting:
    """Where a part is measured, in how many seconds at the most, and whether with tiny models, as short as can be."""

    device: torch.device
    seconds: float
    tiny: bool = False

    def share(self, part: float) -> float:
        """Return that part of the seconds."""
        return 0.0 if self.tiny else part * self.seconds


@dataclass(frozen=True)
class Part:
    """One part: its title, and what yields its rows for its own name and a setting."""

    title: str
    measure: Callable[[str, Setting], Iterator[Row]]


def _forwards(target: Target) -> Part:
    def of_target(part: str, setting: Setting) -> Iterator[Row]:
        return measure(part, target, setting.device, setting.share(0.7), tiny=setting.tiny)

    return Part(f"{target.title}: whole forwards (plain, patched)", of_target)


def _rotation(part: str, setting: Setting) -> Iterator[Row]:
    return rotation(part, setting.device, setting.share(0.7), tiny=setting.tiny)


def _capture(part: str, setting: Setting) -> Iterator[Row]:
    return captured_forward(part, targets.WAN_SHORT, setting.device, setting.share(0.7), tiny=setting.tiny)


PARTS = {
    "matrix-game-2": _forwards(targets.MATRIX_GAME_2),
    "wan-short": _forwards(targets.WAN_SHORT),
    "wan": _forwards(targets.WAN),
    "fastvideo-wan": _forwards(targets.FASTVIDEO_WAN),
    "rotation": Part("applying RoPE to one tensor (the library's function, ours)", _rotation),
    "capture": Part("a warm patched forward of Wan (launched, replayed as a CUDA graph)", _capture),
    "hunyuan-video-1.5": _forwards(targets.HUNYUAN_15),
    "matrix-game-3": _forwards(targets.MATRIX_GAME_3),
}
"""By the name that `--only` takes."""
