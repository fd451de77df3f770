"""What can be noticed about a site, a model or a step cache: values for code to read, and the words for each kind.

`FindingKind` is the one table of these words: what the report notes, and what a warning says. Code asks for the kind
and never looks into a sentence.

    warn(Finding(FindingKind.UNREACHED, site="rope.forward", detail="WanTransformer3DModel"))
"""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass
from typing import NamedTuple


class _Words(NamedTuple):
    """Templates over the fields of a `Finding`; None where the kind is never noted, or never warned of."""

    note: str | None
    warning: str | None = None


_NOT_REACHED = "{site} was not reached in {detail}.forward; "


class FindingKind(enum.Enum):
    """The kinds of findings; `detail` is, for each, what the braces in its words say."""

    # Of a site that is not, or not any more, at work.
    ABSENT = _Words("not in this model")
    ABSENT_STAGE = _Words("not in this pipeline")
    NEEDS_FORWARD = _Words("left alone: it counts on the forward that {detail} replaces")
    OTHER_FORWARD = _Words("not in {detail}, which has a forward of its own")
    OTHER_SOURCE = _Words(
        "{detail} is for another version of the original, and not used",
        "{site}: the original's source is {detail}; the original is used.",
    )
    COMPILED = _Words("inside compiled code, which is left alone")
    DISPLACED = _Words(
        "displaced by another library; apply() again",
        _NOT_REACHED + "something replaced it after apply()\n"
        "    (accelerate's remove_hook_from_module does). Call dit_patch.apply(...) again.",
    )
    UNREACHED = _Words("not reached", _NOT_REACHED + "this forward does not call it, so nothing of it is cached.")

    # Why a site was switched off.
    WRITTEN_INTO = _Words(
        "somebody wrote into a cached result; the site is switched off",
        "{site}: somebody wrote into a cached result; the site is switched off.",
    )
    TOO_COARSE = _Words(
        "a cached result differs from a fresh one: its key is too coarse. Switched off",
        "{site}: a cached result differs from a fresh one: its key is too coarse. Switched off.",
    )
    REPLACEMENT_FAILED = _Words("its replacement {detail}", "{site} {detail}; the original is used.")

    # Of a site at work.
    SWITCHED_OFF = _Words("switched off: {detail}")
    BYPASSED = _Words("bypassed {count}: {detail}")
    NEVER_HIT = _Words("never hit: something in its key differs at each call")
    NEVER_HIT_TIMESTEP = _Words("never hit: the timestep is a new tensor at each forward, as it is without CFG")
    NEVER_HIT_CONTEXT = _Words("never hit: the conditioning is a new tensor at each forward")
    NOT_CALLED = _Words("not called so far")
    STAND_IN = _Words("never read: a stand-in is handed out")
    EVICTED = _Words("{count} results given up for others; a larger max_bytes would keep them")
    FIXED = _Words("fix on: {detail}")

    # Of a model, a pipeline or a handle.
    OWN_FORWARD = _Words(None, "{detail}")
    COMPILED_WHOLE = _Words(
        None,
        "{detail} is compiled as a whole, and compiled code is left alone: nothing in it is cached. Compile its blocks "
        "instead: model.compile_repeated_blocks().",
    )
    OTHER_VERSION = _Words(None, "{detail}")
    ASLEEP = _Words(
        None,
        "inside another library's wrapper, and asleep there: {detail}. Calls are passed through, and remove() called "
        "again after that library's own removal leaves nothing behind.",
    )
    STEP_CACHE = _Words("{detail}", "step cache of {site}: {detail}")
    IN_WORKER = _Words(None, "{detail}")


@dataclass(frozen=True)
class Finding:
    """One thing that was noticed.

    Args:
        kind: what was noticed.
        site: of which site, as its address or with its spec and file; or of which model.
        detail: what the words of the kind have room for.
        count: how often.
    """

    kind: FindingKind
    site: str = ""
    detail: str = ""
    count: int = 0

    @property
    def note(self) -> str:
        """The finding as the report notes it below the row of its site."""
        return self.kind.value.note.format(site=self.site, detail=self.detail, count=self.count)

    @property
    def warning(self) -> str:
        """The finding as a warning says it, without the prefix by which users know our warnings."""
        return self.kind.value.warning.format(site=self.site, detail=self.detail, count=self.count)


class DitPatchWarning(UserWarning):
    """A warning of dit_patch; `finding` is what it is about."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(f"dit_patch: {finding.warning}")
        self.finding = finding

    def __reduce__(self):
        return type(self), (self.finding,)


def warn(finding: Finding, stacklevel: int = 1) -> None:
    """Warn of the finding; `stacklevel` as for `warnings.warn`, from the caller's view."""
    warnings.warn(DitPatchWarning(finding), stacklevel=stacklevel + 1)
