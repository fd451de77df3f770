"""A spec tried on models, patched against unpatched: what its sites did, and what is wrong with it."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import isfinite

import torch

from ...errors import DitPatchError, SiteError, StepCacheError, VersionError
from ...findings import DitPatchWarning, FindingKind
from ...handle import Handle, Options, check_versions, patch
from ...memo.store import Budget
from ...sites.bind import bind
from ...sites.binding import Binding
from ...sites.memoised import MemoisedSite
from ...sites.patch import Patch
from ...spec import mini
from ...spec.address import StageAddress
from ...spec.model import Site, Spec
from ...step_cache import StepCache
from .. import verify
from . import blocks, probe
from .cases import Subject

STEPS, TURNS, BYTES = 3, 3, 1 << 30
_COARSE = ": its key is too coarse"


@dataclass
class SiteRecord:
    """What one site did in all trials together; `seconds` is the shortest time of computing one result."""

    site: Site
    calls: int = 0
    hits: int = 0
    seconds: float = float("inf")
    equal: bool = True
    present: bool = False
    finer: str | None = None
    too_coarse: bool = False
    unreached: dict[str, None] = field(default_factory=dict)
    bypassed: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)


@dataclass
class Result:
    """What came of it: a record per site, a line per trial, and everything that is wrong."""

    spec: Spec
    sites: dict[str, SiteRecord]
    trials: list[str] = field(default_factory=list)
    problems: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)


def run(
    spec: Spec, subjects: Sequence[Subject], *, device: torch.device | str = "cpu", say: Callable[[str], None] = print
) -> Result:
    """Try the spec on each subject in each of its dtypes."""
    result = Result(spec, {site.at: SiteRecord(site) for site in spec.sites})
    try:
        check_versions(spec, strict=True)
        mini.model_class(spec)
    except VersionError as error:
        result.problems[str(error)] = None
        return result
    except ImportError as error:
        result.problems[f"{spec.position('model')}: {error}"] = None
        return result
    for subject in subjects:
        for dtype in subject.dtypes:
            line = _Trial(result, subject, dtype, device).run()
            if line is not None:
                result.trials.append(line)
                say(line)
    _judge(result, whole=all(subject.own for subject in subjects))
    return result


class _Trial:
    """One subject in one dtype."""

    def __init__(self, result: Result, subject: Subject, dtype: torch.dtype, device: torch.device | str) -> None:
        self.result, self.subject, self.dtype, self.device = result, subject, dtype, device
        self.spec = result.spec
        self.finer: dict[str, str] = {}
        self.where = f"{subject.name}, {str(dtype).removeprefix('torch.')}"

    def run(self) -> str | None:
        """What came of it, in a line; None where the model cannot be had at all, which is a problem."""
        try:
            model = self.subject.build(self.spec, self.dtype, self.device)
            case, options = self.subject.case, {"dtype": self.dtype, "device": self.device}
            forwards, moments = probe.generations(case, STEPS, **options)
            single = list(mini.forwards(case, case.sizes[0], steps=STEPS, passes=mini.PASSES[:1], **options))
            with self._around():
                plain = verify.run(model, forwards)
        except DitPatchError as error:
            return self._problem(f"{self.subject.name}: {error}")
        except Exception as error:  # of the model's own, whatever it is
            what = f"the unpatched model cannot be built or called so: {type(error).__name__}: {error}"
            if self.dtype is self.subject.dtypes[0]:
                return self._problem(f"{self.subject.name}: {what}")
            return f"{self.where:<34}  not tried: {what}"
        spec, patches = self._bind(model)
        with self._around():
            self._probe(model, patches, forwards, moments)
            wrong = blocks.problems(model, self.spec, mini.repeat(forwards))
            for problem in wrong:
                self._problem(problem)
            equal = self._patched(model, spec, forwards, plain, "always", steps=len(set(moments)))
            equal = self._patched(model, spec, forwards, plain, "first") and equal
            equal = self._patched(model, spec, single, verify.run(model, single), "first") and equal
            said = [f"{len(forwards)} forwards", f"equal: {_yes(equal)}"]
            if self.dtype is self.subject.dtypes[0]:
                said += self._times(model, spec, forwards)
                said += self._stepped(model, forwards, plain) if not wrong else []
        return f"{self.where:<34}  {'  '.join(said)}"

    def _around(self) -> AbstractContextManager:
        return mini.autocast(self.spec, self.dtype, self.device)

    def _bind(self, model: torch.nn.Module) -> tuple[Spec, list[MemoisedSite]]:
        """The spec without the sites that cannot be bound here, and the patches of the others."""
        good, patches = [], []
        binding = Binding.of(self.spec, model, Budget(BYTES))
        for site in self.spec.sites:
            record = self.result.sites[site.at]
            try:
                with self._heard():
                    made, note = bind(self.spec, site, binding, model)
            except SiteError as error:
                record.equal = False
                self._problem(str(error))
                continue
            if note is None or note.kind not in (FindingKind.ABSENT, FindingKind.ABSENT_STAGE):
                record.present = True
                if note:
                    record.notes[note.note] = None
            good.append(site)
            patches += [each for each in made if isinstance(each, MemoisedSite) and site.key]
        return self.spec.model_copy(update={"sites": tuple(good)}), patches

    def _probe(self, model: torch.nn.Module, patches: list[MemoisedSite], forwards: list[dict], moments: list) -> None:
        calls = probe.record(model, self.spec, patches, mini.repeat(forwards), moments)
        for at, several in calls.items():
            site = self.result.sites[at].site
            for own in several:
                self._too_coarse(site, own)
        if self.dtype is self.subject.dtypes[0] and self.subject.weights is None:
            keys = {patch.site.at: patch.site.key for patch in patches}
            for at, causes in probe.uncounted(model, self.spec, patches, mini.repeat(forwards)[0], keys).items():
                self._uncounted(self.result.sites[at], causes)

    def _too_coarse(self, site: Site, calls: list[probe.Call]) -> None:
        found = probe.too_coarse(calls, site.key)
        if found is not None:
            one, other, finer = found
            record = self.result.sites[site.at]
            record.equal, record.too_coarse = False, True
            remedy = f"`{finer}` would tell them apart" if finer else "no one argument tells them apart; see `reads`"
            self._problem(
                f"{self.spec.label(site)}{_COARSE}: it takes the calls in forwards {one.forward} and "
                f"{other.forward} of the {self.subject.name} for the same, and their results differ; {remedy}"
            )
        elif (coarser := probe.too_fine(calls, site.key)) is not None:
            self.finer[site.at] = coarser

    def _uncounted(self, record: SiteRecord, causes: list[str]) -> None:
        record.equal = False
        where = f"{self.spec.label(record.site)}{_COARSE}"
        arguments = [cause for cause in causes if cause.startswith("model.")]
        weights = [cause for cause in causes if cause not in arguments]
        if arguments and not record.too_coarse:
            record.too_coarse = True
            missing = ", ".join(f"{name}: [identity]" for name in arguments)
            self._problem(f"{where}: its results change with arguments of the model that do not count: `{missing}`")
        if weights:
            self._problem(
                f"{where}: its arguments are computed with weights that do not count; "
                f"`reads: [{', '.join(weights)}]` would have them counted"
            )

    def _patched(
        self, model: torch.nn.Module, spec: Spec, forwards: list[dict], plain: list, check: str, steps: int = 0
    ) -> bool:
        """Whether the patched model gives the same; what its sites did is noted where every hit is computed again."""
        try:
            with self._heard(), self._patch(model, spec, check) as handle:
                ours = verify.run(model, forwards)
                if check == "always":
                    self._note(handle, steps)
        except DitPatchError as error:
            self._problem(str(error))
            return False
        where = verify.first_difference(plain, ours)
        if where is not None:
            self._problem(f"{self.where}: forward {where} of the patched model differs from the unpatched one's")
        return where is None

    def _note(self, handle: Handle, steps: int) -> None:
        [patched] = handle.patched_models
        for row in handle.stats():
            record = self.result.sites[row.at]
            calls = row.hits + row.misses + sum(row.bypassed.values())
            if not calls and patched.sites.get(row.at):
                record.unreached[self.subject.name] = None
            record.calls += calls
            # Where it gets what another site has kept, only the patched model shows how often the key is new.
            if row.at in self.finer and row.misses >= steps * row.targets:
                record.finer = (
                    "its key is finer than needed: it is a new one at each step, though the results repeat. For the "
                    f"calls seen here this would do: {self.finer[row.at]}"
                )
            record.hits += row.hits
            for site_patch in patched.sites.get(row.at, ()):
                memo = site_patch.memo
                record.seconds = min(record.seconds, memo.seconds)
                unequal = _gave_way(site_patch)
                if memo.off or unequal:
                    record.equal = False
            for reason in row.bypassed:
                record.bypassed[f"bypassed: {reason}"] = None

    def _times(self, model: torch.nn.Module, spec: Spec, forwards: list[dict]) -> list[str]:
        """Unpatched over patched time of all forwards, medians of turns side by side."""
        times: dict[bool, list[float]] = {True: [], False: []}
        with warnings.catch_warnings(), suppress(DitPatchError):
            warnings.simplefilter("ignore")
            for _ in range(TURNS):
                for patched in (False, True):
                    with self._patch(model, spec, "first") if patched else nullcontext():
                        start = time.perf_counter()
                        verify.run(model, forwards)
                        times[patched].append(time.perf_counter() - start)
        if not times[True]:
            return []
        return [f"time unpatched / patched: {statistics.median(times[False]) / statistics.median(times[True]):.2f}"]

    def _stepped(self, model: torch.nn.Module, forwards: list[dict], plain: list) -> list[str]:
        """With a step cache that may skip nothing the model's own bits must come out, as with none."""
        rule = self.spec.step_cache
        if not self.spec.blocks or (rule is not None and not rule.supported) or find_spec("cache_dit") is None:
            return []
        if any(len(model.get_submodule(each.at)) < 2 for each in self.spec.blocks):
            return []  # in this mini there is none to skip
        nothing = StepCache(fn=1, warmup=0, threshold=0.0, min_steps=0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with self._patch(model, self.spec.model_copy(update={"sites": ()}), "first", nothing):
                    where = verify.first_difference(plain, verify.run(model, forwards))
        except StepCacheError as error:
            self._problem(f"step cache: {error}")
            return ["equal with a step cache that skips nothing: NO"]
        if where is not None:
            self._problem(f"{self.where}: forward {where} differs with a step cache that skips nothing")
        return [f"equal with a step cache that skips nothing: {_yes(where is None)}"]

    def _patch(self, model: torch.nn.Module, spec: Spec, check: str, step_cache: StepCache | None = None) -> Handle:
        options = Options(max_bytes=BYTES, check=check, step_cache=step_cache)
        return patch(model, {"model": (model, spec)}, options)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Whatever dit_patch warns of inside is a problem, once."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for each in caught:
            finding = each.message.finding if isinstance(each.message, DitPatchWarning) else None
            if finding is None or finding.kind is FindingKind.UNREACHED or finding.kind is FindingKind.DISPLACED:
                continue  # what is not reached is judged in the end
            # Where a key is too coarse, the probe has said so already, and what would help.
            if finding.kind is not FindingKind.TOO_COARSE or finding.site not in self._coarse():
                self._problem(finding.warning)

    def _coarse(self) -> set[str]:
        """Return the sites whose key is known to be too coarse, as findings name them."""
        return {self.spec.label(each.site) for each in self.result.sites.values() if each.too_coarse}

    def _problem(self, text: str) -> None:
        self.result.problems[text] = None


def _judge(result: Result, *, whole: bool) -> None:
    """What can only be said when all trials are over. `whole`: the spec's minis were all tried."""
    for record in result.sites.values():
        site = record.site
        called = result.spec.label(site)
        if not record.equal or any(called in problem for problem in result.problems):
            continue
        if isinstance(site.address, StageAddress):
            record.notes["a method of the pipeline's stages; there is no pipeline here"] = None
        elif site.accelerator and not record.calls:
            record.notes["only where the model runs on an accelerator"] = None
        elif not record.present:
            if whole:
                result.problems[f"{called}: in none of the minis; is it misspelt, or a variant missing?"] = None
        elif not record.calls:
            if whole and not site.optional:
                result.problems[f"{called}: is never reached: no forward of any mini calls it"] = None
            else:
                record.notes["not reached here"] = None
        elif record.unreached and not site.optional:
            where = ", ".join(record.unreached)
            result.problems[f"{called}: is not reached in {where}; say `optional: true` if that is right"] = None
        elif record.finer:
            result.problems[f"{called}: {record.finer}"] = None
        elif not record.hits:
            result.problems[f"{called}: never hits: {_why(record)}"] = None


def _gave_way(patch: Patch) -> bool:
    """Return whether the site was to have a replacement, and calls the original."""
    replacement = getattr(patch, "replacement", None)
    return bool(patch.site.use) and (replacement is None or replacement.function is None)


def _why(record: SiteRecord) -> str:
    return "; ".join(record.bypassed) or "its results differ from call to call, and there is nothing to keep"


def text(result: Result) -> str:
    """The table of sites, where any trial came about, and the problems."""
    count = len(result.problems)
    lines = [*_table(result), ""] if result.trials else []
    lines += [f"problem: {problem}" for problem in result.problems]
    lines.append(f"{count} problem{'' if count == 1 else 's'}" if count else "no problems found")
    return "\n".join(lines)


def _table(result: Result) -> list[str]:
    width = max((len(at) for at in result.sites), default=4)
    lines = [f"  {'site':<{width}}  {'kind':<8}  {'calls':>6}  {'hits':>6}  {'equal':<5}  one result"]
    for at, record in result.sites.items():
        equal = "NO" if not record.equal else "yes" if record.hits else "-"
        took = f"{record.seconds * 1e6:.0f} us" if isfinite(record.seconds) else "-"
        lines.append(f"  {at:<{width}}  {record.site.kind:<8}  {record.calls:>6}  {record.hits:>6}  {equal:<5}  {took}")
        lines += [f"  {'':<{width}}    {note}" for note in (*record.notes, *record.bypassed)]
    return lines


def _yes(equal: bool) -> str:
    return "yes" if equal else "NO"
