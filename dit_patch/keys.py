"""From the arguments of a call to a hashable key, and to what that key depends on staying alive.

Knows nothing about sites, caches or models. A `Plan` is made once per patched attribute from the facets that a spec
names; everything that is not a tensor is in the key whether the spec names it or not, so that a spec can only make
keys finer. What cannot be a key raises `Uncacheable`, with the reason that the report shows.

Tensors named by `identity` or by their weights' state are followed by their *storage*, held weakly: the storage's
address cannot be reused while the entry exists, and no memory is kept that the program has let go.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .errors import SiteError

PLAIN: set[type] = {torch.Tensor, torch.nn.Parameter}
"""Tensor types whose contents are what their storage holds. Others (fake, functional, quantised ...) are bypassed."""

_SMALL = 4096  # bytes up to which a CPU tensor's content goes into the key itself
_fake_mode = torch._C._TorchDispatchModeKey.FAKE


class Uncacheable(Exception):
    """This call cannot be looked up or stored; the argument is the reason, in a few words."""


class Pins:
    """What the key of one call depends on: storages to follow, and whatever else can answer whether it is still there."""

    def __init__(self) -> None:
        self.storages: list[StorageWeakRef] = []
        self.others: list[Callable[[], bool]] = []

    def follow(self, tensor: torch.Tensor) -> None:
        self.storages.append(StorageWeakRef(tensor.untyped_storage()))

    @property
    def alive(self) -> list[Callable[[], bool]]:
        return [*(lambda storage=storage: not storage.expired() for storage in self.storages), *self.others]


class Content:
    """A tensor in a key by its content. Equal means the same bits; a GPU tensor is compared with one synchronisation."""

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
    flat = (tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1) for tensor in (one, other))
    return torch.equal(*(tensor.view(torch.uint8) for tensor in flat))


def _identity(tensor: torch.Tensor) -> Hashable:
    _refuse_autograd(tensor)
    try:
        version = tensor._version
    except RuntimeError:
        raise Uncacheable("an inference tensor has no version: changes in place would go unseen") from None
    storage = tensor.untyped_storage()._cdata
    return storage, version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj()


def _values(tensor: torch.Tensor) -> Hashable:
    _refuse_autograd(tensor)
    if tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() <= _SMALL:
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
        return tensor.shape, tensor.dtype, bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""
    return Content(tensor)


def _refuse_autograd(tensor: torch.Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise Uncacheable("autograd is recording")


_FACETS: dict[str, Callable[[torch.Tensor], Hashable]] = {
    "shape": attrgetter("shape"),
    "dtype": attrgetter("dtype"),
    "device": attrgetter("device"),
    "identity": _identity,
    "values": _values,
}


class Argument:
    """How one argument enters the key: by its facets where it is a tensor, by its value where it is not."""

    __slots__ = ("facets", "name", "only", "where")

    def __init__(self, name: str, facets: Iterable[str] | None, where: str) -> None:
        self.name, self.where = name, where
        self.facets = None if facets is None else tuple((facet, _FACETS[facet]) for facet in facets)
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
    """How the calls of one attribute become keys: its parameters' facets, and what is borrowed from the model's forward.

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
        for argument in self.borrowed:
            parts.append(argument.part(frame.argument(argument.name), pins))
        for name, value in kwargs.items():
            argument = self.named.get(name) or Argument(name, self.facets.get(name, self.default), self.where)
            parts.append((name, argument.part(value, pins)))
        return parts


_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_functorch = torch._C._are_functorch_transforms_active
_autocast = torch._C._is_any_autocast_enabled
_cuda = torch.cuda.is_initialized


def ambient() -> Hashable:
    """The state around a call that changes its result without being an argument: autocast, and the CUDA stream.

    Raises:
        Uncacheable: where results are not numbers (fake tensors, tracing, functorch) or do not exist yet (graph capture).
    """
    if _dispatch_modes() and torch._C._get_dispatch_mode(_fake_mode) is not None:
        raise Uncacheable("fake tensors")
    if _tracing() is not None:
        raise Uncacheable("tracing")
    if _functorch():
        raise Uncacheable("a functorch transform")
    if not _autocast() and not _cuda():
        return None
    if _cuda() and torch.cuda.is_current_stream_capturing():
        # A graph would replay what was found at capture, whatever is in its inputs by then.
        raise Uncacheable("a CUDA graph is being captured")
    autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in _kinds() if torch.is_autocast_enabled(kind))
    stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()) if _cuda() else None
    return autocast, stream, torch.cuda.current_device() if _cuda() else None


def numerics() -> Hashable:
    """Global switches that change the bits of a matrix product; they count for sites that have weights."""
    return torch._C._get_float32_matmul_precision(), torch._C._get_deterministic_algorithms()


def _kinds() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


