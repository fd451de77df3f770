"""What modules compute with besides their arguments, and whether it still is what it was.

Weights and buffers, plain attributes, LoRA adapters, and the switches that change the bits of a matrix product. Knows
nothing about calls or caches: a `State` answers with a number that changes whenever something of this does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from ..upstream import fastvideo_internals, peft_internals
from ..upstream.torch_internals import (
    are_algorithms_deterministic,
    buffers,
    children,
    forward_hooks,
    forward_pre_hooks,
    fsdp2_modules,
    matmul_precision,
    parameters,
    storage_id,
    tensor_version,
)
from .keys import PLAIN, Pins, Uncacheable


class State:
    """Everything that modules compute with besides their arguments, to notice that it is not what it was.

    Parameters and buffers (which object, which storage, which version), LoRA scaling and adapters, and the modules' own
    plain attributes (theta, patch size, `training` ...). What is written through `.data` leaves no version behind and
    is not seen, except by a LoRA adapter: one around a module of `root` counts with it, as it may be merged into it.
    `parameters` are single ones that count, too: the group that holds each, and its name there.
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
        self._places = [_place(root, module) for module in self.modules]
        self._attributes = [(vars(module), _plain_names(module)) for module in self.modules]
        self._lock = threading.Lock()
        self._known = _Known()

    def epoch(self) -> int:
        """A number that changes with the state.

        Raises:
            Uncacheable: where weights are on the meta device, recorded by autograd, in training, sharded, or hooked
            inside.
        """
        known = self._known
        if known.refusal is not None or not _holds(known):
            known = self._renew()
        if known.refusal is not None:
            raise Uncacheable(known.refusal)
        if known.weighted and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors()):
            self.forget()  # an optimizer may come next, and a fused one leaves no version behind
            raise Uncacheable("autograd is recording")
        return known.epoch

    def tensors(self) -> list[torch.Tensor]:
        """The parameters and buffers that count."""
        found: list[torch.Tensor | None] = []
        for module in self.modules:
            for each in module.modules() if self.subtree else (module,):
                found += [*parameters(each).values(), *buffers(each).values()]
        found += [group.get(name) for group, name in self.parameters]
        return [tensor for tensor in found if tensor is not None]

    def forget(self) -> None:
        """Let go of the modules that were there at the last look; results before the next look are of another epoch."""
        with self._lock:
            self._known = _Known(self._known.epoch)

    def _renew(self) -> _Known:
        with self._lock:
            tops = [_around(module, place) for module, place in zip(self.modules, self._places)]
            modules = [each for module in tops for each in (module.modules() if self.subtree else (module,))]
            owns = [module.__dict__ for module in modules]
            below = [module for module in modules if not any(module is each for each in (*tops, *self.modules))]
            groups = [read(module) for module in modules for read in (parameters, buffers)]
            tensors = [(group, name, tensor) for group in groups for name, tensor in group.items()]
            tensors += [(group, name, group.get(name)) for group, name in self.parameters]
            tensors = [named for named in tensors if named[-1] is not None]
            weighted = any(isinstance(tensor, torch.nn.Parameter) for _, _, tensor in tensors)
            hooks = [read(module) for module in below for read in (forward_hooks, forward_pre_hooks) if weighted]
            refusal = self._refusal([tensor for _, _, tensor in tensors], weighted)
            if weighted and refusal is None and _sharded([group for group, _, _ in tensors]):
                refusal = "its weights are sharded by FSDP2, where changes in a shard leave no version behind"
            if any(hooks):
                refusal = "a hook is registered on a submodule, and a hit would skip it"
            # A step cache exchanges the model's own block lists at each forward.
            families = [children(module) for module in modules] if self.subtree else []
            pins = Pins()
            records = []
            for group, name, tensor in tensors if refusal is None else ():
                pins.follow(tensor)
                records.append((group, name, id(tensor), storage_id(tensor), tensor_version(tensor)))
            self._known = _Known(
                epoch=self._known.epoch + 1,
                refusal=refusal,
                weighted=weighted,
                attributes=[_attributes(values, names) for values, names in self._attributes],
                tensors=records,
                sizes=[(group, len(group)) for group in (*groups, *families) if group],
                empty=[group for group in (*groups, *families) if not group],
                children=[(family, tuple(family.values())) for family in families if family],
                hooks=hooks,
                adapters=[(read, own, read(own)) for own in owns for read in _adapter_readers(own)],
                places=[(*place, place[0].get(place[1])) for place in self._places if place is not None],
                numerics=numerics(),
                storages=pins.storages,
            )
            return self._known

    def _refusal(self, tensors: list[torch.Tensor], weighted: bool) -> str | None:
        """Why nothing can be kept while the tensors are what they are."""
        for tensor in tensors:
            if type(tensor) not in PLAIN:
                return f"weights of type {type(tensor).__qualname__}"
            if tensor.is_meta:
                return "weights on the meta device"
            if tensor.is_inference():
                return "weights made under inference_mode have no version: changes in place would go unseen"
        if weighted and any(module.training for module in self.modules):
            return "the module is in training mode; call `.eval()`"
        return None


