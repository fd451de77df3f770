"""Take out of a draft what `dit-patch check` would find fault with, so that what `new` proposes is accepted."""

from __future__ import annotations

from ...spec.loading import loads
from ...spec.model import Spec
from ..check import cases
from ..check.results import Result
from ..check.trial import try_spec
from .write import Draft, spec_text


def prune(draft: Draft) -> None:
    """Try the draft, and leave out the sites that are at fault until none is; what stays wrong is its `faults`."""
    while True:
        spec = loads(spec_text(draft), file=draft.name, name="draft", trusted=True)
        result = try_spec(spec, cases.minis(spec), say=lambda line: None)
        refused = {at: reason for at in result.sites if (reason := _fault(spec, result, at))}
        if not refused:
            draft.faults = [str(problem) for problem in result.problems]
            return
        draft.refused |= refused
        draft.sites = [each for each in draft.sites if each.at not in refused]
        if not draft.sites:
            return


def _fault(spec: Spec, result: Result, at: str) -> str | None:
    """Return the first thing that is wrong with a site, without its label, or None."""
    record = result.sites[at]
    if not result.has_problem(record):
        return None
    label = result.label(record)
    found = next((str(each) for each in result.problems if each.site == label or label in str(each)), "not equal")
    return found.replace(f"{label}: ", "")
