"""Operations on tensors that are shapes alone, on torch's meta device, among others that have their numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from ...errors import DitPatchError
from ...upstream.torch_internals import storage_id
from .operations import is_read, is_view, name_of, tensors_in
from .transfers import INDEXING, SYNCS, asking_line

_META = torch.device("meta")


class NoNumbersError(DitPatchError):
    """The program reads the content of a tensor that has a shape alone."""


class Shapes:
    """Runs operations so that small tensors have their numbers, and large ones are shapes alone.

    What is computed from a shape is a shape; so is, from then on, what is written into with one.

    Args:
        largest: how many numbers a tensor may have.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._made: dict[Hashable, Any] = {}  # by the operation and what it was given, the shapes that came of it
        self._forgotten: dict[int, torch.UntypedStorage] = {}  # written into from what has no numbers

    def __repr__(self) -> str:
        return f"<Shapes of what has more than {self.largest} numbers>"

    def run(self, operation: Any, args: tuple, kwargs: dict) -> Any:
        """Return the result of an operation on CPU and meta tensors.

        Raises:
            NoNumbersError: it depends on numbers that are not there.
        """
        tensors = tensors_in((args, kwargs))
        known = [tensor for tensor in tensors if self._has_numbers(tensor)]
        if len(known) < len(tensors) or self._makes_too_much(operation, args, kwargs):
            return self._without_numbers(operation, args, kwargs, known)
        return operation(*args, **kwargs)

    def _has_numbers(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type != "meta" and storage_id(tensor) not in self._forgotten

    def _makes_too_much(self, operation: Any, args: tuple, kwargs: dict) -> bool:
        try:
            result = self._on_meta(operation, args, kwargs)
        except Exception:  # what depends on the numbers has no shape to be known beforehand
            return False
        return any(tensor.numel() > self.largest for tensor in tensors_in(result))

    def _on_meta(self, operation: Any, args: tuple, kwargs: dict) -> Any:
        """Return the result in shapes, kept for the next block, since torch takes its time to find them."""
        args, kwargs = map_leaves(_on_meta, args), _options_on_meta(kwargs)
        if operation._schema.is_mutable or is_view(operation):
            return operation(*args, **kwargs)
        key = operation, _signature(args), _signature(kwargs)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = operation(*args, **kwargs)
        return map_leaves(_like, made)

    def _without_numbers(self, operation: Any, args: tuple, kwargs: dict, known: list[torch.Tensor]) -> Any:
        name = name_of(operation)
        if name == "equal":
            return all(tensor.shape == args[0].shape for tensor in args)
        if is_read(operation):
            raise no_numbers(args[0])
        if name == "scaled_dot_product_attention" and args[0].dim() == 4:
            return _attended(*args[:3])
        if name in INDEXING and all(self._has_numbers(each) for each in tensors_in(args[1])):
            args = (args[0], [place for each in args[1] for place in _positions(each)], *args[2:])
        try:
            result = self._on_meta(operation, args, kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if name in SYNCS or name in INDEXING:
                raise no_numbers(args[0]) from error
            raise
        written = args[0] if operation._schema.is_mutable and args else None
        if any(written is tensor for tensor in known):
            self._forgotten[storage_id(written)] = written.untyped_storage()
            return written
        return result


def no_numbers(tensor: torch.Tensor) -> NoNumbersError:
    """Return the error for the line that runs now, which reads what is in the tensor."""
    return NoNumbersError(
        f"{asking_line()} reads the content of a tensor of shape {tuple(tensor.shape)}, which at full size has a shape "
        "alone"
    )


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Return `value` with `function` applied to what its tuples, lists and dicts hold; torch's `tree_map` is slow."""
    if isinstance(value, (tuple, list)):
        return (list if isinstance(value, list) else tuple)([map_leaves(function, item) for item in value])
    if isinstance(value, dict):
        return {key: map_leaves(function, item) for key, item in value.items()}
    return function(value)


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value if value.device.type == "meta" else value.to(_META)
    return _META if isinstance(value, torch.device) else value


def _options_on_meta(kwargs: dict) -> dict:
    """Return the keyword arguments for the same operation on the meta device, which has no random numbers."""
    return {name: map_leaves(_on_meta, value) for name, value in kwargs.items() if name != "generator"}


def _signature(value: Any) -> Hashable:
    """Return what a result's shape depends on, of arguments on the meta device."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((name, _signature(item)) for name, item in value.items())
    return type(value), value


def _like(value: Any) -> Any:
    return (
        torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
        if isinstance(value, torch.Tensor)
        else value
    )


def _positions(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Return what indexes the same places as a mask does, whose number the meta device cannot know."""
    is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
    return index.nonzero(as_tuple=True) if is_mask else (index,)


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the shape of attention's result, with the strides that flash attention gives: heads inside of tokens."""
    batch, heads, tokens, _ = q.shape
    return torch.empty((batch, tokens, heads, v.shape[-1]), dtype=q.dtype, device=_META).transpose(1, 2)
