"""An audit as one HTML page that needs nothing else: a bar for each stage, and a table of lines that sorts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from .audit import Audit
from .devices import COPY_US, KERNEL_US, Device
from .summary import Amount, Category, Row, Summary, summary, together
from .text import figure, figure_table, heading, share

_WIDTH = 30  # em of the longest bar
_LINE_HEAD = ("module", "line", "operations", "what it depends on", "ms (estimate)", "of the time", "TFLOP", "GB")
_LINE_HEAD += ("kernels", "copies", "waits")


def audit_page(audit: Audit, device: Device) -> str:
    """Return the page."""
    plain = summary(audit.plain, device)
    patched = None if audit.patched is None else summary(audit.patched, device)
    head, *figures = figure_table(plain, patched)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        title=f"Audit of {audit.subject.name}",
        heading=[line.strip() for line in heading(audit)],
        device=device,
        kernel_us=f"{KERNEL_US:g}",
        copy_us=f"{COPY_US:g}",
        head=head,
        figures=figures,
        key=[{"name": _name(each), "words": each.value} for each in Category if each in plain.by_category],
        stages=list(_stages(plain)),
        is_patched=patched is not None,
        line_head=_LINE_HEAD,
        lines=[_line(row, (patched or plain).total) for row in (patched or plain).rows],
        left_over=audit.left_over,
    )


def _stages(plain: Summary) -> Iterator[dict[str, Any]]:
    stages = plain.stages()
    totals = {name: together(amounts.values()) for name, amounts in stages.items()}
    longest = max((each.milliseconds for each in totals.values()), default=0.0) or 1.0
    for name, amounts in stages.items():
        total = totals[name]
        parts = [
            {
                "name": _name(category),
                "width": f"{_WIDTH * amounts[category].milliseconds / longest:.2f}",
                "title": f"{category.value}: {figure(amounts[category].milliseconds)} ms, "
                f"{figure(amounts[category].kernels)} kernels",
            }
            for category in Category
            if category in amounts
        ]
        marks = [f"{figure(total.copies)} copies to the device"] if total.copies else []
        marks += [f"{figure(total.syncs)} waits of the host"] if total.syncs else []
        yield {
            "name": name,
            "share": share(total.milliseconds, plain.total.milliseconds),
            "parts": parts,
            "marks": ", ".join(marks),
        }


def _line(row: Row, total: Amount) -> dict[str, Any]:
    amount = row.amount
    texts = [
        (row.module or "(the model itself)", "left"),
        (row.line, "left line"),
        (", ".join(row.operations[:4]), "left"),
        (row.about, "left"),
    ]
    numbers = (
        amount.milliseconds,
        amount.milliseconds / total.milliseconds if total.milliseconds else 0.0,
        amount.flops / 1e12,
        amount.nbytes / 1e9,
        amount.kernels,
        amount.copies + amount.downloads,
        amount.syncs,
    )
    cells = [{"text": text, "value": text, "kind": kind} for text, kind in texts]
    cells += [
        {"text": f"{value:.2%}" if place == 1 else figure(value), "value": f"{value:.9g}", "kind": ""}
        for place, value in enumerate(numbers)
    ]
    shown = row.category is not Category.CHANGING or amount.copies or amount.downloads or amount.syncs
    return {"cells": cells, "is_shown": bool(shown)}


def _name(category: Category) -> str:
    return category.name.lower()
