"""Try a spec on models, patched against unpatched, and record what its sites do and what is wrong."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.util import find_spec

import torch

from ...errors import DitPatchError, SiteError, StepCacheError, VersionError
from ...findings import DitPatchWarning, FindingKind
from ...handle import Handle, Options, check_versions, patch_models
from ...memo.store import Budget
from ...sites.bind import bind
from ...sites.binding import Binding
from ...sites.patch import AttributePatch, Patch
from ...spec import mini
from ...spec.model import Site, Spec
from ...step_cache import StepCache
from .. import verify
from . import blocks, probe
from .cases import Subject
from .judge import judge
from .results import Problem, ProblemKind, Result, SiteRecord
from .text import yes_or_no

STEPS, TURNS, BYTES = 3, 3, 1 << 30


def try_spec(
    spec: Spec, subjects: Sequence[Subject], *, device: torch.device | str = "cpu", say: Callable[[str], None] = print
) -> Result:
    """Try the spec on each subject in each of its dtypes; `say` is called with a line for each."""
    result = Result.empty(spec)
    try:
        check_versions(spec, strict=True)
        mini.model_class(spec)
    except VersionError as error:
        result.add_message(str(error))
        return result
    except ImportError as error:
        result.add_message(f"{spec.position('model')}: {error}")
        return result
    for subject in subjects:
        for dtype in subject.dtypes:
            line = _Trial(result, subject, dtype, device).run()
            if line is not None:
                result.trials.append(line)
                say(line)
    judge(result, has_all_minis=all(subject.is_own_mini for subject in subjects))
    return result


class _Trial:
    """The trial of one subject in one dtype."""

    def __init__(self, result: Result, subject: Subject, dtype: torch.dtype, device: torch.device | str) -> None:
        self.result, self.subject, self.dtype, self.device = result, subject, dtype, device
        self.spec = result.spec
        self.coarser_keys: dict[str, str] = {}  # by the addresses of sites whose own key is new at each step
        self.name = f"{subject.name}, {str(dtype).removeprefix('torch.')}"

    def run(self) -> str | None:
        """Run the trial; return its line, or None where the model cannot be built at all, which is a problem."""
        try:
            model = self.subject.build(self.spec, self.dtype, self.device)
            case, options = self.subject.case, {"dtype": self.dtype, "device": self.device}
            forwards, moments = probe.generations(case, STEPS, **options)
            single = list(mini.forwards(case, case.sizes[0], steps=STEPS, passes=mini.PASSES[:1], **options))
            with self._autocast():
                plain = verify.run(model, forwards)
        except DitPatchError as error:
            return self.result.add(Problem(ProblemKind.NOT_BUILT, subject=self.subject.name, detail=str(error)))
        except Exception as error:  # of the model's own, whatever it is
            detail = f"{type(error).__name__}: {error}"
            if self.dtype is self.subject.dtypes[0]:
                return self.result.add(Problem(ProblemKind.NOT_CALLABLE, subject=self.subject.name, detail=detail))
            return f"{self.name:<34}  not tried: the unpatched model cannot be built or called so: {detail}"
        spec, patches = self._bind(model)
        with self._autocast():
            self._probe(model, patches, forwards, moments)
            block_problems = blocks.block_problems(model, self.spec, mini.repeat(forwards))
            for problem in block_problems:
                self.result.add_message(problem)
            equal = self._patched(model, spec, forwards, plain, "always", steps=len(set(moments)))
            equal = self._patched(model, spec, forwards, plain, "first") and equal
            equal = self._patched(model, spec, single, verify.run(model, single), "first") and equal
            columns = [f"{len(forwards)} forwards", f"equal: {yes_or_no(equal)}"]
            if self.dtype is self.subject.dtypes[0]:
                columns += self._times(model, spec, forwards)
                columns += self._step_cached(model, forwards, plain) if not block_problems else []
        return f"{self.name:<34}  {'  '.join(columns)}"

    def _autocast(self) -> AbstractContextManager:
        return mini.autocast(self.spec, self.dtype, self.device)

    def _bind(self, model: torch.nn.Module) -> tuple[Spec, list[AttributePatch]]:
        """Return the spec without the sites that cannot be bound here, and what has a key among the others."""
        good, patches = [], []
        binding = Binding.of(self.spec, model, Budget(BYTES))
        for site in self.spec.sites:
            record = self.result.sites[site.at]
            try:
                with self._warnings_as_problems():
                    made, note = bind(self.spec, site, binding, model)
            except SiteError as error:
                record.equal = False
                self.result.add_message(str(error))
                continue
            if note is None or note.kind not in (FindingKind.ABSENT, FindingKind.ABSENT_STAGE):
                record.present = True
                if note:
                    record.notes[note.note] = None
            good.append(site)
            patches += [each for each in made if isinstance(each, AttributePatch) and site.key]
        return self.spec.model_copy(update={"sites": tuple(good)}), patches

    def _probe(
        self, model: torch.nn.Module, patches: list[AttributePatch], forwards: list[dict], moments: list
    ) -> None:
        calls = probe.record_calls(model, self.spec, patches, mini.repeat(forwards), moments)
        for at, several in calls.items():
            site = self.result.sites[at].site
            for calls_of_one in several:
                self._judge_key(site, calls_of_one)
        if self.dtype is self.subject.dtypes[0] and self.subject.weights is None:
            keys = {patch.site.at: patch.site.key for patch in patches}
            for at, causes in probe.missing_from_keys(
                model, self.spec, patches, mini.repeat(forwards)[0], keys
            ).items():
                self._uncounted(self.result.sites[at], causes)

    def _judge_key(self, site: Site, calls: list[probe.Call]) -> None:
        """Record that the site's key is too coarse, or what coarser key would do."""
        found = probe.too_coarse(calls, site.key)
        if found is not None:
            one, other, finer = found
            record = self.result.sites[site.at]
            record.equal, record.too_coarse = False, True
            remedy = f"`{finer}` would tell them apart" if finer else "no one argument tells them apart; see `reads`"
            self.result.add(
                Problem(
                    ProblemKind.TOO_COARSE,
                    site=self.result.label(record),
                    subject=self.subject.name,
                    detail=remedy,
                    forward=one.forward,
                    other_forward=other.forward,
                )
            )
        elif (coarser := probe.too_fine(calls, site.key)) is not None:
            self.coarser_keys[site.at] = coarser

    def _uncounted(self, record: SiteRecord, causes: list[str]) -> None:
        """Record that the site's results change with these arguments and weights, and its key does not."""
        record.equal = False
        label = self.result.label(record)
        arguments = [cause for cause in causes if cause.startswith("model.")]
        weights = [cause for cause in causes if cause not in arguments]
        if arguments and not record.too_coarse:
            record.too_coarse = True
            missing = ", ".join(f"{name}: [identity]" for name in arguments)
            self.result.add(Problem(ProblemKind.MISSING_ARGUMENTS, site=label, detail=missing))
        if weights:
            self.result.add(Problem(ProblemKind.MISSING_WEIGHTS, site=label, detail=", ".join(weights)))

    def _patched(
        self, model: torch.nn.Module, spec: Spec, forwards: list[dict], plain: list, check: str, steps: int = 0
    ) -> bool:
        """Return whether the patched model gives the same; with `check="always"` record what its sites did."""
        try:
            with self._warnings_as_problems(), self._patch(model, spec, check) as handle:
                ours = verify.run(model, forwards)
                if check == "always":
                    self._record(handle, steps)
        except DitPatchError as error:
            self.result.add_message(str(error))
            return False
        difference = verify.first_difference(plain, ours)
        if difference is not None:
            self.result.add(Problem(ProblemKind.OUTPUT_DIFFERS, subject=self.name, forward=difference))
        return difference is None

    def _record(self, handle: Handle, steps: int) -> None:
        [patched] = handle.patched_models
        for row in handle.stats():
            record = self.result.sites[row.at]
            calls = row.hits + row.misses + sum(row.bypassed.values())
            if not calls and patched.sites.get(row.at):
                record.unreached[self.subject.name] = None
            record.calls += calls
            # Only the patched model shows how often the key of a site is new that gets another site's cached result.
            if row.at in self.coarser_keys and row.misses >= steps * row.targets:
                record.coarser_key = self.coarser_keys[row.at]
            record.hits += row.hits
            for site_patch in patched.sites.get(row.at, ()):
                memo = site_patch.memo
                record.seconds = min(record.seconds, memo.seconds)
                if memo.off or _lost_replacement(site_patch):
                    record.equal = False
            for reason in row.bypassed:
                record.bypassed[f"bypassed: {reason}"] = None

    def _times(self, model: torch.nn.Module, spec: Spec, forwards: list[dict]) -> list[str]:
        """Return unpatched over patched time of all forwards, the medians of turns side by side, in words."""
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

    def _step_cached(self, model: torch.nn.Module, forwards: list[dict], plain: list) -> list[str]:
        """Return in words whether a step cache that skips nothing leaves the model's bits; nothing if it has none."""
        rule = self.spec.step_cache
        if not self.spec.blocks or (rule is not None and not rule.supported) or find_spec("cache_dit") is None:
            return []
        if any(len(model.get_submodule(each.at)) < 2 for each in self.spec.blocks):
            return []  # this mini has no block to skip
        nothing = StepCache(fn=1, warmup=0, threshold=0.0, min_steps=0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with self._patch(model, self.spec.model_copy(update={"sites": ()}), "first", nothing):
                    difference = verify.first_difference(plain, verify.run(model, forwards))
        except StepCacheError as error:
            self.result.add(Problem(ProblemKind.STEP_CACHE_REFUSED, detail=str(error)))
            return ["equal with a step cache that skips nothing: NO"]
        if difference is not None:
            self.result.add(Problem(ProblemKind.STEP_CACHE_DIFFERS, subject=self.name, forward=difference))
        return [f"equal with a step cache that skips nothing: {yes_or_no(difference is None)}"]

    def _patch(self, model: torch.nn.Module, spec: Spec, check: str, step_cache: StepCache | None = None) -> Handle:
        options = Options(max_bytes=BYTES, check=check, step_cache=step_cache)
        return patch_models(model, {"model": (model, spec)}, options)

    @contextmanager
    def _warnings_as_problems(self) -> Iterator[None]:
        """Turn every warning inside into a problem."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for each in caught:
            finding = each.message.finding if isinstance(each.message, DitPatchWarning) else None
            if finding is None or finding.kind is FindingKind.UNREACHED or finding.kind is FindingKind.DISPLACED:
                continue  # what is not reached is judged in the end
            # Where a key is too coarse, the probe has said so already, and what would help.
            if finding.kind is not FindingKind.TOO_COARSE or finding.site not in self.result.too_coarse_sites:
                self.result.add_message(finding.warning)


def _lost_replacement(patch: Patch) -> bool:
    """Return whether the site calls the original although its spec names a replacement."""
    replacement = getattr(patch, "replacement", None)
    return bool(patch.site.use) and (replacement is None or replacement.function is None)
