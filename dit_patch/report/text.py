"""The report as text: a row for each site, what was noticed of it below, and what the step cache did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..spec.address import Address, InnerFunctionAddress
from ..step_cache.stats import text as step_text
from .rows import Rows, SiteStats

if TYPE_CHECKING:
    from ..step_cache import StepCache


def report_text(rows: Rows, max_bytes: int, step_cache: StepCache | None = None) -> str:
    """Return the report; `max_bytes` is what the caches may hold, `step_cache` what was asked for."""
    lines = [headline(rows, max_bytes, step_cache)]
    width = max((len(short_address(row.at)) for row in rows.sites), default=4)
    for model in dict.fromkeys(row.model for row in rows.sites):
        lines += _model_lines([row for row in rows.sites if row.model == model], width)
    if step_cache is not None:
        lines += step_text(step_cache, rows.steps)
    return "\n".join(lines)


def headline(rows: Rows, max_bytes: int, step_cache: StepCache | None) -> str:
    """Return the first line: whether results are those of the unpatched models, and what is held."""
    return f"dit_patch: {_promise(rows, step_cache)}, {mib(rows.nbytes)} cached of {mib(max_bytes)}"


def _promise(rows: Rows, step_cache: StepCache | None) -> str:
    """Say whether results are those of the unpatched models."""
    fixed = any(row.fixed for row in rows.sites)
    promise = "fixes on (where they apply, results differ from upstream's)" if fixed else "lossless"
    if step_cache is None:
        return promise
    if any(row.cached for row in rows.steps):
        effect = "which changes the output"
    elif any(row.steps or row.findings for row in rows.steps):
        effect = "which skipped nothing in the last generation"
    else:
        effect = "which will change the output"
    return f"step caching on, {effect}; all else {promise}"


def _model_lines(sites: Sequence[SiteStats], width: int) -> Iterator[str]:
    """Return the table of one model's sites, of which the addresses are at most `width` long."""
    first = sites[0]
    yield f"{first.model}  {first.model_class}  spec {first.spec}"
    yield f"  {'kind':<8}  {'site':<{width}}  {'hits':>6}  {'misses':>6}  {'bypassed':>8}  {'held':>10}  saved"
    for row in sites:
        yield (
            f"  {row.kind:<8}  {short_address(row.at):<{width}}  {row.hits:>6}  {row.misses:>6}  "
            f"{sum(row.bypassed.values()) or '-':>8}  {mib(row.nbytes):>10}  {saved(row)}"
        )
        for note in row.notes:
            yield f"  {'':<8}    {note}"


def saved(row: SiteStats) -> str:
    """Return the host's time that a site has saved; a replacement is no cache, and nothing is said of its time."""
    return "-" if row.is_replacement else f"{row.seconds_saved * 1e3:.1f} ms"


def short_address(at: str) -> str:
    """Return the address as a row shows it: of a function inside a method, without the path to it."""
    match Address.parse(at):
        case InnerFunctionAddress(module, function, name):
            return f"{module.rpartition('.')[2]}:{function.partition('.')[0]}...{name}"
    return at


def mib(nbytes: int) -> str:
    """Return bytes in MiB."""
    return f"{nbytes / 2**20:.2f} MiB"
