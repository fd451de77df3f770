"""What a calibration has found: the thresholds that were tried, and the one that met the target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """What one threshold was predicted to do, and what it did where it was tried; `speedup` is of the whole call."""

    threshold: float
    cached: int
    steps: int
    speedup: float
    measured: float | None = None
    ssim: float | None = None


@dataclass(frozen=True)
class Calibration:
    """`points` by threshold; `chosen` is the one that met the target."""

    target: str
    points: tuple[Point, ...]
    chosen: Point

    def __str__(self) -> str:
        lines = [f"calibrated for {self.target}", "  threshold  cached     predicted  measured  SSIM"]
        for point in self.points:
            measured = "" if point.measured is None else f"{point.measured:.2f}x"
            ssim = "" if point.ssim is None else f"{point.ssim:.4f}"
            mark = "  <- chosen" if point.threshold == self.chosen.threshold else ""
            lines.append(
                f"  {point.threshold:<9g}  {point.cached:>3} of {point.steps:<3}  {point.speedup:>8.2f}x  "
                f"{measured:>8}  {ssim:>6}{mark}".rstrip()
            )
        return "\n".join(lines)
