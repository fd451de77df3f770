"""Judge what the sites did when all trials are over: which were never reached, never hit, or have too fine a key."""

from __future__ import annotations

from ...spec.address import StageAddress
from .results import Problem, ProblemKind, Result, SiteRecord


def judge(result: Result, *, has_all_minis: bool) -> None:
    """Add a problem or a note for each site that has no problem yet.

    Args:
        has_all_minis: every mini of the spec was tried, so that what is in none of them is nowhere.
    """
    for record in result.sites.values():
        if result.has_problem(record):
            continue
        verdict = _verdict(record, result.label(record), has_all_minis)
        if isinstance(verdict, Problem):
            result.add(verdict)
        elif verdict is not None:
            record.notes[verdict] = None


def _verdict(record: SiteRecord, label: str, has_all_minis: bool) -> Problem | str | None:
    """Return what is wrong with the site, a note where that cannot be known here, or None where all is well."""
    site = record.site
    if isinstance(site.address, StageAddress):
        return "a method of the pipeline's stages; there is no pipeline here"
    if site.accelerator and not record.calls:
        return "only where the model runs on an accelerator"
    if not record.present:
        return Problem(ProblemKind.ABSENT, label) if has_all_minis else None
    if not record.calls:
        if has_all_minis and not site.optional:
            return Problem(ProblemKind.NEVER_REACHED, label)
        return "not reached here"
    if record.unreached and not site.optional:
        return Problem(ProblemKind.NOT_REACHED, label, detail=", ".join(record.unreached))
    if record.coarser_key:
        return Problem(ProblemKind.TOO_FINE, label, detail=record.coarser_key)
    if not record.hits:
        return Problem(ProblemKind.NEVER_HITS, label, detail=_why_no_hits(record))
    return None


def _why_no_hits(record: SiteRecord) -> str:
    return "; ".join(record.bypassed) or "its results differ from call to call, and there is nothing to keep"
