"""`apply` and the `Handle` it returns: the transaction that patches a pipeline, its report, and the way back.

Everything is checked before anything is changed, and whatever fails half way is undone. A model finds its handle
through its own hooks; there is no table of handles.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from packaging.requirements import Requirement

from ..errors import DitPatchError, UnsupportedModelError, VersionError, quote, suggest
from ..memo.lookup import CHECKS
from ..memo.store import Budget
from ..report.rows import SiteStats, site_stats, text
from ..sites import layers, resolve, scope
from ..sites.bind import ABSENT, ABSENT_STAGE, live
from ..sites.patch import Patch
from ..sites.scope import Frame, Scope, forget_copies, scope_of
from ..sites.span import Span
from ..spec.model import Site, Spec
from ..spec.registry import Registry
from ..step_cache import StepCache
from ..step_cache.live import Stepping
from ..step_cache.stats import StepStats
from ..upstream.torch_internals import is_compiled

if TYPE_CHECKING:
    from ..launch.workers import RemoteHandle

_MODEL_EDITS = ("fuse_lora", "unfuse_lora", "unload_lora")
_PIPELINE_EDITS = ("set_lora_adapter", "merge_lora_weights", "unmerge_lora_weights")
"""Methods that change weights through `.data`, which leaves no version behind: the caches are dropped after each."""


@dataclass(frozen=True)
class Options:
    """What `apply` was asked for; asking again for the same returns the same handle."""

    only: tuple[str, ...] | None
    specs: tuple[str, ...] | None
    max_bytes: int
    check: str
    fixes: bool
    directories: tuple[str, ...]
    step_cache: StepCache | None = None


def apply(
    target: Any,
    *,
    only: Iterable[str] | None = None,
    max_bytes: int = 256 << 20,
    check: str = "first",
    fixes: bool = False,
    strict: bool = True,
    specs: Iterable[str | PathLike] = (),
    trust: bool = False,
    step_cache: StepCache | str | Mapping[str, Any] | None = None,
) -> Handle | RemoteHandle:
    """Patch the transformers of `target` so that what does not change between steps is computed once: same bits out.

    Called again with the same options it returns the same handle, and puts back what another library has displaced.

    Args:
        target: a diffusers or FastVideo pipeline, or a bare transformer, compiled or distributed ones too; or a
            FastVideo `VideoGenerator`, whose models are patched in its worker processes.
        only: kinds of sites to patch, of "rope", "timestep", "mask", "context", "rotary", "kv_cache"; or names of
            specs, such as "diffusers/wan", whose models alone are patched then. All by default, but for specs that
            are `off_by_default`, which have to be named.
        max_bytes: what all caches of this handle may hold together, in bytes.
        check: "first" computes the first hit of each new signature again and compares it bit for bit, "always" every
            hit, "never" none.
        fixes: also bind per-call overrides where upstream ignores them (`bind:` in a spec); this may change results.
        strict: refuse to patch with versions that a spec's `requires` excludes; otherwise only warn.
        specs: further directories with specs.
        trust: let specs from `specs` name functions outside dit_patch in `use:`.
        step_cache: also skip blocks where a step changes little, which **changes the output**: a preset ("quality",
            "balanced", "performance"), a `StepCache`, or a mapping of its knobs. Off by default.

    Raises:
        UnsupportedModelError: no spec for any model in `target`, or no way to reach its workers.
        SiteError: a spec does not fit the model. Nothing stays patched.
        VersionError: an installed package is outside the spec's `requires`.
        StepCacheError: step caching was asked for, and cannot be had on one of the models; it says why.
        DitPatchError: already patched with other options, or an option that does not exist.
    """
    from ..launch import workers  # which uses this module in the workers

    if workers.is_remote(target):
        return workers.apply(
            target,
            only=only,
            max_bytes=max_bytes,
            check=check,
            fixes=fixes,
            strict=strict,
            specs=specs,
            trust=trust,
            step_cache=StepCache.of(step_cache),
        )
    specs = (specs,) if isinstance(specs, (str, PathLike)) else tuple(specs)
    registry = Registry(specs, trust=trust)
    options = _options(only, max_bytes, check, fixes, specs, StepCache.of(step_cache), registry)
    found = with_specs(resolve.models(target), registry, options.specs)
    existing = _existing([model for model, _ in found.values()], options)
    if existing is not None:
        existing.repair(target)
        existing._watch(target, _PIPELINE_EDITS)
        return existing
    for _, spec in found.values():
        check_versions(spec, strict)
    return patch(target, found, options)


def patch(target: Any, found: Mapping[str, tuple[torch.nn.Module, Spec]], options: Options) -> Handle:
    """Patch models of `target`, each by the spec that comes with it: all that `apply` does once it knows what to do."""
    with ExitStack() as undo:
        handle = Handle(options)
        undo.callback(handle._take_back)
        for name, (model, spec) in found.items():
            forget_copies(model)
            handle._add(name, model, spec, target)
        handle._watch(target, _PIPELINE_EDITS)
        undo.pop_all()
    if not options.step_cache and not any(member.patches for member in handle._members):
        handle.remove()
        names = ", ".join(dict.fromkeys(spec.name for _, spec in found.values()))
        what = f"site of kind {' or '.join(options.only)}" if options.only else "site"
        raise DitPatchError(f"nothing to patch: no {what} of {names} is in {', '.join(found)}")
    for name, (model, _) in found.items():
        if resolve.compiled_in(target, model):
            warnings.warn(
                f"dit_patch: {name} ({type(model).__name__}) is compiled as a whole, and compiled code is left alone: "
                "nothing in it is cached. Compile its blocks instead: model.compile_repeated_blocks().",
                stacklevel=3,
            )
    return handle


class Member:
    """One patched model of a handle: its spec, its live sites and the scope that watches its forward."""

    def __init__(self, handle: Handle, name: str, model: torch.nn.Module, spec: Spec) -> None:
        self.handle, self.name, self.model, self.spec = handle, name, model, spec
        self.sites: dict[str, list[Patch | Span]] = {}
        self.notes: dict[str, str] = {}
        self.scope: Scope | None = None
        self.stepping: Stepping | None = None
        self.ran = False
        self._reached: set[str] = set()
        self._warned: set[str] = set()
        self._looked_for: set[str] = set()
        self._device: torch.device | None = None

    @property
    def patches(self) -> list[Patch | Span]:
        return [patch for patches in self.sites.values() for patch in patches]

    def watch(self) -> None:
        """From now on, know of the model's forwards."""
        self.scope = Scope(self.model, self.finished, self.started, self.spec.parameters)
        if any(isinstance(patch, Span) for patch in self.patches):
            self.handle._watchers.append(layers.install(self.model, "forward", self._end_spans))

    def cache_steps(self, target: Any, config: StepCache) -> None:
        """Switch step caching on, outside everything else."""
        stepping = Stepping(self.name, self.model, self.spec, target, config)
        self.stepping = stepping
        stepping.install()

    def _end_spans(self, original, instance, args, kwargs):
        try:
            return original(*args, **kwargs)
        finally:  # for an interrupt, torch runs no hooks
            frame = scope.current()
            if frame is not None and frame.model is self.model:
                frame.close()

    def started(self, frame: Frame) -> None:
        """Before a forward: results that the model keeps for another device are made again."""
        self.ran = True
        self.handle._budget.begin()
        leaving, spans = self._concerned
        if leaving and frame.device != self._device:
            self._device = frame.device
            for patch in leaving:
                patch.moved()
        for span in spans:
            span.begin()

    @cached_property
    def _concerned(self) -> tuple[list[Patch], list[Span]]:
        """The patches that a new device matters to, and the spans that begin where a forward does."""
        leaving = [patch for patch in self.patches if isinstance(patch, Patch) and patch.leaves_something]
        return leaving, [span for span in self.patches if isinstance(span, Span) and span.start is None]

    def finished(self, frame: Frame) -> None:
        """After a forward: say which sites it did not come by, once each."""
        if self.stepping is not None:
            self.stepping.saw_forward()
        for at, patches in self.sites.items():
            if at in self._warned or at.startswith("pipeline:"):
                continue
            if any(patch in frame.calls for patch in patches):
                self._reached.add(at)
                continue
            displaced = any(patch.displaced for patch in patches)
            # A site inside another is called only where that one has no result.
            if not displaced and (at in self._reached or self._in_compiled_code(at) or patches[0].site.optional):
                continue
            self._warned.add(at)
            why = (
                "something replaced it after apply()\n    (accelerate's remove_hook_from_module does). "
                "Call dit_patch.apply(...) again."
                if displaced
                else "this forward does not call it, so nothing of it is cached."
            )
            self.notes[at] = "displaced by another library; apply() again" if displaced else "not reached"
            warnings.warn(
                f"dit_patch: {at} was not reached in {type(self.model).__name__}.forward; {why}", stacklevel=2
            )

    def _in_compiled_code(self, at: str) -> bool:
        """Whether the site, which was not come by, is inside compiled code; looked up once."""
        if at in self._looked_for:
            return at in self.notes
        self._looked_for.add(at)
        path = at.partition("..")[0] if ".." in at else at.rpartition(".")[0]
        if ":" in at:
            # Who calls a global cannot be told from outside.
            found = any(map(is_compiled, self.model.modules()))
        elif "*" in path:
            owners = resolve.branches(self.model, path, at)
            found = all(resolve.compiled_along(self.model, resolve.filled_in(path, stars)) for _, stars in owners)
        else:
            found = bool(path) and resolve.compiled_along(self.model, path)
        if found:
            self.notes[at] = "inside compiled code, which is left alone"
        return found

    def make(self, site: Site, target: Any) -> None:
        """Make a site live, or note why it is not."""
        options = self.handle.options
        patches, note = live(
            self.spec, site, self.model, target, budget=self.handle._budget, check=options.check, fixes=options.fixes
        )
        self.notes.pop(site.at, None)
        if patches:
            self.sites[site.at] = patches
        if note:
            self.notes[site.at] = note

    def repair(self, target: Any = None) -> None:
        """Put back what another library has displaced, and add what only `target`, the pipeline, has."""
        for site in filter(self.handle.wanted, self.spec.sites):
            if site.at.startswith("pipeline:") and site.at not in self.sites and resolve.stages(target, self.model):
                self.make(site, target)
        for patch in self.patches:
            patch.install()
        if self.stepping is not None:
            self.stepping.repair(target)
        for at in self._warned & set(self.notes):
            del self.notes[at]
        self._warned.clear()
        self._looked_for.clear()


