"""From the arguments of a call to a hashable key, and to what that key depends on staying alive.

Knows nothing about sites, caches or models. A `Plan` is made once per patched attribute from the facets that a spec
names; everything that is not a tensor is in the key whether the spec names it or not, so that a spec can only make
keys finer. What cannot be a key raises `Uncacheable`, with the reason that the report shows.

Tensors named by `identity`, and weights, are followed by their *storage*, held weakly: the storage's
address cannot be reused while the entry exists, and no memory is kept that the program has let go.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch

from ..errors import SiteError
from ..upstream.torch_internals import StorageWeakRef

PLAIN: set[type] = {torch.Tensor, torch.nn.Parameter}
"""Tensor types whose contents are what their storage holds. Others (fake, functional, quantised ...) are bypassed."""

_SMALL = 4096  # bytes up to which a CPU tensor's content goes into the key itself


class Uncacheable(Exception):
    """This call cannot be looked up or stored; the argument is the reason, in a few words."""


class Dependencies:
    """What the key of one call depends on: storages to follow, and whatever else can say whether it is there."""

    def __init__(self) -> None:
        self.storages: list[StorageWeakRef] = []
        self.others: list[Callable[[], bool]] = []

    def __repr__(self) -> str:
        return f"<Dependencies: {len(self.storages)} storages, {len(self.others)} others>"

    def follow(self, tensor: torch.Tensor) -> None:
        """Depend on the tensor's storage, without keeping it alive."""
        self.storages.append(StorageWeakRef(tensor.untyped_storage()))

    @property
    def alive(self) -> list[Callable[[], bool]]:
        """Functions that return whether what is depended on is there."""
        return [*(lambda storage=storage: not storage.expired() for storage in self.storages), *self.others]


class Content:
    """A tensor in a key by its content. Equal means the same bits; on a GPU comparing synchronises."""

    __slots__ = ("meta", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.meta = (tensor.shape, tensor.dtype, tensor.device)

    def __hash__(self) -> int:
        return hash(self.meta)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Content) and self.meta == other.meta and same_bits(self.tensor, other.tensor)

    def keep(self) -> None:
        """Hold a private copy from now on: the caller's tensor may be written into."""
        self.tensor = self.tensor.detach().clone()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality of shape, dtype, device and every bit: NaN equals the same NaN, and 0.0 is not -0.0."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if one.numel() == 0:
        return True
    return torch.equal(flat(one).view(torch.uint8), flat(other).view(torch.uint8))


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """All its elements in order, as they are in memory once nothing is lazy any more."""
    # Not `view(-1)`: of one element, it keeps any stride, and then cannot be viewed as bytes.
    return tensor.detach().resolve_conj().resolve_neg().contiguous().as_strided((tensor.numel(),), (1,))


def _identity(tensor: torch.Tensor) -> Hashable:
    refuse_autograd(tensor)
    try:
        version = tensor._version  # upstream.torch_internals.tensor_version, without its call; below, storage_id
        storage = tensor.untyped_storage()._cdata
    except RuntimeError:
        if tensor.layout is not torch.strided:
            raise Uncacheable(f"a tensor with the layout {tensor.layout}") from None
        raise Uncacheable("an inference tensor has no version: changes in place would go unseen") from None
    return storage, version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj()


def _values(tensor: torch.Tensor) -> Hashable:
    refuse_autograd(tensor)
    if tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() <= _SMALL:
        return tensor.shape, tensor.dtype, bytes(flat(tensor).view(torch.uint8).tolist()) if tensor.numel() else b""
    return Content(tensor)


