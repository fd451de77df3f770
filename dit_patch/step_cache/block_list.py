"""A list of transformer blocks through which a forward may take a short cut, as cache-dit's DBCache decides.

The model's own loop runs, over stand-ins for its blocks: in a skipped step those in the middle hand on what they were
given, and the last of them what cache-dit says the middle would have made. So whatever else the loop does, numbering
its blocks or adding hints between them (VACE), stays as it is; cache-dit's own `CachedBlocks` puts one module in place
of the whole list, which needs a copy of such forwards. Decisions, residuals and forecasts are cache-dit's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..upstream import cache_dit_internals
from ..upstream.torch_internals import children
from . import ranks
from .block_pattern import PATTERNS, States
from .config import StepCache


class Observer(Protocol):
    """Is told of the middle blocks in each step of an uncached run."""

    def middle_begins(self, blocks: CachedBlockList, label: str, residual: torch.Tensor) -> None:
        """The middle begins, in the pass `label`; the first blocks have added `residual`."""

    def middle_ends(self, blocks: CachedBlockList, label: str) -> None:
        """The middle has ended."""


class StateSizes(NamedTuple):
    """Bytes of the hidden states, of the encoder's, and of an element, in the last forward."""

    hidden: int = 0
    encoder: int = 0
    element: int = 2


class CachedBlockList:
    """One block list of a model: stand-ins for it, and what cache-dit keeps of each pass.

    Args:
        owner: the module that holds the list.
        name: the list's name there.
        number: of cache-dit's forward pattern, what a block takes and returns.
        label: what messages call the list.
    """

    def __init__(self, owner: torch.nn.Module, name: str, number: int, label: str) -> None:
        self.owner, self.name, self.label = owner, name, label
        self.pattern = PATTERNS[number]
        self.manager = cache_dit_internals.context_manager(label, self._is_similar)
        self._first_residual = cache_dit_internals.first_residual(self.manager, owner, name, number, label)
        #: cache-dit's context of each pass, by its label.
        self.contexts: dict[str, Any] = {}
        #: What contexts are made with in this generation.
        self._configs: dict[str, Any] = {}
        #: Process groups whose ranks must decide alike.
        self._groups: list[Any] = []
        self._sizes = StateSizes()
        self.observer: Observer | None = None

    def __repr__(self) -> str:
        return f"<CachedBlockList {self.label}: {len(self.contexts)} passes>"

    @property
    def blocks(self) -> torch.nn.ModuleList:
        """The list that is in the model now."""
        return children(self.owner)[self.name]

    @property
    def first(self) -> int:
        """The number of blocks at the beginning that always run."""
        return self._configs["cache_config"].Fn_compute_blocks

    @property
    def last(self) -> int:
        """The number of blocks at the end that always run."""
        return self._configs["cache_config"].Bn_compute_blocks

    def begin(self, config: Any, calibrator: Any, groups: Sequence[Any] = ()) -> None:
        """Forget every pass; from now on decide by this `DBCacheConfig` and calibrator's configuration.

        `groups` are process groups whose ranks must decide alike, see `ranks`.
        """
        self.release()
        self._groups = list(groups)
        self._configs = {"cache_config": config, "calibrator_config": calibrator}

    def release(self) -> None:
        """Give up all tensors that are held."""
        self.manager.clear_contexts()
        cache_dit_internals.leave_context(self.manager)
        self.contexts.clear()

    def estimate(self, config: StepCache) -> int:
        """Return the bytes that one pass will hold at most, going by the last forward."""
        hidden, encoder, itemsize = self._sizes
        return config.memory(hidden, encoder=encoder, passes=1, itemsize=itemsize)

    def enter(self, label: str) -> BlockListProxy:
        """Return stand-ins for one forward of the pass `label`, to be put in the list's place."""
        context = self.contexts.get(label)
        if context is None:
            context = self.contexts[label] = self.manager.new_context(name=label, **self._configs)
        self.manager.set_context(context)
        return BlockListProxy(self, self.blocks)

    def replay(self, config: Any, residuals: list[torch.Tensor]) -> list[int]:
        """Return the steps that this configuration would skip, had the first blocks added these residuals."""
        context = self.manager.new_context(name="replay", cache_config=config)
        try:
            self.manager.set_context(context)
            for residual in residuals:
                self._decide(residual)
            return list(context.cached_steps)
        finally:
            self.manager.remove_context(context)
            cache_dit_internals.leave_context(self.manager)

    def can_skip(self, entered: torch.Tensor, hidden: torch.Tensor) -> bool:
        """Return whether the middle can be skipped, going by what the first blocks have made of what `entered` them."""
        residual = self._first_residual(entered, hidden)
        if self.observer is not None:
            self.observer.middle_begins(self, self.manager.get_context().name, residual)
        return self._decide(residual)

    def keep(self, before: States, after: States) -> None:
        """Keep what the middle blocks added to the states."""
        if self.observer is not None:
            self.observer.middle_ends(self, self.manager.get_context().name)
        self._sizes = StateSizes(after[0].nbytes, 0 if after[1] is None else after[1].nbytes, after[0].itemsize)
        prefix = f"{self.name}_Bn_residual"
        self.manager.set_Bn_buffer(after[0].contiguous() - before[0].to(after[0].device), prefix=prefix)
        if before[1] is not None and after[1] is not None:
            self.manager.set_Bn_encoder_buffer(after[1].contiguous() - before[1], prefix=prefix)

    def reuse(self, before: States) -> States:
        """Return what the middle blocks would make of the states."""
        prefix = f"{self.name}_Bn_residual"
        return self.manager.apply_cache(*before, prefix=prefix, encoder_prefix=prefix)

    def _decide(self, residual: torch.Tensor) -> bool:
        self.manager.mark_step_begin()
        prefix = f"{self.name}_Fn_residual"
        if self.manager.can_cache(residual, parallelized=False, prefix=prefix):
            self.manager.add_cached_step()
            return True
        self.manager.set_Fn_buffer(residual, prefix=prefix)
        return False

    def _is_similar(
        self, theirs: Any, before: torch.Tensor, now: torch.Tensor, *, threshold: float, **options: Any
    ) -> bool:
        """Return cache-dit's own answer; but where ranks must decide alike, that of the differences of them all.

        cache-dit would ask every rank of the default group, which may be in another generation, or in none.
        """
        if not self._groups or not 0 < threshold < 1 or before.shape != now.shape:
            return theirs(before, now, threshold=threshold, **options)
        means = torch.stack([(before - now).abs().mean(), before.abs().mean()]).float()
        changed, size = ranks.average(self._groups, means).tolist()
        diff = changed / size if size else float("nan")
        self.manager.add_residual_diff(diff)
        return diff < threshold


