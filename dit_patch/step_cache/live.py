"""Step caching on one model: switched on, told when a generation begins, asked what it did, and taken back.

All that changes on the model is one layer on its `forward`, inside which its block lists are exchanged for stand-ins in
place: names, order and parameters stay what they are.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from math import inf
from typing import Any

import torch

from ..errors import StepCacheError
from ..findings import Finding, FindingKind, warn
from ..memo.lookup import same
from ..memo.store import tensors_in
from ..sites import layers, resolve, scope
from ..sites.pipeline_models import is_compiled_in
from ..sites.scope import Frame
from ..spec.model import Spec
from ..upstream.torch_internals import children, is_capturing
from . import guards, ranks
from .config import MASKS, StepCache
from .gates import Gates
from .generations import Loops, Passes
from .stats import StepStats, measured, why_nothing

_DISPLACED = "something replaced the model's forward after apply(), so nothing was cached; call apply() again"


class Stepping:
    """One model's step cache.

    Args:
        name: the model's name in the pipeline.
        target: the pipeline, or the model itself.

    Raises:
        StepCacheError: it cannot be switched on; the message has the reason and the remedy.
    """

    def __init__(self, name: str, model: torch.nn.Module, spec: Spec, target: Any, config: StepCache) -> None:
        self.name, self.model, self.spec, self.target, self.config = name, model, spec, target, config
        self.what = f"{name} ({type(model).__name__})"
        guards.check_spec(spec, self.what)
        self._cache_dit = guards.cache_dit()
        self.gates = [
            Gates(*self._block_list(blocks.at), blocks.pattern, f"{self.what}.{blocks.at}") for blocks in spec.blocks
        ]
        for gates in self.gates:
            config.blocks(len(gates.blocks), gates.where)
        self._check_model()
        self._positions = {each: at for at, each in enumerate(spec.parameters or scope.parameters(model))}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._layer: layers.Wrapped | None = None
        self._pending, self._running, self._proven = True, False, False
        self._unseen = 0  # forwards that did not come by our layer
        self._expected: int | None = None
        self._uncached: str | None = None  # why this generation is left alone
        self._last: list[StepStats] = []  # of a generation whose memory was given up
        self.notes: dict[str, None] = {}

    def install(self) -> None:
        self._passes = Passes(self.model)
        self._loops = Loops(self.target, self.model, self.begins, self.ends)
        self._layer = layers.install(self.model, "forward", self._forward)

    def repair(self, target: Any = None) -> None:
        """Put back what another library has displaced; listen to `target`, the pipeline, where it is another one."""
        if self._layer is not None and target is not None and target is not self.target:
            self._loops.remove()
            self.target = target
            self._loops = Loops(target, self.model, self.begins, self.ends)
        if self._layer is not None and not layers.installed(self._layer):
            self._layer = layers.install(self.model, "forward", self._forward)

    def remove(self) -> bool:
        """Take everything back; False where another library holds our layer inside its own."""
        if self._layer is None:
            return True
        self._loops.remove()
        self._passes.remove()
        gone = layers.remove(self._layer)
        self._layer = None
        self.release()
        return gone

    def begins(self, steps: int | None) -> None:
        """A generation is about to begin, of that many steps of this model where that is known."""
        self.ends()
        if steps is not None:
            self._expected = steps
        if is_compiled_in(self.target, self.model):
            self._warn(
                "it was compiled as a whole after apply(), and compiled code always runs all blocks: nothing will be "
                "cached. Compile its blocks instead: model.compile_repeated_blocks()"
            )

    def join(self, label: str | None) -> None:
        """Switched on within a generation, before its first forward, in the pass of that name."""
        self._loops.join()
        self._passes.named(label)

    def left(self) -> None:
        """The pass that was running at `join` has ended."""
        self._passes.named(None)

    def saw_forward(self) -> None:
        """A forward of the model has ended; our layer should have been in it."""
        self._unseen += 1

    def ends(self) -> None:
        """The generation has ended, if one was running."""
        self._passes.forget()
        self._finish()

    def _finish(self) -> None:
        self._pending = True
        if self._unseen > 0:
            self._warn(_DISPLACED)
        self._unseen = 0
        if not self._running:
            return
        self._running, self._expected = False, None
        rows = [row for row in self.stats() if row.steps]
        asked_for = self.config.threshold and self.config.max_cached != 0
        if rows and asked_for and self._uncached is None and not any(row.cached for row in rows):
            nearest = min(rows, key=lambda row: min(measured(row.diffs), default=inf))
            self._warn(nearest.notes[0])
        if self.config.release:
            self.release()

    def release(self) -> None:
        """Give up everything that is held; the next forward counts as the first of a generation."""
        self._last = [replace(row, nbytes=0) for row in self.stats()]
        self._pending = True
        for gates in self.gates:
            gates.release()

    def stats(self) -> list[StepStats]:
        """A row per block list and pass of the last generation."""
        rows = [self._row(gates, label) for gates in self.gates for label in gates.contexts]
        return rows or self._last or [self._row(gates, "") for gates in self.gates]

    def _check_model(self) -> None:
        guards.check_model(self.model, self.target, [gates.blocks for gates in self.gates], self.what)

    def _block_list(self, path: str) -> tuple[torch.nn.Module, str]:
        place, _, name = path.rpartition(".")
        owner = resolve.submodules(self.model, place, f"{self.spec.name}: blocks")[0]
        if not isinstance(children(owner).get(name), torch.nn.ModuleList):
            raise StepCacheError(f"{self.spec.name}: blocks: {self.what} has no list of blocks `{path}`")
        return owner, name

    def _forward(self, original, instance, args, kwargs):
        self._unseen -= 1  # until it ends
        if is_capturing():
            self.notes["left alone while a CUDA graph is captured: a decision waits for the device"] = None
            return original(*args, **kwargs)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.model.parameters()):
            self.notes["left alone while autograd records"] = None
            return original(*args, **kwargs)
        if not self._lock.acquire(blocking=False):
            raise self._two_threads()
        try:
            if not self._pending and self._thread is not threading.current_thread() and self._thread.is_alive():
                raise self._two_threads()
            return self._step(original, args, kwargs)
        finally:
            self._lock.release()

    def _step(self, original: Any, args: tuple, kwargs: dict) -> Any:
        frame = Frame(self.model, self._positions, args, kwargs, None)
        label, began = self._passes.read(frame, loops_are_heard=self._loops.heard)
        if began:
            self._finish()
        try:
            if self._pending:
                self._begin()
            if self._uncached is not None:
                return original(*args, **kwargs)
            if self._proven:
                return self._gated(label, original, args, kwargs)
            return self._proved(label, original, args, kwargs)
        except BaseException:
            # Whatever comes next is another generation.
            self._pending, self._running, self._expected, self._unseen = True, False, None, 0
            self._passes.forget()
            raise

    def _two_threads(self) -> StepCacheError:
        return StepCacheError(
            f"{self.what} is in a generation of another thread, and a step cache holds the state of one at a time.\n"
            "    Give each thread a model of its own, or let one generation end before the next."
        )

    def _gated(self, label: str, original: Any, args: tuple, kwargs: dict) -> Any:
        """One forward whose block lists are stood in for."""
        real = [gates.blocks for gates in self.gates]
        try:
            for gates in self.gates:
                children(gates.owner)[gates.name] = gates.enter(label)
            return original(*args, **kwargs)
        finally:
            for gates, blocks in zip(self.gates, real):
                children(gates.owner)[gates.name] = blocks

    def _proved(self, label: str, original: Any, args: tuple, kwargs: dict) -> Any:
        """The first forward, of which nothing can be cached, held to the model's own."""
        expected = original(*args, **kwargs)
        result = self._gated(label, original, args, kwargs)
        if not same(expected, result):
            if same(expected, original(*args, **kwargs)):
                self.notes["refused: not equal to the uncached model"] = None
                self.remove()
                raise StepCacheError(
                    f"no step caching for {self.what}: with nothing cached its output is not the uncached model's, bit "
                    f"for bit, so {self.spec.name} is not about its blocks. It is off again; exact caches stay on.\n"
                    "    Leave out step_cache, and tell whoever wrote the spec."
                )
            self.notes["the uncached model does not repeat itself bit for bit, so that nothing could be proved"] = None
        self._proven = True
        self._check_memory(next(tensors_in(result)).device)
        return result

    def _check_memory(self, device: torch.device) -> None:
        estimate = sum(gates.estimate(self.config) for gates in self.gates)
        self.notes[f"will hold at most {estimate / 2**20:.1f} MiB for each pass of this size"] = None
        if device.type == "cuda" and 2 * estimate > torch.cuda.mem_get_info(device)[0]:
            self._warn(f"a step cache of two passes takes {2 * estimate / 2**30:.1f} GiB, more than is free")

    def _begin(self) -> None:
        """At the first forward of a generation: nothing of the one before is left."""
        self._check_model()
        self._pending, self._running, self._last = False, True, []
        self._thread = threading.current_thread()
        self._uncached = self._too_few()
        if self._uncached is not None:
            self._warn(self._uncached)
        groups = ranks.groups(self.model)
        for gates in self.gates:
            gates.begin(self._decisions(gates, self.config, self._expected), self.calibrator(), groups)

    def _too_few(self) -> str | None:
        least = self.config.min_steps
        if least is None:
            least = self.spec.step_cache.min_steps or 0
        steps = self._expected
        if steps is None:
            return None
        if steps < least:
            return (
                f"left uncached: {steps} steps are fewer than the {least} from which there is something to skip "
                f"({self.spec.name}); min_steps= in the step cache sets another limit"
            )
        if steps <= self.config.warmup and self.config.warmup_interval == 1:
            return f"left uncached: {why_nothing(self.config, steps, {})}"
        return None

    def take_as_proved(self) -> None:
        """Parity has been shown on this model before."""
        self._proven = True

    def replay(self, gates: Gates, config: StepCache, residuals: list[torch.Tensor]) -> list[int]:
        """Which steps would be skipped with another configuration, see `Gates.replay`."""
        return gates.replay(self._decisions(gates, config, len(residuals)), residuals)

    def decisions(self) -> list[Any]:
        """cache-dit's `DBCacheConfig` for each block list."""
        return [self._decisions(gates, self.config, self._expected) for gates in self.gates]

    def _decisions(self, gates: Gates, config: StepCache, steps: int | None) -> Any:
        fn, bn = config.blocks(len(gates.blocks), gates.where)
        return self._cache_dit.DBCacheConfig(
            Fn_compute_blocks=fn,
            Bn_compute_blocks=bn,
            residual_diff_threshold=config.threshold,
            max_accumulated_residual_diff_threshold=config.max_accumulated,
            max_warmup_steps=config.warmup,
            warmup_interval=config.warmup_interval,
            max_cached_steps=-1 if config.max_cached is None else config.max_cached,
            max_continuous_cached_steps=-1 if config.max_continuous is None else config.max_continuous,
            enable_separate_cfg=False,  # each pass has a context of its own
            steps_computation_mask=self._mask(config.mask, steps),
            steps_computation_policy=config.mask_policy,
        )

    def _mask(self, mask: str | tuple[int, ...] | None, steps: int | None) -> list[int] | None:
        if mask not in MASKS:
            return None if mask is None else list(mask)
        if steps is None:
            raise StepCacheError(
                f'mask="{mask}" needs the number of steps, which nobody has said: a model alone does not know it.\n'
                "    Call handle.begin_generation(steps=...) before each generation, or give the mask itself."
            )
        try:
            return self._cache_dit.steps_mask(total_steps=steps, mask_policy=mask)
        except AssertionError:
            self._warn(f'mask="{mask}": cache-dit makes none for {steps} steps; all are computed')
            return [1] * steps

    def calibrator(self) -> Any:
        """cache-dit's configuration of the forecast, None where there is none."""
        config, caching = self.config, self._cache_dit
        both = {"enable_calibrator": True, "enable_encoder_calibrator": True}
        if config.calibrator == "taylorseer":
            return caching.TaylorSeerCalibratorConfig(taylorseer_order=config.order or 1, **both)
        if config.calibrator == "foca":
            return caching.FoCaCalibratorConfig(**both)
        if config.calibrator == "dmd":
            return caching.DMDCalibratorConfig(dmd_history=config.history or 6, **both)
        return None

    def _row(self, gates: Gates, label: str) -> StepStats:
        context = gates.contexts.get(label)
        fn, bn = self.config.blocks(len(gates.blocks), gates.where)
        common = {
            "model": self.name,
            "label": label,
            "blocks": gates.name,
            "count": len(gates.blocks),
            "fn": fn,
            "bn": bn,
        }
        if context is None:
            notes = [self._uncached] if self._uncached else [_DISPLACED] if self._unseen > 0 else []
            return StepStats(**common, notes=(*notes, *self.notes))
        steps, cached = context.executed_steps, tuple(context.cached_steps)
        diffs = {int(step): diff for step, diff in context.residual_diffs.items()}
        notes = [] if cached else [why_nothing(self.config, steps, diffs)]
        return StepStats(
            **common, steps=steps, cached=cached, diffs=diffs, nbytes=_held(context), notes=(*notes, *self.notes)
        )

    def _warn(self, message: str) -> None:
        warn(Finding(FindingKind.STEP_CACHE, self.what, message), stacklevel=2)


def _held(part: Any, seen: set[int] | None = None) -> int:
    """Bytes of the tensors below a cache-dit context, wherever its calibrators keep them; each storage once."""
    seen = set() if seen is None else seen
    if id(part) in seen:
        return 0
    seen.add(id(part))
    if isinstance(part, torch.Tensor):
        storage = part.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(part, dict):
        return sum(_held(each, seen) for each in part.values())
    if isinstance(part, (list, tuple)):
        return sum(_held(each, seen) for each in part)
    return _held(vars(part), seen) if type(part).__module__.startswith("cache_dit.") else 0
