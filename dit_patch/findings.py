"""What can be noticed about a site, a model or a step cache: values for code to read, and the words for each kind.

`FindingKind` is the one table of these words: what the report notes, and what a warning says. Code asks for the kind
and never looks into a sentence.

    warn(Finding(FindingKind.UNREACHED, site="rope.forward", detail="WanTransformer3DModel"))
"""

from __future__ import annotations

import enum
import logging
import warnings
from dataclasses import asdict, dataclass
from typing import Any

LOGGER = logging.getLogger("dit_patch")
"""What is warned of is logged, too, for servers, whose warnings nobody reads; and what was patched, at level INFO."""
LOGGER.addHandler(logging.NullHandler())

_NOT_REACHED = "{site} was not reached in {detail}.forward; "


def _of_step_cache(words: str) -> tuple[str, str]:
    return words, "step cache of {site}: " + words


@enum.unique
class FindingKind(enum.Enum):
    """The kinds of findings, each with its words.

    `note` is what the report says, `warning` what a warning says, as templates over the fields of a `Finding`; None
    where a kind is never noted, or never warned of.
    """

    def __init__(self, note: str | None, warning: str | None = None) -> None:
        self.note, self.warning = note, warning

    def __reduce_ex__(self, protocol: int):  # by its name: the words are another matter, and may change
        return getattr, (FindingKind, self.name)

    # Of a site that is not, or not any more, at work.
    ABSENT = "not in this model"
    ABSENT_STAGE = "not in this pipeline"
    NEEDS_FORWARD = "left alone: it counts on the forward that {detail} replaces"
    OTHER_FORWARD = "not in {detail}, which has a forward of its own"
    FOREIGN_LAYER = "left alone: a {detail} stands there, whose arguments have other names"
    OTHER_SOURCE = (
        "{detail} is for another version of the original, and not used",
        "{site}: the original's source is {detail}; the original is used.",
    )
    COMPILED = "inside compiled code, which is left alone"
    DISPLACED = (
        "displaced by another library; apply() again",
        _NOT_REACHED + "something replaced it after apply()\n"
        "    (accelerate's remove_hook_from_module does). Call dit_patch.apply(...) again.",
    )
    REPLACED = (
        "another module stands in its place since apply(); apply() again",
        "{site}: {detail} has another module in its place since apply(), so nothing of it is cached. "
        "Call dit_patch.apply(...) again.",
    )
    MODEL_REPLACED = (
        "the pipeline has another {detail} since apply(); apply() again",
        "the pipeline has another {site} since apply(), a {detail}, which is not patched. "
        "Call dit_patch.apply(...) again.",
    )
    UNREACHED = ("not reached", _NOT_REACHED + "this forward does not call it, so nothing of it is cached.")

    # Why a site was switched off.
    WRITTEN_INTO = (
        "somebody wrote into a cached result; the site is switched off",
        "{site}: somebody wrote into a cached result; the site is switched off.",
    )
    TOO_COARSE = (
        "a cached result differs from a fresh one: its key is too coarse. Switched off",
        "{site}: a cached result differs from a fresh one: its key is too coarse. Switched off.",
    )
    REPLACEMENT_FAILED = ("its replacement {detail}", "{site} {detail}; the original is used.")

    # Of a site at work.
    SWITCHED_OFF = "switched off: {detail}"
    BYPASSED = "bypassed {count}: {detail}"
    NEVER_HIT = "never hit: something in its key differs at each call"
    NEVER_HIT_TIMESTEP = "never hit: the timestep is a new tensor at each forward, as it is without CFG"
    NEVER_HIT_CONTEXT = "never hit: the conditioning is a new tensor at each forward"
    NOT_CALLED = "not called so far"
    STAND_IN = "never read: a stand-in is handed out"
    EVICTED = "{count} results given up for others; a larger max_bytes would keep them"
    FIXED = "fix on: {detail}"

    # Of a model, a pipeline or a handle.
    OWN_FORWARD = (None, "{site} has a forward of its own, other than that of {detail}.")
    COMPILED_WHOLE = (
        None,
        "{detail} is compiled as a whole, and compiled code is left alone: nothing in it is cached. Compile its blocks "
        "instead: model.compile_repeated_blocks().",
    )
    OTHER_VERSION = (None, "{site} needs {detail}")
    ASLEEP = (
        None,
        "inside another library's wrapper, and asleep there: {detail}. Calls are passed through, and remove() called "
        "again after that library's own removal leaves nothing behind.",
    )
    PLUGIN_FAULT = (None, "the specs of the installed package {site} are left out: {detail}")
    IN_WORKER = (None, "{site}: {detail}")

    # Of a step cache.
    LEFT_UNCACHED = _of_step_cache("left uncached: {detail}")
    NOTHING_CACHED = _of_step_cache("nothing cached: {detail}")
    FORWARD_REPLACED = _of_step_cache(
        "something replaced the model's forward after apply(), so nothing was cached; call apply() again"
    )
    COMPILED_LATER = _of_step_cache(
        "it was compiled as a whole after apply(), and compiled code always runs all blocks: nothing will be cached. "
        "Compile its blocks instead: model.compile_repeated_blocks()"
    )
    NO_MASK = _of_step_cache("{detail}; all are computed")
    LITTLE_MEMORY = _of_step_cache("a step cache of two passes takes {detail}, more than is free")
    LEFT_ALONE_IN_CAPTURE = "left alone while a CUDA graph is captured: a decision waits for the device"
    LEFT_ALONE_BY_AUTOGRAD = "left alone while autograd records"
    NOT_EQUAL_UNCACHED = "refused: not equal to the uncached model"
    NOT_REPEATABLE = "the uncached model does not repeat itself bit for bit, so that nothing could be proved"
    MEMORY = "will hold at most {detail} for each pass of this size"


@dataclass(frozen=True)
class Finding:
    """One thing that was noticed.

    Args:
        kind: what was noticed.
        site: of which site, as its address or with its spec and file; or of which model, spec or rank.
        detail: what more there is to say, as the words of the kind have it.
        count: how often.
    """

    kind: FindingKind
    site: str = ""
    detail: str = ""
    count: int = 0

    @property
    def note(self) -> str:
        """What the report says below the row of the site; only of kinds that are noted."""
        return self.kind.note.format(site=self.site, detail=self.detail, count=self.count)

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as JSON can hold it."""
        return {**asdict(self), "kind": self.kind.name.lower()}

    @property
    def warning(self) -> str:
        """What a warning says after the prefix by which users know our warnings; only of kinds that are warned of."""
        return self.kind.warning.format(site=self.site, detail=self.detail, count=self.count)


class DitPatchWarning(UserWarning):
    """A warning of dit_patch; `finding` says what it is about."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(f"dit_patch: {finding.warning}")
        self.finding = finding

    def __reduce__(self):
        return type(self), (self.finding,)


def warn(finding: Finding, stacklevel: int = 1) -> None:
    """Warn of the finding; `stacklevel` as for `warnings.warn`, from the caller's view."""
    LOGGER.warning(finding.warning)
    warnings.warn(DitPatchWarning(finding), stacklevel=stacklevel + 1)
