"""The report as HTML, for notebooks: the same table as the text, which stays readable without any style."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ..step_cache.stats import text as step_text
from .rows import Rows
from .text import headline, mib, saved, short_address

if TYPE_CHECKING:
    from ..step_cache import StepCache

_HEAD = ("kind", "site", "hits", "misses", "bypassed", "held", "saved", "")


def report_html(rows: Rows, max_bytes: int, step_cache: StepCache | None = None) -> str:
    """Return the report as one `<div>`; the arguments are those of `report_text`."""
    parts = [f"<p>{escape(headline(rows, max_bytes, step_cache))}</p>"]
    for model in dict.fromkeys(row.model for row in rows.sites):
        sites = [row for row in rows.sites if row.model == model]
        caption = f"{model} {sites[0].model_class} ({sites[0].spec})"
        head = "".join(f"<th>{escape(each)}</th>" for each in _HEAD)
        body = "".join(
            _line(
                (row.kind, short_address(row.at), row.hits, row.misses, sum(row.bypassed.values()) or "-")
                + (mib(row.nbytes), saved(row), "; ".join(row.notes))
            )
            for row in sites
        )
        parts.append(f"<table><caption>{escape(caption)}</caption><tr>{head}</tr>{body}</table>")
    if step_cache is not None:
        parts.append(f"<pre>{escape(chr(10).join(step_text(step_cache, rows.steps)))}</pre>")
    return f"<div>{''.join(parts)}</div>"


def _line(cells: tuple) -> str:
    return "<tr>" + "".join(f"<td>{escape(str(each))}</td>" for each in cells) + "</tr>"