class State:
    """Everything that modules compute with besides their arguments, to notice that it is not what it was.

    Parameters and buffers (which object, which storage, which version), LoRA scaling and adapters, and the modules' own
    plain attributes (theta, patch size, `training` ...). What is written through `.data` leaves no version behind and is
    not seen, except by a LoRA adapter: one put around a module of `root` counts with it, for it can be merged into it.
    """

    def __init__(self, modules: Iterable[torch.nn.Module], root: torch.nn.Module, *, subtree: bool = True) -> None:
        self.modules = tuple(modules)
        self.subtree = subtree
        self._places = [_place(root, module) for module in self.modules]
        self._attributes = [(vars(module), _plain_names(module)) for module in self.modules]
        self._lock = threading.Lock()
        self._known = _Known()

    def epoch(self) -> int:
        """A number that changes with the state.

        Raises:
            Uncacheable: where weights are on the meta device, recorded by autograd, in training, or hooked inside.
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
        found: list[torch.Tensor] = []
        for module in self.modules:
            for each in module.modules() if self.subtree else (module,):
                found += [tensor for tensor in (*each._parameters.values(), *each._buffers.values()) if tensor is not None]
        return found

    def forget(self) -> None:
        """Let go of the modules that were there at the last look; results before the next look are of another epoch."""
        with self._lock:
            self._known = _Known(self._known.epoch)

    def _renew(self) -> _Known:
        with self._lock:
            tops = [_around(module, place) for module, place in zip(self.modules, self._places)]
            modules = [each for module in tops for each in (module.modules() if self.subtree else (module,))]
            owns = [module.__dict__ for module in modules]
            below = [own for module, own in zip(modules, owns) if not any(module is top for top in (*tops, *self.modules))]
            groups = [own[kind] for own in owns for kind in ("_parameters", "_buffers")]
            tensors = [(group, name, tensor) for group in groups for name, tensor in group.items() if tensor is not None]
            weighted = any(isinstance(tensor, torch.nn.Parameter) for _, _, tensor in tensors)
            hooks = [own[kind] for own in below for kind in ("_forward_hooks", "_forward_pre_hooks")] if weighted else []
            refusal = self._refusal([tensor for _, _, tensor in tensors], weighted)
            if any(hooks):
                refusal = "a hook is registered on a submodule, and a hit would skip it"
            pins = Pins()
            records = []
            for group, name, tensor in tensors if refusal is None else ():
                pins.follow(tensor)
                version = None if tensor.is_inference() else tensor._version
                records.append((group, name, id(tensor), tensor.untyped_storage()._cdata, version))
            self._known = _Known(
                epoch=self._known.epoch + 1,
                refusal=refusal,
                weighted=weighted,
                attributes=[_attributes(values, names) for values, names in self._attributes],
                tensors=[record for record in records if record[-1] is not None],
                unversioned=[record[:-1] for record in records if record[-1] is None],
                sizes=[(group, len(group)) for group in (*groups, *(own["_modules"] for own in owns)) if group],
                empty=[group for group in (*groups, *(own["_modules"] for own in owns)) if not group],
                children=[(own["_modules"], tuple(own["_modules"].values())) for own in owns if own["_modules"]],
                hooks=hooks,
                adapters=[(own, _adapters(own)) for own in owns if "merged_adapters" in own],
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
    unversioned: Sequence = ()
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
            if id(tensor) != identity or tensor._version != version or tensor.untyped_storage()._cdata != storage:
                return False
        for group, name, identity, storage in known.unversioned:
            if id(group[name]) != identity or group[name].untyped_storage()._cdata != storage:
                return False
    except (KeyError, AttributeError, RuntimeError, TypeError, ValueError):  # gone, or no longer of its kind
        return False
    for group, children in known.children:
        for child, expected in zip(group.values(), children):
            if child is not expected:
                return False
    if not known.weighted:
        return True
    for group, name, expected in known.places:
        if group.get(name) is not expected:
            return False
    for layer, adapters in known.adapters:
        if _adapters(layer) != adapters:
            return False
    return not any(known.hooks) and numerics() == known.numerics


def _place(root: torch.nn.Module, module: torch.nn.Module) -> tuple[dict, str] | None:
    """Where the module stands in the tree of `root`: its parent's children, and its name among them."""
    for parent in root.modules():
        for name, child in parent._modules.items():
            if child is module:
                return parent._modules, name
    return None


def _around(module: torch.nn.Module, place: tuple[dict, str] | None) -> torch.nn.Module:
    """What stands in the module's place now, if the module is inside it, as in a LoRA layer; else the module itself."""
    now = None if place is None else place[0].get(place[1])
    return now if now is not None and any(each is module for each in now.modules()) else module


def _plain_names(module: torch.nn.Module) -> list[str]:
    """The names of a module's plain attributes; `training` is always among them."""
    return ["training", *(name for name, value in vars(module).items() if not name.startswith("_") and _plain(value))]


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


def _adapters(layer: dict) -> Hashable:
    """What decides a peft layer's output besides its weights: scaling and the active, disabled and merged adapters."""
    active = layer.get("_active_adapter", ())
    return (
        tuple((name, repr(scale)) for name, scale in layer.get("scaling", {}).items()),
        active if isinstance(active, str) else tuple(active),
        layer.get("_disable_adapters", False),
        tuple(layer["merged_adapters"]),
    )
