"""One operation of a forward: what it costs, and what kind of work it is."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from .transfers import INDEXING, SYNCS, Copy, Sync

_VIEWS = {"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "alias"}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
_SHAPES_ONLY = {"zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full"}
_SHAPES_ONLY |= _ALLOCATIONS
_READS = {"_local_scalar_dense", "equal", "is_nonzero"}
_ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Work:
    """What an operation does.

    Attributes:
        flops: floating point operations: two for each multiply-add; one for each number of other results.
        nbytes: what it reads and writes.
        dtype: what it computes in.
        is_product: it is one for matrix units: a product, a convolution, attention.
    """

    flops: int
    nbytes: int
    dtype: torch.dtype
    is_product: bool = False


@dataclass
class Operation:
    """One operation of a forward that did some work; views and bare allocations are none.

    Attributes:
        name: torch's, without the namespace: `addmm`.
        module: the path of the innermost module of the model that it ran in; "" is the model itself.
        line: of the program, `package/file.py:12`.
        on_device: it ran on the device, not on the host.
        is_kernel: it computes; others only copy, or have the host wait.
        work: what it does.
        causes: the arguments of the model that its inputs depend on.
        reads: the arguments that anything depends on that the host had read before in this forward.
        copies: between host and device.
        syncs: waits of the host for the device.
        digest: of its result; None where it was not asked for.
    """

    name: str
    module: str
    line: str
    on_device: bool
    is_kernel: bool
    work: Work
    causes: frozenset[str]
    reads: frozenset[str]
    copies: list[Copy] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    digest: int | None = None


@functools.cache
def is_product(operation: Any) -> bool:
    """Return whether the operation is one for matrix units: a product, a convolution, attention."""
    return name_of(operation) == _ATTENTION or operation.overloadpacket in flop_registry


@functools.cache
def is_view(operation: Any) -> bool:
    """Return whether the operation makes no numbers: a view, or memory to be filled."""
    name = name_of(operation)
    if name in _VIEWS or name in _ALLOCATIONS:
        return True
    schema = operation._schema
    return not schema.is_mutable and any(each.alias_info is not None for each in schema.returns)


def reads_shapes_only(operation: Any) -> bool:
    """Return whether the result depends on its tensors' shapes, and not on what is in them."""
    return name_of(operation) in _SHAPES_ONLY


def is_read(operation: Any) -> bool:
    """Return whether the result is a number for the host."""
    return name_of(operation) in _READS


def told_to_host(operation: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Return the tensors whose content the host learns something of: a number, or how many there are of something."""
    name = name_of(operation)
    if name in INDEXING:
        return [each for each in tensors_in(args[1]) if each.dtype in (torch.bool, torch.uint8)]
    if name == "masked_select":
        return tensors_in(args[1:2])
    if name == "repeat_interleave":
        return [] if kwargs.get("output_size") is not None else tensors_in(args)[-1:]
    return tensors_in(args) if name in SYNCS or is_read(operation) else []


@functools.cache
def name_of(operation: Any) -> str:
    """Return the operation's name without its namespace."""
    return operation._schema.name.rpartition("::")[2]


def flops(operation: Any, args: tuple, kwargs: dict, result: Any) -> int:
    """Return the floating point operations: torch's own count where it has one, else one for each number made."""
    packet = operation.overloadpacket
    if name_of(operation) == _ATTENTION:
        (*_, queries, width), (*_, keys, _), (*_, values) = (each.shape for each in args[:3])
        return 2 * args[0].shape[:-2].numel() * queries * keys * (width + values)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    return sum(each.numel() for each in tensors_in(result))


def traffic(args: tuple, kwargs: dict, result: Any, *, is_filling: bool) -> int:
    """Return the bytes that are read and written; what is expanded or read in part counts for what is there."""
    inputs = {} if is_filling else {id(each): each for each in tensors_in((args, kwargs))}
    return sum(map(_nbytes, inputs.values())) + sum(map(_nbytes, tensors_in(result)))


def _nbytes(tensor: torch.Tensor) -> int:
    distinct = 1
    for size, stride in zip(tensor.shape, tensor.stride() if tensor.layout is torch.strided else tensor.shape):
        distinct *= size if stride else min(size, 1)
    return distinct * tensor.element_size()


def dtype_of(args: tuple, kwargs: dict, result: Any) -> torch.dtype:
    """Return the dtype that is computed in: the widest floating point one, a complex number's parts for such."""
    found = [_real(each.dtype) for each in (*tensors_in((args, kwargs)), *tensors_in(result))]
    floating = [each for each in found if each.is_floating_point]
    return max(floating, key=lambda each: each.itemsize, default=found[0] if found else torch.float32)


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    found: list[torch.Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[torch.Tensor]) -> None:
    # Not a generator: this is most of what an audit does.
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, (torch.Tensor, tuple, list, dict)):
                _collect(item, found)
