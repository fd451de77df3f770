"""Everything that modules compute with besides their arguments, as one number that changes whenever any of it does.

Knows nothing about calls or caches; what is looked at is in `guards`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from ..upstream.torch_internals import (
    buffers,
    children,
    forward_hooks,
    forward_pre_hooks,
    fsdp2_modules,
    parameters,
)
from .guards import (
    AdapterGuard,
    AttributeGuard,
    Guard,
    HookGuard,
    MembersGuard,
    ModuleGuard,
    NumericsGuard,
    PlaceGuard,
    TensorGuard,
    find_place,
    outermost,
    plain_attributes,
)
from .keys import PLAIN, Uncacheable

Named = tuple[dict, str, torch.Tensor]
"""A tensor with the group that holds it, and its name there."""


class _Snapshot(NamedTuple):
    """What was found at the last look: guards to compare the present with, or why nothing can be kept."""

    epoch: int = 0
    refusal: str | None = "not looked yet"
    has_weights: bool = False
    checks: Sequence[Callable[[], bool]] = (bool,)  # which is False


class ModuleGuards:
    """The guards of some modules, made anew whenever one of them does not hold any more.

    Args:
        modules: what computes the results.
        root: the model that they are in. A LoRA layer that stands around one of them there counts with it, as it may be
            merged into it.
        subtree: whether what is below the modules counts, too.
        parameters: single parameters that count, too: the group that holds each, and its name there.
    """

    def __init__(
        self,
        modules: Iterable[torch.nn.Module],
        root: torch.nn.Module,
        *,
        subtree: bool = True,
        parameters: Iterable[tuple[dict, str]] = (),
    ) -> None:
        self.modules = tuple(modules)
        self.subtree = subtree
        self.parameters = tuple(parameters)
        self._places = [find_place(root, module) for module in self.modules]
        self._attributes = [(vars(module), plain_attributes(module)) for module in self.modules]
        self._lock = threading.Lock()
        self._snapshot = _Snapshot()

    def __repr__(self) -> str:
        names = ", ".join(type(module).__name__ for module in self.modules)
        return f"<ModuleGuards of {names}: epoch {self._snapshot.epoch}>"

    def epoch(self) -> int:
        """Return a number that changes whenever anything that counts has changed.

        Raises:
            Uncacheable: where weights are on the meta device, recorded by autograd, in training, sharded, or hooked
            inside.
        """
        snapshot = self._snapshot
        for still_holds in snapshot.checks:
            if not still_holds():
                snapshot = self._look()
                break
        if snapshot.refusal is not None:
            raise Uncacheable(snapshot.refusal)
        if snapshot.has_weights and torch.is_grad_enabled() and any(each.requires_grad for each in self.tensors()):
            self.forget()  # an optimizer may come next, and a fused one leaves no version behind
            raise Uncacheable("autograd is recording")
        return snapshot.epoch

    def tensors(self) -> list[torch.Tensor]:
        """Return the parameters and buffers that count."""
        found: list[torch.Tensor | None] = []
        for module in self._spread(self.modules):
            found += parameters(module).values()
            found += buffers(module).values()
        found += [group.get(name) for group, name in self.parameters]
        return [tensor for tensor in found if tensor is not None]

    def forget(self) -> None:
        """Let go of the modules that were there at the last look; results before the next look are of another epoch."""
        with self._lock:
            self._snapshot = _Snapshot(self._snapshot.epoch)

    def _look(self) -> _Snapshot:
        with self._lock:
            tops = [outermost(module, place) for module, place in zip(self.modules, self._places)]
            modules = self._spread(tops)
            tensors = self._named_tensors(modules)
            has_weights = any(isinstance(tensor, torch.nn.Parameter) for _, _, tensor in tensors)
            below = [module for module in modules if not any(module is each for each in (*tops, *self.modules))]
            hooks = [read(module) for module in below for read in (forward_hooks, forward_pre_hooks) if has_weights]
            try:
                check_cacheable(tensors, self.modules, hooks, has_weights=has_weights)
            except Uncacheable as reason:
                self._snapshot = _Snapshot(self._snapshot.epoch + 1, str(reason), has_weights)
            else:
                guards = self._guards(modules, tensors, hooks, has_weights=has_weights)
                checks = tuple(guard.still_holds for guard in guards)
                self._snapshot = _Snapshot(self._snapshot.epoch + 1, None, has_weights, checks)
            return self._snapshot

    def _guards(
        self, modules: list[torch.nn.Module], tensors: list[Named], hooks: list[dict], *, has_weights: bool
    ) -> list[Guard]:
        """Return the guards that are needed, in the order in which they are asked."""
        families = [children(module) for module in modules] if self.subtree else []
        groups = [read(module) for module in modules for read in (parameters, buffers)]
        guards = [MembersGuard([*groups, *families]), AttributeGuard(self._attributes), TensorGuard(tensors)]
        if any(families):
            guards.append(ModuleGuard(families))
        if has_weights:
            places = PlaceGuard(place for place in self._places if place is not None)
            optional = (AdapterGuard(vars(module) for module in modules), HookGuard(hooks))
            guards += [places, *filter(None, optional), NumericsGuard()]
        return guards

    def _spread(self, tops: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
        return [each for module in tops for each in (module.modules() if self.subtree else (module,))]

    def _named_tensors(self, modules: list[torch.nn.Module]) -> list[Named]:
        groups = [read(module) for module in modules for read in (parameters, buffers)]
        named = [(group, name, tensor) for group in groups for name, tensor in group.items()]
        named += [(group, name, group.get(name)) for group, name in self.parameters]
        return [each for each in named if each[-1] is not None]


def check_cacheable(
    tensors: list[Named], modules: Sequence[torch.nn.Module], hooks: list[dict], *, has_weights: bool
) -> None:
    """Raise Uncacheable if nothing can be kept while weights and hooks are what they are."""
    if any(hooks):
        raise Uncacheable("a hook is registered on a submodule, and a hit would skip it")
    for _, _, tensor in tensors:
        if type(tensor) not in PLAIN:
            raise Uncacheable(f"weights of type {type(tensor).__qualname__}")
        if tensor.is_meta:
            raise Uncacheable("weights on the meta device")
        if tensor.is_inference():
            raise Uncacheable("weights made under inference_mode have no version: changes in place would go unseen")
    if has_weights and any(module.training for module in modules):
        raise Uncacheable("the module is in training mode; call `.eval()`")
    if has_weights and _is_sharded(group for group, _, _ in tensors):
        raise Uncacheable("its weights are sharded by FSDP2, where changes in a shard leave no version behind")


def _is_sharded(groups: Iterable[dict]) -> bool:
    """Return whether one of these is filled by `fully_shard` anew at each forward: same tensors, same versions."""
    sharded = fsdp2_modules()
    if sharded is None:
        return torch.distributed.is_initialized()
    asked = {id(group) for group in groups}
    # The root, which has most, comes last.
    return any(id(parameters(each)) in asked for module in reversed(sharded) for each in module.modules())
