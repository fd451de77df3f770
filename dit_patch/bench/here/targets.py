"""The models that `dit-patch bench here` measures: the sizes of real ones, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...spec.model import Spec
from ...spec.recipe import Case, merge
from ...spec.registry import Registry


@dataclass(frozen=True)
class Target:
    """A model of a spec at the size of one of its `bench` cases.

    Attributes:
        title: what it is, for the table.
        spec: the name of the spec.
        bench: the name of the case.
        layers: how many blocks it gets; the cases have one.
        size: what names in shapes stand for, where it is not the case's own.
    """

    title: str
    spec: str
    bench: str
    layers: int
    size: Mapping[str, int] = field(default_factory=dict)

    def resolve(self, *, tiny: bool) -> tuple[Spec, Case]:
        """Return the spec, and the case to build and call its model by: that of its mini if it is to be tiny."""
        spec = Registry().get(self.spec)
        if tiny:
            return spec, spec.mini.case()
        case = spec.bench_case(self.bench)
        sizes = (self.size,) if self.size else case.sizes
        return spec, merge(case, Case(config={"num_layers": self.layers}, sizes=sizes))


WAN_SHORT = Target(
    "diffusers' Wan 1.3B, 5 frames of 240 x 416",
    "diffusers/wan",
    "wan-2.1-1.3b-480p",
    30,
    {"f": 2, "h": 30, "w": 52},
)
WAN = Target("diffusers' Wan 1.3B, 81 frames of 480 x 832", "diffusers/wan", "wan-2.1-1.3b-480p", 30)
FASTVIDEO_WAN = Target("FastVideo's Wan 1.3B, 81 frames of 480 x 832", "fastvideo/wan", "wan-2.1-1.3b-480p", 30)
MATRIX_GAME_2 = Target("FastVideo's Matrix-Game 2, a block of 3 frames", "fastvideo/matrixgame2", "matrix-game-2", 30)
MATRIX_GAME_3 = Target("FastVideo's Matrix-Game 3, 1,100 tokens", "fastvideo/matrixgame3", "1100-tokens-1-block", 30)
HUNYUAN_15 = Target(
    "HunyuanVideo 1.5 with 8 layers, 121 frames of 480 x 832", "fastvideo/hunyuan_video15", "hunyuan-video-1.5-480p", 8
)