class Handle:
    """One `apply`: print it for the report, `remove()` it to take everything back. Usable in a `with` statement."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._budget = Budget(options.max_bytes)
        self._members: list[Member] = []
        self._watchers: list[layers.Wrapped] = []
        self.token: str | None = None  # by which a process that asked for it from afar knows it again
        self.automatic = False  # made by `dit-patch run`, and gives way where the program asks for something else

    def remove(self) -> None:
        """Take every patch back, in whatever order other libraries have come and gone; harmless when repeated."""
        asleep = self._take_back()
        if asleep:
            warnings.warn(
                f"dit_patch: inside another library's wrapper, and asleep there: {', '.join(asleep)}. Calls are passed "
                "through, and remove() called again after that library's own removal leaves nothing behind.",
                stacklevel=2,
            )

    def clear(self) -> None:
        """Forget every cached result; counters stay."""
        for member in self._members:
            for patch in member.patches:
                patch.clear()
        for stepping in self.steppings:
            stepping.release()

    def stats(self) -> list[SiteStats]:
        """One row per site: hits, misses, bypasses with their reasons, bytes held, host seconds saved."""
        return [
            site_stats(
                member.name,
                member.model,
                member.spec.name,
                site,
                member.sites.get(site.at, ()),
                member.notes,
                ran=member.ran,
            )
            for member in self._members
            for site in member.spec.sites
            if self.wanted(site)
        ]

    def step_stats(self) -> list[StepStats]:
        """One row per block list and pass of the last generation: steps, cached ones, differences, bytes held."""
        return [row for stepping in self.steppings for row in stepping.stats()]

    def begin_generation(self, steps: int | None = None) -> None:
        """Say that a generation begins, of that many steps; only for models that are called outside of a pipeline.

        There the step cache goes by the timesteps alone: they fall during a generation.
        """
        for stepping in self.steppings:
            stepping.begins(steps)

    def repair(self, target: Any = None) -> None:
        """Put back the patches that another library has displaced; in the stages of the pipeline `target`, too."""
        for member in self._members:
            member.repair(target)

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        """The patched models by their names in the pipeline."""
        return {member.name: member.model for member in self._members}

    @property
    def steppings(self) -> list[Stepping]:
        """The step caches of the patched models."""
        return [member.stepping for member in self._members if member.stepping is not None]

    @property
    def nbytes(self) -> int:
        """Bytes that all caches hold now, without the step cache's, which `step_stats` tells."""
        return self._budget.used

    def __str__(self) -> str:
        return text(self.stats(), self.options.max_bytes, self.nbytes, self.options.step_cache, self.step_stats())

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def wanted(self, site: Site) -> bool:
        return self.options.only is None or site.kind in self.options.only

    def _add(self, name: str, model: torch.nn.Module, spec: Spec, target: Any) -> None:
        member = Member(self, name, model, spec)
        self._members.append(member)
        for site in filter(self.wanted, spec.sites):
            member.make(site, target)
        if resolve.own_forward(model, spec.classes):
            _warn_of_own_forward(member)
        for patch in member.patches:
            patch.install()
        self._watch(model, _MODEL_EDITS)
        member.watch()
        if self.options.step_cache is not None:
            member.cache_steps(target, self.options.step_cache)

    def _watch(self, owner: Any, edits: Iterable[str]) -> None:
        for edit in edits:
            watched = any(watcher._self_home == (owner, edit) for watcher in self._watchers)
            if not watched and callable(getattr(owner, edit, None)):
                self._watchers.append(layers.install(owner, edit, self._clear_after))

    def _clear_after(self, original, instance, args, kwargs):
        try:
            return original(*args, **kwargs)
        finally:
            self.clear()

    def _take_back(self) -> list[str]:
        asleep = []
        for member in reversed(self._members):
            if member.stepping is not None and not member.stepping.remove():
                asleep.append(f"step cache of {member.name}")
        for watcher in reversed(self._watchers):
            layers.remove(watcher)
        for member in reversed(self._members):
            if member.scope is not None:
                member.scope.remove()
            asleep += [patch.where for patch in reversed(member.patches) if not patch.remove()]
        return asleep