def refuse_autograd(tensor: torch.Tensor) -> None:
    """Raise Uncacheable where what is computed from the tensor would have a history."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise Uncacheable("autograd is recording")


_FACETS: dict[str, Callable[[torch.Tensor], Hashable]] = {
    "shape": attrgetter("shape"),
    "dtype": attrgetter("dtype"),
    "device": attrgetter("device"),
    "identity": _identity,
    "values": _values,
}
_READ = {**_FACETS, "stride": torch.Tensor.stride}


def _reader(facets: Sequence[str]) -> Callable[[torch.Tensor], Hashable]:
    """Return what reads these facets of a tensor; of one facet without a tuple around it."""
    if tuple(facets) == ("shape", "dtype", "device"):
        return lambda tensor: (tensor.shape, tensor.dtype, tensor.device)
    reads = [_READ[facet] for facet in facets]
    return reads[0] if len(reads) == 1 else lambda tensor: tuple([read(tensor) for read in reads])


class Argument:
    """How one argument enters the key: by its facets where it is a tensor, by its value where it is not."""

    __slots__ = ("facets", "label", "name", "read")

    def __init__(self, name: str, facets: Iterable[str] | None, label: str) -> None:
        self.name, self.label = name, label
        self.facets = None if facets is None else tuple(facets)
        self.read = None if facets is None else _reader(self.facets)

    def __repr__(self) -> str:
        return f"<Argument {self.name}: {list(self.facets or ())}>"

    def part(self, value: Any, dependencies: Dependencies | None) -> Hashable:
        kind = type(value)
        if kind in PLAIN:
            if self.read is None:
                raise SiteError(
                    f"{self.label}: `{self.name}` is a tensor, and `key` does not say what of it counts.\n"
                    f"    Add `{self.name}: [...]` with one or more of {', '.join(_FACETS)}."
                )
            if dependencies is not None and "identity" in self.facets:
                dependencies.follow(value)
            return self.read(value)
        if value is None:
            return None
        if kind in _SCALARS:
            return kind, value
        if kind is float:
            return repr(value)  # 0.0 is not -0.0, and nan is itself
        if isinstance(value, torch.Tensor):
            raise Uncacheable(f"a {kind.__qualname__}, which is not a plain tensor")
        if isinstance(value, (tuple, list)):
            return kind, tuple([self.part(item, dependencies) for item in value])
        if isinstance(value, Mapping):
            items = [(self.part(key, dependencies), self.part(item, dependencies)) for key, item in value.items()]
            return kind, tuple(items)
        if kind is complex:
            return kind, repr(value)
        if isinstance(value, enum.Enum):
            return kind, value
        raise Uncacheable(f"`{self.name}` is a {kind.__qualname__}, which cannot be part of a key")


_SCALARS = {bool, int, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format}


class Plan:
    """How the calls of one attribute become keys: its parameters' facets, and what it borrows from the model's.

    Args:
        parameters: the names of the attribute's parameters, in order, `self` left out.
        facets: what the spec says of tensor arguments; `model.x` means argument x of the model's forward.
        label: `diffusers/wan: rope.forward`, for messages.
        default: the facets of tensors that are not named; without it, such a tensor is an error.
        aliases: other names of parameters, as keywords, with the names that `facets` has.
    """

    def __init__(
        self,
        parameters: Iterable[str],
        facets: Mapping[str, Iterable[str]],
        label: str,
        default: Iterable[str] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.label, self.default = label, default
        named = {name: Argument(name, facets.get(name, default), label) for name in parameters}
        self.positional = tuple(named.values())
        self.named = named | {alias: named[name] for alias, name in (aliases or {}).items()}
        self.borrowed = tuple(
            Argument(name.removeprefix("model."), chosen, label)
            for name, chosen in facets.items()
            if name.startswith("model.")
        )
        self.facets = facets
        # By far the most frequent call: one tensor of which one thing counts.
        self._lone = self.positional[0].read if self.positional and not self.borrowed else None

    def __repr__(self) -> str:
        return f"<Plan of {self.label}: {list(self.named)}>"

    def parts(self, args: tuple, kwargs: dict, frame, dependencies: Dependencies | None = None) -> list[Hashable]:
        """The key of a call, as a list: one part per borrowed argument, per positional one, per keyword."""
        is_lone = self._lone is not None and len(args) == 1 and not kwargs
        if is_lone and dependencies is None and type(args[0]) is torch.Tensor:
            return [self._lone(args[0])]
        if len(args) > len(self.positional):
            raise Uncacheable("more positional arguments than the signature names")
        parts = [argument.part(value, dependencies) for argument, value in zip(self.positional, args)]
        if self.borrowed:
            if frame.refusal is not None:
                raise Uncacheable(frame.refusal)
            if torch.is_grad_enabled():
                self._refuse_autograd(args, kwargs)
        for argument in self.borrowed:
            parts.append(argument.part(frame.argument(argument.name), dependencies))
        for name, value in kwargs.items():
            argument = self.named.get(name)
            if argument is None:  # taken as **kwargs
                argument = self.named[name] = Argument(name, self.facets.get(name, self.default), self.label)
            parts.append((name, argument.part(value, dependencies)))
        return parts

    def _refuse_autograd(self, args: tuple, kwargs: dict) -> None:
        """Refuse tensors with a history, where the model's arguments stand for their values.

        Of a tensor whose shape does not count, no values can.
        """
        given = [*zip(self.positional, args), *((self.named.get(name), value) for name, value in kwargs.items())]
        for argument, value in given:
            if isinstance(value, torch.Tensor) and (argument is None or "shape" in (argument.facets or ())):
                refuse_autograd(value)