class BlockListProxy(torch.nn.ModuleList):
    """The block list during one forward: in every other respect the real one, but what is taken from it are proxies."""

    def __init__(self, cached: CachedBlockList, real: torch.nn.ModuleList) -> None:
        self.__dict__ |= real.__dict__  # its modules, and no registrations of its own
        self.__dict__["_forward"] = BlockListForward(cached, len(real))

    def __iter__(self) -> Iterator[Any]:
        return (BlockProxy(self._forward, number, block) for number, block in enumerate(children(self).values()))

    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]


class BlockListForward:
    """One forward through a block list: what came in, whether the middle is skipped, what went out."""

    def __init__(self, cached: CachedBlockList, count: int) -> None:
        self._cached = cached
        self._first, self._last = cached.first, count - cached.last - 1
        #: The hidden states that entered the first block, until it is decided.
        self._entered: torch.Tensor | None = None
        #: The encoder's hidden states, where blocks do not take but return them.
        self._made: torch.Tensor | None = None
        #: The states before the middle.
        self._before: States | None = None
        self.is_skipping = False

    def __repr__(self) -> str:
        return f"<BlockListForward of {self._cached.label}{', skipping' * self.is_skipping}>"

    def call(self, number: int, block: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
        """Call a block, or do without it."""
        cached = self._cached
        if number == 0:
            self._entered = self._take(args, kwargs)[0]
        if number == self._first:
            self._before = self._take(args, kwargs)
            self.is_skipping = cached.can_skip(self._entered, self._before[0])
            self._entered = None
        if self._first <= number <= self._last and self.is_skipping:
            states = cached.reuse(self._before) if number == self._last else self._take(args, kwargs)
            return cached.pattern.give(states)
        result = block(*args, **kwargs)
        if number < self._first or number == self._last:
            after = cached.pattern.split(result, cached.label)
            self._made = after[1]
            if number == self._last and self._before is not None:  # or the loop has left out the block that decides
                cached.keep(self._before, after)
                self._before = None
        return result

    def _take(self, args: tuple, kwargs: dict) -> States:
        return self._cached.pattern.take(args, kwargs, self._made, self._cached.label)


class BlockProxy:
    """One block during one forward."""

    __slots__ = ("_block", "_forward", "_number")

    def __init__(self, forward: BlockListForward, number: int, block: torch.nn.Module) -> None:
        self._forward, self._number, self._block = forward, number, block

    def __repr__(self) -> str:
        return f"<BlockProxy {self._number} of {self._forward!r}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward.call(self._number, self._block, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)
