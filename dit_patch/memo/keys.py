"""From the arguments of a call to a hashable key, and to what that key depends on staying alive.

Knows nothing about sites, caches or models. A `Plan` is made once per patched attribute from the facets that a spec
names; everything that is not a tensor is in the key whether the spec names it or not, so that a spec can only make
keys finer. What cannot be a key raises `Uncacheable`, with the reason that the report shows.

Tensors named by `identity`, and weights, are followed by their *storage*, held weakly: the storage's
address cannot be reused while the entry exists, and no memory is kept that the program has let go.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch

from ..errors import SiteError
from ..upstream.torch_internals import (
    StorageWeakRef,
    asked_device,
    count_dispatch_modes,
    count_function_modes,
    is_any_autocast_enabled,
    is_capturing,
    is_cuda_initialized,
    is_fake_mode_active,
    is_functorch_active,
    raw_stream,
    tracing_state,
)

PLAIN: set[type] = {torch.Tensor, torch.nn.Parameter}
"""Tensor types whose contents are what their storage holds. Others (fake, functional, quantised ...) are bypassed."""

CAPTURING = "a CUDA graph is being captured"
_SMALL = 4096  # bytes up to which a CPU tensor's content goes into the key itself


class Uncacheable(Exception):
    """This call cannot be looked up or stored; the argument is the reason, in a few words."""


class Pins:
    """What the key of one call depends on: storages to follow, and whatever else can say whether it is there."""

    def __init__(self) -> None:
        self.storages: list[StorageWeakRef] = []
        self.others: list[Callable[[], bool]] = []

    def follow(self, tensor: torch.Tensor) -> None:
        self.storages.append(StorageWeakRef(tensor.untyped_storage()))

    @property
    def alive(self) -> list[Callable[[], bool]]:
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
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)


def _identity(tensor: torch.Tensor) -> Hashable:
    refuse_autograd(tensor)
    try:
        version = tensor._version  # upstream.torch_internals.tensor_version, without its call; below, storage_id
    except RuntimeError:
        raise Uncacheable("an inference tensor has no version: changes in place would go unseen") from None
    storage = tensor.untyped_storage()._cdata
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


class Argument:
    """How one argument enters the key: by its facets where it is a tensor, by its value where it is not."""

    __slots__ = ("facets", "name", "only", "where")

    def __init__(self, name: str, facets: Iterable[str] | None, where: str) -> None:
        self.name, self.where = name, where
        self.facets = None if facets is None else tuple((facet, _READ[facet]) for facet in facets)
        self.only = self.facets[0][1] if self.facets and len(self.facets) == 1 else None

    def part(self, value: Any, pins: Pins | None) -> Hashable:
        kind = type(value)
        if kind in PLAIN:
            if self.facets is None:
                raise SiteError(
                    f"{self.where}: `{self.name}` is a tensor, and `key` does not say what of it counts.\n"
                    f"    Add `{self.name}: [...]` with one or more of {', '.join(_FACETS)}."
                )
            if pins is not None and any(facet == "identity" for facet, _ in self.facets):
                pins.follow(value)
            if self.only is not None:
                return self.only(value)
            return tuple([read(value) for _, read in self.facets])
        if value is None:
            return None
        if kind in _SCALARS:
            return kind, value
        if kind is float:
            return repr(value)  # 0.0 is not -0.0, and nan is itself
        if isinstance(value, torch.Tensor):
            raise Uncacheable(f"a {kind.__qualname__}, which is not a plain tensor")
        if isinstance(value, (tuple, list)):
            return kind, tuple([self.part(item, pins) for item in value])
        if isinstance(value, Mapping):
            return kind, tuple([(self.part(key, pins), self.part(item, pins)) for key, item in value.items()])
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
        where: `diffusers/wan: rope.forward`, for messages.
        default: the facets of tensors that are not named; without it, such a tensor is an error.
    """

    def __init__(
        self,
        parameters: Iterable[str],
        facets: Mapping[str, Iterable[str]],
        where: str,
        default: Iterable[str] | None = None,
    ) -> None:
        self.where, self.default = where, default
        named = {name: Argument(name, facets.get(name, default), where) for name in parameters}
        self.positional = tuple(named.values())
        self.named = named
        self.borrowed = tuple(
            Argument(name.removeprefix("model."), chosen, where)
            for name, chosen in facets.items()
            if name.startswith("model.")
        )
        self.facets = facets
        # By far the most frequent call: one tensor of which one thing counts.
        self._lone = self.positional[0].only if self.positional and not self.borrowed else None

    def parts(self, args: tuple, kwargs: dict, frame, pins: Pins | None = None) -> list[Hashable]:
        """The key of a call, as a list: one part per borrowed argument, per positional one, per keyword."""
        if self._lone is not None and pins is None and len(args) == 1 and not kwargs and type(args[0]) is torch.Tensor:
            return [self._lone(args[0])]
        if len(args) > len(self.positional):
            raise Uncacheable("more positional arguments than the signature names")
        parts = [argument.part(value, pins) for argument, value in zip(self.positional, args)]
        if self.borrowed and frame.nameless:
            raise Uncacheable("the model was called with positional arguments that its spec does not name")
        for argument in self.borrowed:
            parts.append(argument.part(frame.argument(argument.name), pins))
        for name, value in kwargs.items():
            argument = self.named.get(name) or Argument(name, self.facets.get(name, self.default), self.where)
            parts.append((name, argument.part(value, pins)))
        return parts


class _AnyStream:
    """Equal to every stream."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


_ANY_STREAM = _AnyStream()


def ambient(constant: bool = False) -> Hashable:
    """The state around a call that changes its result without being an argument: autocast, default device, CUDA stream.

    Args:
        constant: the result depends on nothing that a tensor holds, and so may become a part of a CUDA graph.

    Raises:
        Uncacheable: where results are no numbers (fake tensors, tracing, functorch), or a CUDA graph would replay them.
    """
    if count_dispatch_modes() and is_fake_mode_active():
        raise Uncacheable("fake tensors")
    if tracing_state() is not None:
        raise Uncacheable("tracing")
    if is_functorch_active():
        raise Uncacheable("a functorch transform")
    if not is_any_autocast_enabled() and not is_cuda_initialized():
        return default_device() if count_function_modes() else None
    stream = raw_stream(torch.cuda.current_device()) if is_cuda_initialized() else None
    if is_capturing():
        # A graph would replay what was found at capture, whatever is in its inputs by then.
        if not constant:
            raise Uncacheable(CAPTURING)
        stream = _ANY_STREAM  # a capture begins with all streams having ended their work
    autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in _kinds() if torch.is_autocast_enabled(kind))
    return autocast, stream, torch.cuda.current_device() if is_cuda_initialized() else None, default_device()


def default_device() -> torch.device | None:
    """Where tensors are made if nobody says where; None for the CPU, and where it is the meta device.

    Under that, tables that are made without saying where would hold nothing: see `on_a_real_device`.
    """
    default = asked_device()
    return None if default is None or default.type in ("cpu", "meta") else default


def on_a_real_device() -> AbstractContextManager:
    """The CPU as the default device where it is the meta device, as libraries have it while they load a model."""
    default = asked_device()
    return torch.device("cpu") if default is not None and default.type == "meta" else nullcontext()


def _kinds() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
