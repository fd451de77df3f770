"""A list of transformer blocks through which a forward may take a short cut, as cache-dit's DBCache decides.

The model's own loop runs, over stand-ins for its blocks: in a skipped step those in the middle hand on what they were
given, and the last of them what cache-dit says the middle would have made. So whatever else the loop does, numbering
its blocks or adding hints between them (VACE), stays as it is; cache-dit's own `CachedBlocks` puts one module in place
of the whole list, which needs a copy of such forwards. Decisions, residuals and forecasts are cache-dit's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import StepCacheError
from ..upstream.torch_internals import children
from . import ranks
from .config import StepCache

if TYPE_CHECKING:
    from ..bench.step_cache.calibrate import Recorder


class Gates:
    """One block list of a model: stand-ins for it, and what cache-dit keeps of each pass.

    Args:
        owner: the module that holds the list.
        name: the list's name there.
        number: of cache-dit's forward pattern, what a block takes and returns.
        where: what messages call the list.
    """

    def __init__(self, owner: torch.nn.Module, name: str, number: int, where: str) -> None:
        from cache_dit.caching import CachedBlocks, CachedContextManager, ForwardPattern

        self.owner, self.name, self.where = owner, name, where
        self.pattern = ForwardPattern[f"Pattern_{number}"]
        self.manager = CachedContextManager(name=where, persistent_context=True)
        with _silent("cache_dit.caching.cache_blocks.pattern_base"):  # that the spec is taken at its word
            self._helper = CachedBlocks(
                children(owner)[name],
                transformer=owner,
                forward_pattern=self.pattern,
                check_forward_pattern=False,
                check_num_outputs=False,
                cache_prefix=name,
                cache_context=where,
                context_manager=self.manager,
            )
        self.manager.similarity = partial(self._similar, self.manager.similarity)
        self.contexts: dict[str, Any] = {}
        self.groups: list[Any] = []
        self.fn = self.bn = 0
        self._sizes = (0, 0, 2)  # bytes of the hidden states, of the encoder's, of an element
        self.observer: Recorder | None = None

    @property
    def blocks(self) -> torch.nn.ModuleList:
        return children(self.owner)[self.name]

    def begin(self, config: Any, calibrator: Any, groups: Sequence[Any] = ()) -> None:
        """Forget every pass; from now on decide by this `DBCacheConfig` and calibrator's configuration.

        `groups` are process groups whose ranks must decide alike, see `ranks`.
        """
        self.release()
        self.groups = list(groups)
        self.fn, self.bn = config.Fn_compute_blocks, config.Bn_compute_blocks
        self._made_with = {"cache_config": config, "calibrator_config": calibrator}

    def release(self) -> None:
        """Give up all tensors that are held."""
        self.manager.clear_contexts()
        self.manager._current_context = None
        self.contexts.clear()

    def estimate(self, config: StepCache) -> int:
        """Bytes that one pass will hold at most, going by the last forward."""
        hidden, encoder, itemsize = self._sizes
        return config.memory(hidden, encoder=encoder, passes=1, itemsize=itemsize)

    def enter(self, label: str) -> _Loop:
        """Stand-ins for one forward of the pass `label`, to be put in the list's place."""
        context = self.contexts.get(label)
        if context is None:
            context = self.contexts[label] = self.manager.new_context(name=label, **self._made_with)
        self.manager.set_context(context)
        return _Loop(self, self.blocks)

    def replay(self, config: Any, residuals: list[torch.Tensor]) -> list[int]:
        """Which steps that configuration would skip, had the first blocks added these residuals."""
        context = self.manager.new_context(name="replay", cache_config=config)
        try:
            self.manager.set_context(context)
            for residual in residuals:
                self._decide(residual)
            return list(context.cached_steps)
        finally:
            self.manager.remove_context(context)
            self.manager._current_context = None

    # What cache-dit does with the hidden states after the first blocks ...

    def skips(self, entered: torch.Tensor, hidden: torch.Tensor) -> bool:
        """Whether the middle can be skipped, going by what the first blocks have made of what `entered` them."""
        residual = self._helper._get_Fn_residual(entered, hidden)
        if self.observer is not None:
            self.observer.middle_begins(self, self.manager.get_context().name, residual)
        return self._decide(residual)

    def _decide(self, residual: torch.Tensor) -> bool:
        self.manager.mark_step_begin()
        prefix = f"{self.name}_Fn_residual"
        if self.manager.can_cache(residual, parallelized=False, prefix=prefix):
            self.manager.add_cached_step()
            return True
        self.manager.set_Fn_buffer(residual, prefix=prefix)
        return False

    def _similar(
        self, alone: Any, before: torch.Tensor, now: torch.Tensor, *, threshold: float, **options: Any
    ) -> bool:
        """cache-dit's own answer; but where ranks must decide alike, of the differences of them all.

        cache-dit would ask every rank of the default group, which may be in another generation, or in none.
        """
        if not self.groups or not 0 < threshold < 1 or before.shape != now.shape:
            return alone(before, now, threshold=threshold, **options)
        means = torch.stack([(before - now).abs().mean(), before.abs().mean()]).float()
        changed, size = ranks.average(self.groups, means).tolist()
        diff = changed / size if size else float("nan")
        self.manager.add_residual_diff(diff)
        return diff < threshold

    # ... and after the middle ones.

    def keep(self, before: tuple, after: tuple) -> None:
        """Keep what the middle blocks added to (hidden, encoder)."""
        if self.observer is not None:
            self.observer.middle_ends(self, self.manager.get_context().name)
        self._sizes = (after[0].nbytes, 0 if after[1] is None else after[1].nbytes, after[0].itemsize)
        prefix = f"{self.name}_Bn_residual"
        self.manager.set_Bn_buffer(after[0].contiguous() - before[0].to(after[0].device), prefix=prefix)
        if before[1] is not None and after[1] is not None:
            self.manager.set_Bn_encoder_buffer(after[1].contiguous() - before[1], prefix=prefix)

    def reuse(self, before: tuple) -> tuple:
        """What the middle blocks would make of (hidden, encoder)."""
        prefix = f"{self.name}_Bn_residual"
        return self.manager.apply_cache(*before, prefix=prefix, encoder_prefix=prefix)


