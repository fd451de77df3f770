"""What the results of a bound site depend on, and what else a call of a module's forward goes through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from ..memo.guards import find_path
from ..memo.model_guards import ModelGuards
from ..memo.site_guards import SiteGuards
from ..upstream import cache_dit_internals, diffusers_internals, fastvideo_internals
from ..upstream.torch_internals import children, is_compiled_forward
from . import layers
from .scope import Hook

if TYPE_CHECKING:
    from .binding import Attribute


def model_guards(model: torch.nn.Module) -> ModelGuards:
    """Return the guards of a model, without any sites yet."""
    return ModelGuards(model, lambda hook: isinstance(hook, Hook), foreign_forwards)


def site_guards(attribute: Attribute, model: torch.nn.Module, blocks: Collection[str] = ()) -> SiteGuards:
    """Return the guards of one site.

    Args:
        blocks: the paths of the model's block lists, which run after whatever is kept of the model's arguments.
    """
    owner = attribute.owner
    is_module = isinstance(owner, torch.nn.Module)
    ancestors: list[torch.nn.Module] = []
    between: Callable[[], Iterable[torch.nn.Module]] = tuple
    if attribute.site.borrows:
        ancestors, path = _ancestors(model, owner) if is_module else ([model], "")
        if not any(f"{path}.".startswith(f"{each}.") for each in blocks):
            between = partial(_between, ancestors[-1], owner, is_model=ancestors[-1] is model)
    return SiteGuards(
        attribute.all_modules,
        model,
        subtree=owner is not model,
        parameters=attribute.weights,
        between=between,
        ancestors=ancestors,
        functions=() if is_module else (attribute.original,),
        methods=((type(model), attribute.name),) if owner is model else (),
    )


def foreign_forwards(module: torch.nn.Module, is_own: bool) -> list[Any]:
    """Return what a call of the module's forward goes through besides its class's forward, layers of ours and hooks.

    Hooks of accelerate, diffusers, FastVideo and cache-dit do not count where they only move, cast or shorten; none
    counts on a site's own module, as the layer is below them.
    """
    if "forward" not in vars(module):
        return []
    hooks = [] if is_own else diffusers_internals.hooks(module)
    found = [hook for hook in hooks if not diffusers_internals.is_neutral(hook)]
    value = None
    for holder, name in layers.slots(module, "forward"):
        value = vars(holder).get(name)
        while type(value) is layers.Wrapped:
            value = value.__wrapped__
    is_of_class = value is None or value == MethodType(type(module).forward, module)
    is_neutral = (fastvideo_internals.is_hook, cache_dit_internals.is_cached_forward, is_compiled_forward)
    if not is_of_class and not any(known(value) for known in is_neutral):
        found.append(value)
    return found


def _ancestors(model: torch.nn.Module, owner: torch.nn.Module) -> tuple[list[torch.nn.Module], str]:
    """Return the modules that the owner is in, the model first, and the owner's path; the model alone if in none."""
    path = find_path(model, owner)
    return [model, *(family[name] for family, name in path[:-1])], ".".join(name for _, name in path)


def _between(parent: torch.nn.Module, owner: torch.nn.Module, is_model: bool) -> Iterator[torch.nn.Module]:
    """Yield what is beside the owner in its parent; of a model, without its lists of blocks, which come later."""
    for child in children(parent).values():
        is_blocks = is_model and isinstance(child, torch.nn.ModuleList)
        if child is not None and child is not owner and not is_blocks:
            yield from child.modules()
