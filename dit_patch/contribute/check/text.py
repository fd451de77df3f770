"""What `dit-patch check` prints at its end: a table of the sites, and the problems."""

from __future__ import annotations

from math import isfinite

from .results import Result


def result_text(result: Result) -> str:
    """Return the table of sites, if any model could be tried, and the problems."""
    count = len(result.problems)
    lines = [*_table(result), ""] if result.trials else []
    lines += [f"problem: {problem}" for problem in result.problems]
    lines.append(f"{count} problem{'' if count == 1 else 's'}" if count else "no problems found")
    return "\n".join(lines)


def yes_or_no(equal: bool) -> str:
    """Return "yes", or "NO" in capitals so that nobody misses it."""
    return "yes" if equal else "NO"


def _table(result: Result) -> list[str]:
    width = max((len(at) for at in result.sites), default=4)
    lines = [f"  {'site':<{width}}  {'kind':<8}  {'calls':>6}  {'hits':>6}  {'equal':<5}  one result"]
    for at, record in result.sites.items():
        equal = "-" if record.equal and not record.hits else yes_or_no(record.equal)
        took = f"{record.seconds * 1e6:.0f} us" if isfinite(record.seconds) else "-"
        lines.append(f"  {at:<{width}}  {record.site.kind:<8}  {record.calls:>6}  {record.hits:>6}  {equal:<5}  {took}")
        lines += [f"  {'':<{width}}    {note}" for note in (*record.notes, *record.bypassed)]
    return lines