def _options(only, max_bytes, check, fixes, directories, step_cache, registry) -> Options:
    words = None if only is None else (only,) if isinstance(only, str) else tuple(only)
    kinds, names = registry.selection(words or (), "only")
    if words == () and step_cache is None:
        raise DitPatchError("only: an empty selection patches nothing; leave it out to patch every kind")
    if check not in CHECKS:
        raise DitPatchError(f"check: `{check}` is none of {', '.join(CHECKS)}{suggest(str(check), CHECKS)}")
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes <= 0:
        raise DitPatchError(f"max_bytes: `{max_bytes}` is not a positive number of bytes")
    chosen = kinds if kinds or words == () else None
    directories = tuple(str(each) for each in directories)
    return Options(chosen, names or None, max_bytes, check, bool(fixes), directories, step_cache)


def with_specs(
    models: dict[str, torch.nn.Module], registry: Registry, names: Iterable[str] | None = None
) -> dict[str, tuple[torch.nn.Module, Spec]]:
    """Those of the models that there is a spec for, each with it; where `names` are given, only of these specs.

    Specs that are off by default are left out unless they are named.

    Raises:
        UnsupportedModelError: there is none for any of them, or none that is on.
    """
    known = _known(models, registry)
    found = {name: each for name, each in known.items() if each[1].is_wanted(names)}
    if found:
        return found
    if known and names:
        others = ", ".join(f"{name} ({spec.name})" for name, (_, spec) in known.items())
        raise UnsupportedModelError(f"only: no model is for {' or '.join(map(quote, names))}; there are: {others}")
    raise UnsupportedModelError("\n".join(_why_none(models, known, registry)))


