"""The report of a comparison: one HTML page with its table, its plot and the worst frames inside."""

from __future__ import annotations

import base64
import io
import statistics
from math import isinf
from pathlib import Path
from typing import Any

import jinja2
import torch

from ...outputs import replacing
from ...step_cache.stats import ranges
from .harness import AGAIN, BASELINE, Result, Run, Summary

_COLUMNS = (
    "variant", "seconds", "spread", "speed-up", "in the DiT", "speed-up", "DiT calls", "blocks skipped", "SSIM",
    "worst prompt", "worst frame", "PSNR", "worst prompt", "LPIPS", "equal",
)  # fmt: skip
_PROMPT_COLUMNS = [
    "variant", "prompt", "seed", "seconds", "spread", "in the DiT", "SSIM", "worst frame", "blocks skipped",
    "skipped steps",
]  # fmt: skip


def table(result: Result) -> list[list[str]]:
    """The summary as text, a row per variant below the heads."""
    return [list(_COLUMNS), *map(_row, result.summaries)]


def plain(result: Result) -> str:
    """The summary for a terminal."""
    rows = table(result)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *cells in rows:
        aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:]))
        lines.append("  ".join([f"{name:<{widths[0]}}", *aligned]))
    lines += [f"note: {remark}" for remark in result.remarks] + [f"FAILED: {failure}" for failure in result.failures]
    return "\n".join(lines)


def markdown(result: Result) -> str:
    """The summary for a README."""
    head, *rows = table(result)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def write(path: Path, result: Result, title: str) -> None:
    """Write the whole report as one file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    head, *rows = table(result)
    page = environment.get_template("report.html.jinja").render(
        title=title,
        result=result,
        head=head,
        rows=rows,
        plot=_base64(_plot(result.summaries)),
        worst=[_worst_frame(result, run) for run in _worst(result)],
        prompt_head=_PROMPT_COLUMNS,
        prompt_rows=[_prompt_row(run) for run in result.runs],
    )
    with replacing(path) as draft:
        draft.write_text(page, encoding="utf-8")


def _row(summary: Summary) -> list[str]:
    return [
        summary.name,
        f"{summary.seconds:.3f}",
        f"{summary.spread:.3f}",
        f"{summary.speedup:.2f}x",
        f"{summary.dit_seconds:.3f}",
        f"{summary.dit_speedup:.2f}x",
        str(summary.calls),
        f"{summary.skipped:.0%}" if summary.skipped else "-",
        f"{summary.ssim:.4f}",
        f"{summary.worst_prompt_ssim:.4f}",
        f"{summary.worst_frame_ssim:.4f}",
        _decibel(summary.psnr),
        _decibel(summary.worst_prompt_psnr),
        "-" if summary.lpips is None else f"{summary.lpips:.4f}",
        str(summary.equal),
    ]


def _decibel(value: float) -> str:
    return "equal" if isinf(value) else f"{value:.1f}"


def _prompt_row(run: Run) -> list[str]:
    like = run.likeness
    steps = "; ".join(f"{where}: {ranges(skipped) or 'none'}" for where, skipped in run.cached.items())
    return [
        run.variant.name,
        run.prompt,
        str(run.seed),
        f"{statistics.median(run.seconds):.3f}",
        f"{run.spread:.3f}",
        f"{statistics.median(run.dit_seconds):.3f}",
        f"{like.mean_ssim:.4f}",
        f"{min(like.ssim):.4f}",
        f"{run.skipped:.0%}" if run.skipped else "-",
        steps or "-",
    ]


def _worst_frame(result: Result, run: Run) -> dict[str, Any]:
    """What the page shows of the worst frame of a run."""
    like = run.likeness
    return {
        "name": run.variant.name,
        "prompt": repr(run.prompt),
        "frame": like.worst,
        "ssim": f"{like.ssim[like.worst]:.4f}",
        "psnr": _decibel(like.psnr[like.worst]),
        "sheet": _base64(_sheet(_baseline(result, run), run)),
    }


def _plot(summaries: list[Summary]) -> bytes:
    """Speed-up against likeness: the cached variants, and the baselines with fewer steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    shown = [each for each in summaries if each.name not in (BASELINE, AGAIN) and "alone" not in each.name]
    speeds = [each.speedup for each in shown] or [1.0]
    middle = (min(speeds) + max(speeds)) / 2
    for fewer, marker, label in ((False, "o", "cached"), (True, "s", "fewer steps, uncached")):
        points = sorted(
            (each for each in shown if (each.calls != summaries[0].calls) == fewer), key=lambda each: each.speedup
        )
        axes.plot(
            [each.speedup for each in points], [each.ssim for each in points], marker, linestyle="--", label=label
        )
        for each in points:
            right = each.speedup > middle  # a label there goes to the left, so that it stays inside
            offset, side = ((-6, 4), "right") if right else ((6, 4), "left")
            place = (each.speedup, each.ssim)
            axes.annotate(each.name, place, textcoords="offset points", xytext=offset, ha=side, fontsize=8)
            axes.plot([each.speedup] * 2, [each.worst_prompt_ssim, each.ssim], color="0.7", linewidth=1, zorder=0)
    axes.margins(x=0.12, y=0.12)
    axes.axvline(1, color="0.8", linewidth=1)
    axes.set(xlabel="speed-up of the whole call", ylabel="SSIM to the baseline (line: to the worst prompt's)")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _worst(result: Result) -> list[Run]:
    """Of each cached variant and each of fewer steps the run with the worst frame."""
    worst: dict[str, Run] = {}
    for run in result.runs:
        name = run.variant.name
        if name in (BASELINE, AGAIN) or run.variant.direct:
            continue
        if name not in worst or min(run.likeness.ssim) < min(worst[name].likeness.ssim):
            worst[name] = run
    return list(worst.values())


def _baseline(result: Result, run: Run) -> Run:
    return next(
        each
        for each in result.runs
        if each.variant.name == BASELINE and each.prompt == run.prompt and each.seed == run.seed
    )


def _sheet(baseline: Run, run: Run) -> bytes:
    """The worst frame and those around it: baseline above, the variant below, then their difference."""
    from PIL import Image

    worst, count = run.likeness.worst, len(run.frames)
    first = max(0, min(worst - 2, count - 5))
    rows = []
    for frames in (baseline.frames, run.frames, (5 * (baseline.frames - run.frames).abs()).clamp(0, 1)):
        rows.append(torch.cat(list(frames[first : first + 5]), dim=-1))
    sheet = (torch.cat(rows, dim=-2).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(sheet)
    scale = max(1, 900 // image.width)
    picture = io.BytesIO()
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(picture, format="png")
    return picture.getvalue()


def _base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()
