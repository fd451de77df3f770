"""One patched model of a handle: its spec, the patches of its sites, and what watches its forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ..findings import Finding, FindingKind, warn
from ..report.rows import SiteStats, site_stats
from ..sites import layers, scope
from ..sites.bind import bind
from ..sites.binding import Binding
from ..sites.explanation import explain
from ..sites.patch import Patch
from ..sites.pipeline_models import find_stages
from ..sites.scope import Frame, Scope
from ..sites.span import Span
from ..spec.address import StageAddress
from ..spec.model import Site, Spec
from ..step_cache.listener import GenerationListener
from ..step_cache.model_step_cache import ModelStepCache
from .reach import Reach

if TYPE_CHECKING:
    from .handle import Handle

_EDITS = ("fuse_lora", "unfuse_lora", "unload_lora")
"""Methods that change weights through `.data`, which leaves no version behind: the caches are dropped after each."""


class PatchedModel:
    """A model that `handle` patches by `spec`; `name` is what its pipeline calls it."""

    def __init__(self, handle: Handle, name: str, model: torch.nn.Module, spec: Spec) -> None:
        self.handle, self.name, self.model, self.spec = handle, name, model, spec
        #: The patches of each site at work, by its address.
        self.sites: dict[str, list[Patch]] = {}
        #: What was last noticed of a site, by its address.
        self.findings: dict[str, Finding] = {}
        self.scope: Scope | None = None
        self.step_cache: ModelStepCache | None = None
        #: Whether the model was called while it was patched.
        self.was_called = False
        self._listener: GenerationListener | None = None
        self._binding = Binding.of(spec, model, handle.budget, handle.options.check, handle.options.fixes)
        self._reach = Reach(model, self.sites)

    def __repr__(self) -> str:
        return f"<PatchedModel {self.name}: {type(self.model).__name__} by {self.spec.name}, {len(self.sites)} sites>"

    @property
    def patches(self) -> list[Patch]:
        """The patches of all sites, in the order of the spec."""
        return [patch for patches in self.sites.values() for patch in patches]

    def install(self, target: Any) -> None:
        """Bind the sites that are wanted, install their patches, and watch the model's forwards.

        Raises:
            SiteError: the spec does not fit the model.
            StepCacheError: step caching was asked for, and cannot be had.
        """
        for site in filter(self.handle.options.wants, self.spec.sites):
            self._bind(site, target)
        if scope.has_own_forward(self.model, self.spec.classes):
            self._warn_of_own_forward()
        for patch in self.patches:
            patch.install()
        self.handle.clear_after(self.model, _EDITS)
        self._listen_to(target)
        self.scope = Scope(
            self.model,
            self._on_forward_end,
            self._on_forward_start,
            self.spec.parameters,
            self.handle,
            failed=self.begin_generation,
        )
        if any(patch.leaves_modes for patch in self.patches):
            self.handle.add_layer(layers.install(self.model, "forward", self._end_spans))
        if self.handle.options.step_cache is not None:
            self.step_cache = ModelStepCache(self.name, self.model, self.spec, target, self.handle.options.step_cache)
            self.step_cache.install(target)

    def repair(self, target: Any = None) -> None:
        """Put back what another library has displaced, and add what only `target`, the pipeline, has."""
        for site in filter(self.handle.options.wants, self.spec.sites):
            is_of_stages = isinstance(site.address, StageAddress)
            is_new = is_of_stages and site.at not in self.sites and find_stages(target, self.model)
            if is_new or self._let_go_of_replaced(site):
                self._bind(site, target)
        for patch in self.patches:
            patch.install()
        if target is not None and target is not self._listener.target:
            self._listen_to(target)
        if self.step_cache is not None:
            self.step_cache.repair(target)
        for at in self._reach.forget():
            self.findings.pop(at, None)

    def explain(self) -> Iterator[str]:
        """Yield lines on each site, see `Handle.explain`."""
        yield f"{self.name}  {type(self.model).__name__}  spec {self.spec.name}"
        for at, patches in self.sites.items():
            for line in explain(patches[0]):
                yield f"  {line}"
            if len(patches) > 1:
                yield f"    and {len(patches) - 1} more places of {at}"

    def begin_generation(self) -> None:
        """Forget results that are known by the identity of tensors: what is in them may have been exchanged unseen.

        Some ways of writing into a tensor leave no version behind: through NumPy, by `broadcast`, by another process.
        """
        for patch in self.patches:
            if isinstance(patch, Span) or any("identity" in facets for facets in patch.site.key.values()):
                patch.memo.cache.clear()

    def look_for_another(self, pipeline: Any) -> None:
        """Say once that the pipeline has another model in the place of this one, and that it is not patched.

        What `dit-patch run` patched needs no word: the other model is patched at its first forward.
        """
        now = getattr(pipeline, self.name.partition(".")[0], None)
        if not isinstance(now, torch.nn.Module) or any(each is self.model for each in now.modules()):
            return
        was_said = any(each.kind is FindingKind.MODEL_REPLACED for each in self.findings.values())
        if was_said or self.handle.is_automatic or scope.scope_of(now) is not None:
            return
        finding = Finding(FindingKind.MODEL_REPLACED, self.name, type(now).__name__)
        self.findings |= dict.fromkeys((site.at for site in self.spec.sites), finding)
        warn(finding, stacklevel=4)

    def remove_step_cache(self) -> list[str]:
        """End step caching; returns what stays, asleep, inside another library's wrapper."""
        is_left = self.step_cache is not None and not self.step_cache.remove()
        return [f"step cache of {self.name}"] if is_left else []

    def remove(self) -> list[str]:
        """Take all patches of the model back; returns the labels of those that stay asleep.

        The step cache ends before, and the handle's layers around the model go in between.
        """
        self._stop_listening()
        if self.scope is not None:
            self.scope.remove()
        return [patch.label for patch in reversed(self.patches) if not patch.remove()]

    def rows(self) -> list[SiteStats]:
        """Return the report's row of each site that is wanted."""
        return [
            site_stats(
                self.name,
                self.model,
                self.spec.name,
                site,
                self.sites.get(site.at, ()),
                self.findings.get(site.at),
                was_called=self.was_called,
            )
            for site in self.spec.sites
            if self.handle.options.wants(site)
        ]

    def _listen_to(self, target: Any) -> None:
        self._stop_listening()
        # A generation may have several loops, and has one end.
        self._listener = GenerationListener(target, self.model, None, self.begin_generation)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.remove()

    def _let_go_of_replaced(self, site: Site) -> bool:
        """Return whether a site's module was replaced; its patches are then gone."""
        patches = self.sites.get(site.at, [])
        if not any(patch.is_replaced for patch in patches):
            return False
        for patch in self.sites.pop(site.at):
            patch.remove()
        self._binding.guards.drop_replaced()
        return True

    def _bind(self, site: Site, target: Any) -> None:
        """Bind a site, or note why it is left out."""
        patches, finding = bind(self.spec, site, self._binding, target)
        self.findings.pop(site.at, None)
        if patches:
            self.sites[site.at] = patches
        if finding is not None:
            self.findings[site.at] = finding

    def _warn_of_own_forward(self) -> None:
        absent = (FindingKind.ABSENT, FindingKind.ABSENT_STAGE)
        left_out = [at for at, found in self.findings.items() if at not in self.sites and found.kind not in absent]
        if left_out:
            classes = " or ".join(name.rpartition(".")[2] for name in self.spec.classes)
            detail = f"{classes}, for which {self.spec.name} was written; left alone: {', '.join(left_out)}"
            warn(Finding(FindingKind.OWN_FORWARD, type(self.model).__name__, detail), stacklevel=6)

    def _on_forward_start(self, frame: Frame) -> None:
        self.was_called = True
        self.handle.budget.begin()
        frame.epoch = self._binding.guards.look()
        for patch in self._watchers:
            patch.on_forward_start(frame)

    @cached_property
    def _watchers(self) -> list[Patch]:
        """The patches that prepare for each forward; those that `repair` adds, of stages, never do."""
        return [patch for patch in self.patches if patch.watches_forwards]

    def _on_forward_end(self, frame: Frame) -> None:
        if self.step_cache is not None:
            self.step_cache.note_forward()
        for finding in self._reach.findings(frame):
            self.findings[finding.site] = finding
            if finding.kind is FindingKind.REPLACED and self.handle.is_automatic:
                self.repair()
            elif finding.kind.warning is not None:
                warn(finding, stacklevel=2)

    def _end_spans(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """End the spans of a forward that is interrupted: torch runs no hooks for that."""
        try:
            return original(*args, **kwargs)
        finally:
            frame = scope.current()
            if frame is not None and frame.model is self.model:
                frame.close()