class _Known(NamedTuple):
    """A state, laid out to be compared with the present one; it holds no tensor, so that weights may come and go."""

    epoch: int = 0
    refusal: str | None = "not read yet"
    weighted: bool = False
    attributes: Sequence = ()
    tensors: Sequence = ()
    sizes: Sequence = ()
    empty: Sequence = ()
    children: Sequence = ()
    hooks: Sequence = ()
    adapters: Sequence = ()
    places: Sequence = ()
    numerics: Hashable = None
    storages: Sequence = ()


def _holds(known: _Known) -> bool:
    """Whether nothing has changed. Written for speed: it runs at every call of every site."""
    for group, size in known.sizes:
        if len(group) != size:
            return False
    if any(known.empty):
        return False
    try:
        for values, read, expected in known.attributes:
            if read(values) != expected:
                return False
        for group, name, identity, storage, version in known.tensors:
            tensor = group[name]
            # upstream.torch_internals.tensor_version and storage_id, without their calls
            if id(tensor) != identity or tensor._version != version or tensor.untyped_storage()._cdata != storage:
                return False
    except (KeyError, AttributeError, RuntimeError, TypeError, ValueError):  # gone, or no longer of its kind
        return False
    for group, before in known.children:
        for child, expected in zip(group.values(), before):
            if child is not expected:
                return False
    if not known.weighted:
        return True
    for group, name, expected in known.places:
        if group.get(name) is not expected:
            return False
    for read, layer, adapters in known.adapters:
        if read(layer) != adapters:
            return False
    return not any(known.hooks) and numerics() == known.numerics


def _sharded(groups: Sequence[dict]) -> bool:
    """Whether one of these is filled by `fully_shard` anew at each forward: the same tensors, and the same versions."""
    sharded = fsdp2_modules()
    if sharded is None:
        return torch.distributed.is_initialized()
    asked = {id(group) for group in groups}
    # The root, which has most, comes last.
    return any(id(parameters(each)) in asked for module in reversed(sharded) for each in module.modules())


def _place(root: torch.nn.Module, module: torch.nn.Module) -> tuple[dict, str] | None:
    """Where the module stands in the tree of `root`: its parent's children, and its name among them."""
    for parent in root.modules():
        for name, child in children(parent).items():
            if child is module:
                return children(parent), name
    return None


def _around(module: torch.nn.Module, place: tuple[dict, str] | None) -> torch.nn.Module:
    """What stands in the module's place now, if the module is inside it, as in a LoRA layer; else the module itself."""
    now = None if place is None else place[0].get(place[1])
    return now if now is not None and any(each is module for each in now.modules()) else module


def _plain_names(module: torch.nn.Module) -> list[str]:
    """The names of a module's plain attributes; `training` is always among them."""
    return [name for name, value in vars(module).items() if not name.startswith("_") and _plain(value)]


def _attributes(values: dict, names: list[str]) -> tuple[dict, Callable[[dict], tuple], tuple]:
    """A module's `vars`, a function that takes the named ones out of it, and what that gives now."""
    read = itemgetter(*names, "training")  # a second name, so that it always gives a tuple
    if not all(name in values for name in names):

        def read(values: dict) -> tuple:
            return tuple(values.get(name) for name in names)

    # A list may be changed in place, and would still equal itself.
    return values, read, tuple(list(value) if type(value) is list else value for value in read(values))


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, (bool, int, float, str)) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _adapter_readers(layer: dict) -> list[Callable[[dict], Hashable]]:
    """What reads the adapters of a LoRA layer, given as its `vars`; none for any other module."""
    return [library.adapter_state for library in (fastvideo_internals, peft_internals) if library.is_adapter(layer)]


def numerics() -> Hashable:
    """Global switches that change the bits of a matrix product; they count for sites that have weights."""
    return matmul_precision(), are_algorithms_deterministic()
