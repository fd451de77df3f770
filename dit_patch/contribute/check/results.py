"""What `dit-patch check` finds out about a spec, as values: a record for each site, and problems with their kinds.

`ProblemKind` is the table of the words for problems. Code asks for the kind or the site, and reads no sentence.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from ...spec.model import Site, Spec


class ProblemKind(enum.Enum):
    """The kinds of problems, each with its words; the braces are fields of a `Problem`."""

    # Of the whole spec, or of a model that it was tried on.
    MESSAGE = "{detail}"
    NOT_BUILT = "{subject}: {detail}"
    NOT_CALLABLE = "{subject}: the unpatched model cannot be built or called so: {detail}"
    OUTPUT_DIFFERS = "{subject}: forward {forward} of the patched model differs from the unpatched one's"
    STEP_CACHE_REFUSED = "step cache: {detail}"
    STEP_CACHE_DIFFERS = "{subject}: forward {forward} differs with a step cache that skips nothing"

    # Of one site.
    TOO_COARSE = (
        "{site}: its key is too coarse: it takes the calls in forwards {forward} and {other_forward} of the {subject} "
        "for the same, and their results differ; {detail}"
    )
    MISSING_ARGUMENTS = (
        "{site}: its key is too coarse: its results change with arguments of the model that do not count: `{detail}`"
    )
    MISSING_WEIGHTS = (
        "{site}: its key is too coarse: its arguments are computed with weights that do not count; "
        "`reads: [{detail}]` would have them counted"
    )
    TOO_FINE = (
        "{site}: its key is finer than needed: it is a new one at each step, though the results repeat. For the calls "
        "seen here this would do: {detail}"
    )
    ABSENT = "{site}: in none of the minis; is it misspelt, or a variant missing?"
    NEVER_REACHED = "{site}: is never reached: no forward of any mini calls it"
    NOT_REACHED = "{site}: is not reached in {detail}; say `optional: true` if that is right"
    NEVER_HITS = "{site}: never hits: {detail}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the spec.

    Args:
        kind: what is wrong.
        site: the label of the site that is concerned, with spec and file; "" for none in particular.
        subject: the model that it was seen on.
        detail: what the words of the kind have room for.
        forward: the number of the forward in which it was seen, from 0.
        other_forward: the number of the forward that it was compared with.
    """

    kind: ProblemKind
    site: str = ""
    subject: str = ""
    detail: str = ""
    forward: int = 0
    other_forward: int = 0

    def __str__(self) -> str:
        return self.kind.value.format(**vars(self))

    def as_dict(self) -> dict[str, Any]:
        """Return the problem as JSON can hold it, with its words."""
        return {**vars(self), "kind": self.kind.name.lower(), "message": str(self)}


@dataclass
class SiteRecord:
    """What one site did in all trials together; `seconds` is the shortest time of computing one result."""

    site: Site
    calls: int = 0
    hits: int = 0
    seconds: float = float("inf")
    equal: bool = True
    present: bool = False
    coarser_key: str | None = None  # that would do, where its own is a new one at each step
    too_coarse: bool = False
    unreached: dict[str, None] = field(default_factory=dict)
    bypassed: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON can hold it."""
        return {
            "at": self.site.at,
            "kind": self.site.kind,
            "calls": self.calls,
            "hits": self.hits,
            "equal": self.equal,
            "seconds": self.seconds if isfinite(self.seconds) else None,
            "notes": [*self.notes, *self.bypassed],
        }


@dataclass
class Result:
    """What came of all trials: a record for each site, a line for each trial, and everything that is wrong."""

    spec: Spec
    sites: dict[str, SiteRecord]
    trials: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    faulty_sites: set[str] = field(default_factory=set)  # labels of those that a problem is about

    @classmethod
    def empty(cls, spec: Spec) -> Result:
        """Return the result before the first trial."""
        return cls(spec, {site.at: SiteRecord(site) for site in spec.sites})

    def add(self, problem: Problem) -> None:
        """Add a problem, unless the same words are there already."""
        self.faulty_sites.add(problem.site)
        if str(problem) not in map(str, self.problems):
            self.problems.append(problem)

    def add_message(self, text: str) -> None:
        """Add the message of an error or a warning as a problem of the sites that it names."""
        self.faulty_sites.update(label for label in map(self.label, self.sites.values()) if label in text)
        self.add(Problem(ProblemKind.MESSAGE, detail=text))

    def label(self, record: SiteRecord) -> str:
        """Return the name of the site for people, with spec and file."""
        return self.spec.label(record.site)

    def has_problem(self, record: SiteRecord) -> bool:
        """Return whether the site is known to be wrong."""
        return not record.equal or self.label(record) in self.faulty_sites

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {
            "spec": self.spec.name,
            "path": str(self.spec.path),
            "trials": list(self.trials),
            "sites": [record.as_dict() for record in self.sites.values()],
            "problems": [problem.as_dict() for problem in self.problems],
        }

    @property
    def too_coarse_sites(self) -> set[str]:
        """The labels of sites whose keys are known to be too coarse."""
        return {self.label(record) for record in self.sites.values() if record.too_coarse}