class _Loop(torch.nn.ModuleList):
    """The block list during one forward: in every other respect the real one, but what is taken from it are gates."""

    def __init__(self, gates: Gates, real: torch.nn.ModuleList) -> None:
        self.__dict__ |= real.__dict__  # its modules, and no registrations of its own
        self.__dict__["_pass"] = _Pass(gates, len(real))

    def __iter__(self) -> Iterator[Any]:
        return (_Gate(self._pass, number, block) for number, block in enumerate(children(self).values()))

    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]


class _Pass:
    """One forward through a block list: what came in, whether the middle is skipped, what went out."""

    def __init__(self, gates: Gates, count: int) -> None:
        self._gates = gates
        self._last = count - gates.bn - 1
        self._entered: torch.Tensor | None = None
        self._made: torch.Tensor | None = None  # the encoder's hidden states, where blocks do not take but return them
        self._before: tuple = ()
        self.skipping = False

    def call(self, number: int, block: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
        gates = self._gates
        if number == 0:
            self._entered = self._taken(args, kwargs)[0]
        if number == gates.fn:
            self._before = self._taken(args, kwargs)
            self.skipping = gates.skips(self._entered, self._before[0])
            self._entered = None
        if gates.fn <= number <= self._last and self.skipping:
            return self._returned(gates.reuse(self._before) if number == self._last else self._taken(args, kwargs))
        result = block(*args, **kwargs)
        if number < gates.fn or number == self._last:
            after = self._split(result)
            self._made = after[1]
            if number == self._last and self._before:  # or the loop has left out the block that decides
                gates.keep(self._before, after)
                self._before = ()
        return result

    def _taken(self, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(hidden, encoder) among a block's arguments."""
        names = self._gates.pattern.In
        found = [args[place] if place < len(args) else kwargs.get(name) for place, name in enumerate(names)]
        if not isinstance(found[0], torch.Tensor):
            raise StepCacheError(
                f"{self._gates.where}: its blocks are called without hidden states in the first place or by the name "
                f"`{names[0]}`; the spec's `pattern` is for other blocks"
            )
        if self._gates.pattern.Return_H_Only:
            return found[0], None  # what blocks do not return, they do not change
        return found[0], found[1] if len(found) > 1 else self._made

    def _split(self, result: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(hidden, encoder) of what a block returned."""
        pattern = self._gates.pattern
        if pattern.Return_H_Only:
            whole = isinstance(result, torch.Tensor)
            found = (result, None) if whole else None
        else:
            whole = isinstance(result, (tuple, list)) and len(result) == 2
            found = (tuple(result) if pattern.Return_H_First else (result[1], result[0])) if whole else None
        if found is None or not isinstance(found[0], torch.Tensor):
            raise StepCacheError(
                f"{self._gates.where}: a block returned {type(result).__name__}, not {', '.join(pattern.Out)}; "
                "the spec's `pattern` is for other blocks"
            )
        return found

    def _returned(self, states: tuple) -> Any:
        """(hidden, encoder) as a block returns them."""
        pattern = self._gates.pattern
        if pattern.Return_H_Only:
            return states[0]
        return states if pattern.Return_H_First else (states[1], states[0])


class _Gate:
    """One block during one forward."""

    __slots__ = ("_block", "_number", "_pass")

    def __init__(self, made_in: _Pass, number: int, block: torch.nn.Module) -> None:
        self._pass, self._number, self._block = made_in, number, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._pass.call(self._number, self._block, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


@contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