def _why_none(
    models: dict[str, torch.nn.Module], known: dict[str, tuple[torch.nn.Module, Spec]], registry: Registry
) -> Iterator[str]:
    """For each of the models why it is not patched, where no spec was named."""
    unknown = [model for name, model in models.items() if not any(f"{path}.".startswith(f"{name}.") for path in known)]
    if unknown or not models:
        what = [f"{type(model).__name__} ({type(model).__module__})" for model in unknown]
        yield (
            f"no spec for {', '.join(what) or 'a pipeline without modules'}.\n"
            f'    Known: {", ".join(registry.names()) or "none"}. Write one: README, "A spec for your model".'
        )
    for path, (_, spec) in known.items():
        yield (
            f"{path}: {spec.name} is off by default: {spec.off_by_default}\n"
            f'    Ask for it by name: only=["{spec.name}"], or --patch-model {spec.name}.'
        )


def _known(models: dict[str, torch.nn.Module], registry: Registry) -> dict[str, tuple[torch.nn.Module, Spec]]:
    """The models that there is a spec for; of a model without one, those inside it, by their paths."""
    known: dict[str, tuple[torch.nn.Module, Spec]] = {}
    seen: set[torch.nn.Module] = set()

    def look(path: str, module: torch.nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        spec = registry.find(type(module))
        if spec is not None:
            known[path] = module, spec
            return
        for name, child in module.named_children():
            look(f"{path}.{name}", resolve.unwrap(child))

    for name, model in models.items():
        look(name, model)
    return known


def _existing(models: list[torch.nn.Module], options: Options) -> Handle | None:
    handles = [handle_of(model) for model in models]
    for handle in filter(None, handles):
        if handle.automatic and (handle.options != options or handle is not handles[0]):
            handle.remove()
    handles = [handle_of(model) for model in models]
    if not any(handles):
        return None
    if any(handle is not handles[0] for handle in handles):
        raise DitPatchError(
            "some of these models are patched by another handle already; call its remove() before applying again"
        )
    if handles[0].options != options:
        raise DitPatchError(
            f"already patched with other options: {handles[0].options}\n"
            f"    now asked for: {options}\n"
            "    Call handle.remove() first."
        )
    return handles[0]


def handle_of(model: torch.nn.Module) -> Handle | None:
    """The handle that patched `model`, read from the model's own hooks."""
    scope = scope_of(model)
    return None if scope is None else scope.finished.__self__.handle


def check_versions(spec: Spec, strict: bool) -> None:
    """Raise VersionError where an installed package is not one that the spec's `requires` allows; or only warn."""
    for line in spec.requires:
        requirement = Requirement(line)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problem, otherwise = f"{spec.name} needs {line}, which is not installed: pip install '{line}'", ""
        else:
            if requirement.specifier.contains(version, prereleases=True):
                continue
            problem, otherwise = (
                f"{spec.name} needs {line}; {version} is installed.",
                " Pass strict=False to try anyway.",
            )
        if strict:
            raise VersionError(problem + otherwise)
        warnings.warn(f"dit_patch: {problem}", stacklevel=3)


def _warn_of_own_forward(member: Member) -> None:
    left = [at for at, note in member.notes.items() if at not in member.sites and note not in (ABSENT, ABSENT_STAGE)]
    if left:
        warnings.warn(
            f"dit_patch: {type(member.model).__name__} has a forward of its own, other than that of "
            f"{' or '.join(name.rpartition('.')[2] for name in member.spec.classes)}, for which {member.spec.name} was "
            f"written; left alone: {', '.join(left)}.",
            stacklevel=4,
        )
