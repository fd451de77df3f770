"""The report as text: a row for each site, what was noticed of it below, and what the step cache did."""

from __future__ import annotations

from typing import Any

from ..spec.address import Address, InnerFunctionAddress
from ..step_cache.stats import text as step_text
from .rows import Rows


def report_text(rows: Rows, max_bytes: int, nbytes: int, step_cache: Any = None) -> str:
    """Return the report.

    Args:
        max_bytes, nbytes: what the caches may hold and what they hold, in bytes.
        step_cache: the `StepCache` that was asked for, or None.
    """
    sites = rows.sites
    width = max((len(_short(row.at)) for row in sites), default=4)
    fixed = any(row.fixed for row in sites)
    kind = "fixes on (where they apply, results differ from upstream's)" if fixed else "lossless"
    if step_cache is not None:
        kind = f"step caching on (the output is another); all else {kind}"
    lines = [f"dit_patch: {kind}, {_mib(nbytes)} cached of {_mib(max_bytes)}"]
    for model in dict.fromkeys(row.model for row in sites):
        own = [row for row in sites if row.model == model]
        lines.append(f"{model}  {own[0].model_class}  spec {own[0].spec}")
        lines.append(
            f"  {'kind':<8}  {'site':<{width}}  {'hits':>6}  {'misses':>6}  {'bypassed':>8}  {'held':>10}  saved"
        )
        for row in own:
            count = sum(row.bypassed.values())
            lines.append(
                f"  {row.kind:<8}  {_short(row.at):<{width}}  {row.hits:>6}  {row.misses:>6}  {count or '-':>8}  "
                f"{_mib(row.nbytes):>10}  {row.seconds_saved * 1e3:.1f} ms"
            )
            lines += [f"  {'':<8}    {note}" for note in row.notes]
    if step_cache is not None:
        lines += step_text(step_cache, rows.steps)
    return "\n".join(lines)


def _short(at: str) -> str:
    """Return the address as a row shows it: of a function inside a method, without the path to it."""
    match Address.parse(at):
        case InnerFunctionAddress(module, function, name):
            return f"{module.rpartition('.')[2]}:{function.partition('.')[0]}...{name}"
    return at


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f} MiB"
