"""The report of a comparison: one HTML page with its table, its plot and the worst frames inside."""

from __future__ import annotations

import base64
import io
import statistics
from html import escape
from math import isinf
from pathlib import Path

import torch

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
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .7em; text-align: right }
td:first-child, th:first-child { text-align: left } tr + tr { border-top: 1px solid #ddd }
img { max-width: 100% } .bad { color: #a00; font-weight: 600 } dt { float: left; clear: left; width: 10em; color: #666 }
dd { margin-left: 10.5em }
"""


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
    """The whole report as one file."""
    head, *rows = table(result)
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f'<p class="bad">Failed: {escape(failure)}</p>' for failure in result.failures]
    parts.append(_html_table(head, rows))
    parts.append(
        "<p>Times are seconds of a whole call and of the transformers in it, medians over the prompts; the spread is "
        "the widest interquartile range of one prompt's repeats. SSIM and PSNR say how near each frame is to the "
        "baseline's of the same seed, before any video encoding. They do not say which is the better video.</p>"
    )
    parts += [f"<p>{escape(remark)}</p>" for remark in result.remarks]
    parts += ["<h2>Speed and likeness</h2>", _image(_plot(result.summaries))]
    parts.append("<h2>Worst frames</h2><p>Baseline, variant, and their difference five times enlarged.</p>")
    for run in _worst(result):
        like = run.likeness
        parts.append(
            f"<p>{escape(run.variant.name)}, {escape(repr(run.prompt))}, frame {like.worst}: "
            f"SSIM {like.ssim[like.worst]:.4f}, PSNR {_decibel(like.psnr[like.worst])}</p>"
        )
        parts.append(_image(_sheet(_baseline(result, run), run)))
    parts.append("<h2>Prompts</h2>")
    parts.append(_html_table(_PROMPT_COLUMNS, [_prompt_row(run) for run in result.runs]))
    parts.append("<h2>Surroundings</h2><dl>")
    parts += [f"<dt>{escape(name)}</dt><dd>{escape(value) or '-'}</dd>" for name, value in result.about.items()]
    parts.append("</dl>")
    body = "\n".join(parts)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>\n'
        f"<body>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )


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


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["<table><tr>", *(f"<th>{escape(cell)}</th>" for cell in head), "</tr>"]
    for row in rows:
        lines += ["<tr>", *(f"<td>{escape(cell)}</td>" for cell in row), "</tr>"]
    return "".join([*lines, "</table>"])


def _plot(summaries: list[Summary]) -> bytes:
    """Speed-up against likeness: the cached variants, and the baselines with fewer steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    shown = [each for each in summaries if each.name not in (BASELINE, AGAIN) and "alone" not in each.name]
    for fewer, marker, label in ((False, "o", "cached"), (True, "s", "fewer steps, uncached")):
        points = sorted(
            (each for each in shown if (each.calls != summaries[0].calls) == fewer), key=lambda each: each.speedup
        )
        axes.plot(
            [each.speedup for each in points], [each.ssim for each in points], marker, linestyle="--", label=label
        )
        for each in points:
            axes.annotate(each.name, (each.speedup, each.ssim), textcoords="offset points", xytext=(6, 4), fontsize=8)
            axes.plot([each.speedup] * 2, [each.worst_prompt_ssim, each.ssim], color="0.7", linewidth=1, zorder=0)
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


def _image(picture: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
