"""Step caching on one model: switched on, told when a generation begins, asked what it did, and taken back.

All that changes on the model is one layer on its `forward`, inside which its block lists are exchanged for stand-ins in
place: names, order and parameters stay what they are.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import StepCacheError
from ..findings import FindingKind
from ..memo.results import same, tensors_in
from ..sites import layers, pipeline_models, resolve
from ..spec.model import Spec
from ..upstream.torch_internals import children, is_capturing
from . import ranks, requirements
from .block_list import CachedBlockList
from .cache_dit_config import CacheDitConfig
from .config import StepCache
from .report import StepCacheReport
from .stats import StepStats, too_few
from .tracker import GenerationTracker


@dataclass
class Generation:
    """One generation of a model, as far as step caching is concerned."""

    #: The thread whose generation it is.
    thread: threading.Thread | None = None
    #: Whether it is left alone.
    is_uncached: bool = False
    #: Whether the next forward begins another one.
    is_over: bool = True
    #: Whether its end has still to be reported.
    is_running: bool = False


class ModelStepCache:
    """One model's step cache.

    Args:
        name: the model's name in the pipeline.
        target: the pipeline, or the model itself.

    Raises:
        StepCacheError: it cannot be switched on; the message has the reason and the remedy.
    """

    def __init__(self, name: str, model: torch.nn.Module, spec: Spec, target: Any, config: StepCache) -> None:
        self.model, self.spec, self.config = model, spec, config
        self.label = f"{name} ({type(model).__name__})"
        requirements.check_spec(spec, self.label)
        self.cache_dit = CacheDitConfig(config, self.label)
        self.block_lists = [
            CachedBlockList(*self._block_list(each.at), each.pattern, f"{self.label}.{each.at}") for each in spec.blocks
        ]
        for each in self.block_lists:
            config.blocks(len(each.blocks), each.label)
        self._check_model(target)
        self.report = StepCacheReport(name, self.label, config, self.block_lists)
        self.generation = Generation()
        self._tracker: GenerationTracker | None = None
        self._lock = threading.Lock()
        self._layer: layers.Wrapped | None = None
        self._is_proven = False

    def __repr__(self) -> str:
        return f"<ModelStepCache of {self.label}: {self.config}>"

    @property
    def name(self) -> str:
        """The model's name in the pipeline."""
        return self.report.name

    @property
    def tracker(self) -> GenerationTracker:
        """What follows the model's generations, while the step cache is on."""
        return self._tracker

    def install(self, target: Any) -> None:
        """Switch it on; `target` is what is listened to."""
        self._tracker = GenerationTracker(
            target, self.model, self.spec.parameters, self.on_generation_start, self.on_generation_end
        )
        self._layer = layers.install(self.model, "forward", self._call_forward)

    def repair(self, target: Any = None) -> None:
        """Put back what another library has displaced; listen to `target`, the pipeline, where it is another one."""
        if self._layer is None:
            return
        self._tracker.listen_to(target)
        if not layers.installed(self._layer):
            self._layer = layers.install(self.model, "forward", self._call_forward)

    def remove(self) -> bool:
        """Take everything back; False where another library holds our layer inside its own."""
        if self._layer is None:
            return True
        self._tracker.remove()
        is_gone = layers.remove(self._layer)
        self._layer = None
        self.release()
        return is_gone

    def on_generation_start(self, steps: int | None) -> None:
        """Prepare for a generation of that many steps of this model, where that is known."""
        self.on_generation_end()
        if steps is not None:
            self.report.announced_steps = steps
        if pipeline_models.is_compiled_in(self._tracker.target, self.model):
            self.report.warn(FindingKind.COMPILED_LATER)

    def on_generation_end(self) -> None:
        """End the generation, if one is running."""
        self._tracker.forget()
        self._finish()

    def join(self, label: str | None) -> None:
        """Begin within a generation, before its first forward, in the pass of that name."""
        self._tracker.join(label)

    def leave_pass(self) -> None:
        """Forget the name that `join` was given: that pass has ended."""
        self._tracker.leave_pass()

    def note_forward(self) -> None:
        """Note that a forward of the model has ended; our layer should have been in it."""
        self.report.unseen_forwards += 1

    def release(self) -> None:
        """Give up everything that is held; the next forward counts as the first of a generation."""
        self.report.keep_rows()
        self.generation.is_over = True
        for each in self.block_lists:
            each.release()

    def stats(self) -> list[StepStats]:
        """Return a row per block list and pass of the last generation."""
        return self.report.rows()

    def skip_proof(self) -> None:
        """Take it for proved that the model is the same over stand-ins: that has been shown before."""
        self._is_proven = True

    def replay(self, block_list: CachedBlockList, config: StepCache, residuals: list[torch.Tensor]) -> list[int]:
        """Return the steps that would be skipped with another configuration, see `CachedBlockList.replay`."""
        return block_list.replay(self._config_of(block_list, len(residuals), config), residuals)

    def block_configs(self) -> list[Any]:
        """Return cache-dit's `DBCacheConfig` for each block list."""
        return [self._config_of(each, self.report.announced_steps) for each in self.block_lists]

    def _config_of(self, block_list: CachedBlockList, steps: int | None, config: StepCache | None = None) -> Any:
        return self.cache_dit.of_blocks(len(block_list.blocks), block_list.label, steps, config)

    def _check_model(self, target: Any) -> None:
        requirements.check_model(self.model, target, [each.blocks for each in self.block_lists], self.label)

    def _block_list(self, path: str) -> tuple[torch.nn.Module, str]:
        place, _, name = path.rpartition(".")
        owner = resolve.submodules(self.model, place, f"{self.spec.name}: blocks")[0]
        if not isinstance(children(owner).get(name), torch.nn.ModuleList):
            raise StepCacheError(f"{self.spec.name}: blocks: {self.label} has no list of blocks `{path}`")
        return owner, name

    def _call_forward(self, original, instance, args, kwargs):
        self.report.unseen_forwards -= 1  # until it ends
        if is_capturing():
            self.report.note(FindingKind.LEFT_ALONE_IN_CAPTURE)
            return original(*args, **kwargs)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.model.parameters()):
            self.report.note(FindingKind.LEFT_ALONE_BY_AUTOGRAD)
            return original(*args, **kwargs)
        if not self._lock.acquire(blocking=False):
            raise self._two_threads()
        try:
            running = self.generation
            if not running.is_over and running.thread is not threading.current_thread() and running.thread.is_alive():
                raise self._two_threads()
            return self._call_in_generation(original, args, kwargs)
        finally:
            self._lock.release()

    def _call_in_generation(self, original: Any, args: tuple, kwargs: dict) -> Any:
        label, begins = self._tracker.read(args, kwargs)
        if begins:
            self._finish()
        try:
            if self.generation.is_over:
                self._begin()
            if self.generation.is_uncached:
                return original(*args, **kwargs)
            if self._is_proven:
                return self._cached_forward(label, original, args, kwargs)
            return self._prove_parity(label, original, args, kwargs)
        except BaseException:
            # Whatever comes next is another generation.
            self.generation = Generation(is_uncached=self.generation.is_uncached)
            self.report.forget_forwards()
            self._tracker.forget()
            raise

    def _cached_forward(self, label: str, original: Any, args: tuple, kwargs: dict) -> Any:
        """Call the forward over stand-ins for its blocks."""
        real = [each.blocks for each in self.block_lists]
        try:
            for each in self.block_lists:
                children(each.owner)[each.name] = each.enter(label)
            return original(*args, **kwargs)
        finally:
            for each, blocks in zip(self.block_lists, real):
                children(each.owner)[each.name] = blocks

    def _prove_parity(self, label: str, original: Any, args: tuple, kwargs: dict) -> Any:
        """Call the first forward, of which nothing can be cached, and hold it to the model's own."""
        expected = original(*args, **kwargs)
        result = self._cached_forward(label, original, args, kwargs)
        if not same(expected, result):
            if same(expected, original(*args, **kwargs)):
                self.report.note(FindingKind.NOT_EQUAL_UNCACHED)
                self.remove()
                raise StepCacheError(
                    f"no step caching for {self.label}: with nothing cached its output is not the uncached model's, "
                    f"bit for bit, so {self.spec.name} is not about its blocks. It is off again; exact caches stay on."
                    "\n    Leave out step_cache, and tell whoever wrote the spec."
                )
            self.report.note(FindingKind.NOT_REPEATABLE)
        self._is_proven = True
        self.report.note_memory(next(tensors_in(result)).device)
        return result

    def _begin(self) -> None:
        """Begin a generation at its first forward: nothing of the one before is left."""
        self._check_model(self._tracker.target)
        steps = self.report.announced_steps
        reason = too_few(self.config, self.spec, steps)
        self.report.begin(reason)
        self.generation = Generation(
            threading.current_thread(), is_uncached=reason is not None, is_over=False, is_running=True
        )
        groups = ranks.groups(self.model)
        for each in self.block_lists:
            each.begin(self._config_of(each, steps), self.cache_dit.calibrator(), groups)

    def _finish(self) -> None:
        self.generation.is_over = True
        self.report.check_displaced()
        if self.generation.is_running:
            self.generation.is_running = False
            self.report.finish(is_uncached=self.generation.is_uncached)
            if self.config.release:
                self.release()

    def _two_threads(self) -> StepCacheError:
        return StepCacheError(
            f"{self.label} is in a generation of another thread, and a step cache holds the state of one at a time.\n"
            "    Give each thread a model of its own, or let one generation end before the next."
        )
