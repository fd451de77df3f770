"""The handle of one `apply`: the patched models, their report, and the way back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from ..findings import LOGGER, Finding, FindingKind, warn
from ..memo.store import Budget
from ..report.reported import ReportedHandle
from ..report.rows import SiteStats
from ..sites import layers
from ..sites.scope import forget_copies, scope_of
from ..spec.model import Spec
from ..step_cache.listener import RUN_END
from ..step_cache.model_step_cache import ModelStepCache
from ..step_cache.stats import StepStats
from . import weight_exchange
from .options import Options
from .patched_model import PatchedModel

_PIPELINE_EDITS = ("set_lora_adapter", "merge_lora_weights", "unmerge_lora_weights")
"""Methods that change weights through `.data`, which leaves no version behind: the caches are dropped after each."""


class Handle(ReportedHandle):
    """One `apply`: print it for the report, `remove()` it to take everything back. Usable in a `with` statement.

    A model finds its handle through its own hooks; there is no table of handles.
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        #: What all caches share.
        self.budget = Budget(options.max_bytes)
        self.patched_models: list[PatchedModel] = []
        #: Layers that belong to no site: around methods that edit weights, and around forwards with spans.
        self._layers: list[layers.Wrapped] = []
        #: Names the handle to the process that had it made in this one.
        self.token: str | None = None
        #: Whether `dit-patch run` made it; it gives way to what the program itself asks for.
        self.is_automatic = False
        self._ignore_exchanges = weight_exchange.watch(self)

    def __repr__(self) -> str:
        return f"<Handle of {', '.join(self.models) or 'nothing'}>"

    def remove(self) -> None:
        """Take every patch back, in whatever order other libraries have come and gone; harmless when repeated."""
        if self.patched_models:
            LOGGER.info("took back the patches of %s", ", ".join(self.models))
        self._end(removed=True)
        asleep = self.take_back()
        if asleep:
            warn(Finding(FindingKind.ASLEEP, detail=", ".join(asleep)), stacklevel=2)

    def clear(self) -> None:
        """Forget every cached result; counters stay."""
        for model in self.patched_models:
            for patch in model.patches:
                patch.clear()
        for step_cache in self.step_caches:
            step_cache.release()

    def stats(self) -> list[SiteStats]:
        """Return one row per site: hits, misses, bypasses with their reasons, bytes held, host seconds saved."""
        return [row for model in self.patched_models for row in model.rows()]

    def step_stats(self) -> list[StepStats]:
        """Return one row per block list and pass of the last generation: steps, cached ones, differences, bytes."""
        return [row for step_cache in self.step_caches for row in step_cache.stats()]

    def explain(self) -> str:
        """Return what the results of each site depend on, and why its last call hit, was computed or passed through."""
        return "\n".join(line for model in self.patched_models for line in model.explain())

    def begin_generation(self, steps: int | None = None) -> None:
        """Say that a generation begins, of that many steps; only for models that are called outside of a pipeline.

        Results that are known by the identity of tensors are forgotten: a buffer may have been refilled in a way that
        leaves no trace. The step cache goes by the timesteps alone otherwise: they fall during a generation.
        """
        for model in self.patched_models:
            model.begin_generation()
        for step_cache in self.step_caches:
            step_cache.on_generation_start(steps)

    def repair(self, target: Any = None) -> None:
        """Put back the patches that another library has displaced; also in the stages of `target`, a pipeline."""
        for model in self.patched_models:
            model.repair(target)
        if target is not None:
            self.watch(target)

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        """The patched models by their names in the pipeline."""
        return {model.name: model.model for model in self.patched_models}

    @property
    def step_caches(self) -> list[ModelStepCache]:
        """The step caches of the patched models."""
        return [model.step_cache for model in self.patched_models if model.step_cache is not None]

    @property
    def nbytes(self) -> int:
        """The bytes that all caches hold now, without the step cache's, which `step_stats` has."""
        return self.budget.used

    def reference(self) -> Callable[[], Handle | None]:
        """Return a weak reference: a model holds its handle, and both go together."""
        return weakref.ref(self)

    def __enter__(self) -> Handle:
        return self

    def __del__(self) -> None:
        with suppress(Exception):  # in the last moments of the interpreter everything may be missing
            self._end(removed=False)

    def add(self, name: str, model: torch.nn.Module, spec: Spec, target: Any) -> None:
        """Patch one more model of `target`; if it raises, the caller takes back what was done."""
        forget_copies(model)
        patched = PatchedModel(self, name, model, spec)
        self.patched_models.append(patched)
        patched.install(target)

    def drop(self, patched: PatchedModel) -> None:
        """Take back one of several models, which the pipeline does not have any more."""
        around = [layer for layer in self._layers if layer.home[0] is patched.model]
        self._take_back([patched], around)
        self.patched_models.remove(patched)
        self._layers = [layer for layer in self._layers if layer not in around]

    def watch(self, target: Any) -> None:
        """Drop what is cached whenever a method of the pipeline `target` has edited weights; hear its runs end."""
        self.clear_after(target, _PIPELINE_EDITS)
        self._call_after(target, RUN_END, partial(self._look_for_others, target))

    def clear_after(self, owner: Any, methods: Iterable[str]) -> None:
        """Drop what is cached after each call of these methods of `owner`, where it has them."""
        for method in methods:
            self._call_after(owner, method, self.clear)

    def _call_after(self, owner: Any, method: str, action: Callable[[], Any]) -> None:
        is_watched = any(layer.home == (owner, method) for layer in self._layers)
        if not is_watched and callable(getattr(owner, method, None)):
            self.add_layer(layers.install(owner, method, layers.after(action)))

    def add_layer(self, layer: layers.Wrapped) -> None:
        """Take a layer over: it goes when the handle is removed."""
        self._layers.append(layer)

    def take_back(self) -> list[str]:
        """Undo everything; returns the labels of what stays, asleep, inside another library's wrapper."""
        asleep = self._take_back(self.patched_models, self._layers)
        self._ignore_exchanges()
        return asleep

    def _look_for_others(self, target: Any) -> None:
        for model in self.patched_models:
            model.look_for_another(target)

    def _take_back(self, models: Iterable[PatchedModel], around: Iterable[layers.Wrapped]) -> list[str]:
        """Undo what was done to these models, and remove these layers; returns what stays asleep."""
        models, asleep = list(models)[::-1], []
        for model in models:
            asleep += model.remove_step_cache()
        for layer in list(around)[::-1]:
            layers.remove(layer)
        for model in models:
            asleep += model.remove()
        return asleep


def own_handle(model: torch.nn.Module) -> Handle | None:
    """Return the handle that patched `model` itself, read from the model's own hooks."""
    scope = scope_of(model)
    return None if scope is None else scope.handle
