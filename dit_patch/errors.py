"""What dit_patch raises, and how its messages quote the user; it knows nothing about what went wrong where."""

from collections.abc import Iterable
from difflib import get_close_matches


class DitPatchError(Exception):
    """Everything that dit_patch raises on purpose; catch this to catch them all."""


class SpecError(DitPatchError):
    """Raised when a spec, or a place that specs should come from, cannot be read or says something it may not."""


class UnsupportedModelError(DitPatchError):
    """Raised when no spec names the class of the model that was to be patched."""


class SiteError(DitPatchError):
    """Raised when a site of a spec does not fit the model: no such attribute, argument, signature or source."""


class VersionError(DitPatchError):
    """Raised when an installed package is not one that the spec was verified with."""


class StepCacheError(DitPatchError):
    """Raised when step caching was asked for and cannot be given, or not without changing more than it should."""


LONG = 1000
"""A limit for `quote` that leaves paths whole: their ends say most."""


def quote(text: object, limit: int = 80) -> str:
    """The user's own words between backticks: on one line, printable, and not longer than a message can bear."""
    words = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: limit + 1])
    return f"`{words[:limit]}...`" if len(words) > limit else f"`{words}`"


def suggest(word: str, candidates: Iterable[str]) -> str:
    """The end of a message about an unknown `word`: "; did you mean `x`?", or nothing where none is near."""
    spelled = {candidate.lower(): candidate for candidate in candidates}
    near = get_close_matches(word.lower(), spelled, n=1)
    return f"; did you mean `{spelled[near[0]]}`?" if near else ""
