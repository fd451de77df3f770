"""What of cache-dit is used without being documented: its caching package is driven block by block.

Seen in cache-dit 1.5.3. Nothing here is imported before a step cache is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from .torch_internals import children


def context_manager(name: str, is_similar: Callable[..., bool]) -> Any:
    """Return a `CachedContextManager` that asks `is_similar` whether two residuals are.

    `CachedContextManager.can_cache` calls its own `similarity(before, now, *, threshold, ...)`, which averages over the
    default process group. `is_similar` is given that method first, and then its arguments. Without this, ranks that
    generate independently would wait for each other.
    """
    from cache_dit.caching import CachedContextManager

    manager = CachedContextManager(name=name, persistent_context=True)
    manager.similarity = partial(is_similar, manager.similarity)
    return manager


def is_cached_forward(forward: Any) -> bool:
    """Return whether a model's forward is cache-dit's `new_forward_with_hf_hook`, which hands its arguments on.

    Where the name is gone, it is taken for a forward that was replaced.
    """
    return getattr(forward, "__qualname__", "").endswith(".new_forward_with_hf_hook")


def is_on(model: torch.nn.Module) -> bool:
    """Return whether `cache_dit.enable_cache` was called on the model: it has `_is_cached` or `_context_manager`.

    Nothing public says so. Two step caches on one model would skip blocks inside skipped blocks. False where both names
    are gone.
    """
    return "_is_cached" in vars(model) or "_context_manager" in vars(model)


def cached_steps(model: torch.nn.Module) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield the name of each context of a cached model, and the steps that it skipped with the prompt and without.

    `_context_names` and `_context_manager` are on the model, `cached_steps` and `cfg_cached_steps` on each context;
    `cache_dit.summary` has the same in print. It is what ours is compared with.
    """
    for name in model._context_names:
        context = model._context_manager.get_context(name)
        yield name, tuple(context.cached_steps), tuple(context.cfg_cached_steps)


def first_residual(
    manager: Any, owner: torch.nn.Module, name: str, pattern: int, label: str
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the function that makes of the hidden states before and after the first blocks what decisions go by.

    It is `CachedBlocks._get_Fn_residual`, which is private, and what makes our decisions cache-dit's own. The object it
    belongs to checks blocks by the names of their classes; those checks are off, since the spec says what blocks are.
    """
    from cache_dit.caching import CachedBlocks, ForwardPattern

    with _errors_only("cache_dit.caching.cache_blocks.pattern_base"):  # it says that its checks are off
        blocks = CachedBlocks(
            children(owner)[name],
            transformer=owner,
            forward_pattern=ForwardPattern[f"Pattern_{pattern}"],
            check_forward_pattern=False,
            check_num_outputs=False,
            cache_prefix=name,
            cache_context=label,
            context_manager=manager,
        )
    return blocks._get_Fn_residual


def leave_context(manager: Any) -> None:
    """Have the manager hold no context any more.

    `clear_contexts` and `remove_context` forget a context by its name, but `_current_context` still refers to the last
    one, and so to its tensors. There is no public way to let go of it.
    """
    manager._current_context = None


def held_bytes(context: Any) -> int:
    """Return the bytes of the tensors below a context, wherever its calibrators keep them; each storage once.

    A context has no such figure, and calibrators keep their histories in attributes of their own. So every object of
    cache-dit's classes is looked into, whatever its attributes are called.
    """
    return _held_bytes(context, set())


def _held_bytes(part: Any, seen: set[int]) -> int:
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
        return sum(_held_bytes(each, seen) for each in part.values())
    if isinstance(part, (list, tuple)):
        return sum(_held_bytes(each, seen) for each in part)
    return _held_bytes(vars(part), seen) if type(part).__module__.startswith("cache_dit.") else 0


@contextmanager
def _errors_only(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
