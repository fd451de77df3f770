"""The one walk over nested results: tensors in containers, taken apart, put together again, compared.

`CONTAINERS` is the table of what a result may consist of. A row more, and such results are stored, compared, copied and
stood in for. What can be looked into but not made anew is in `OPAQUE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .keys import same_bits


class Container(NamedTuple):
    """A kind of container: how to tell it, what is in it, and how to make one with other contents."""

    is_one: Callable[[Any], bool]
    items: Callable[[Any], Iterable]
    #: Takes the type of a container, its names and other items, as many as it had when it was taken apart.
    rebuild: Callable[[type, Sequence, list], Any]
    #: What tells two of the kind apart besides their items.
    names: Callable[[Any], Sequence] = lambda value: ()
    #: Whether callers can change one that they were handed out.
    is_mutable: bool = True


CONTAINERS = (
    Container(
        is_one=lambda value: isinstance(value, tuple) and hasattr(value, "_fields"),
        items=tuple,
        rebuild=lambda kind, names, items: kind(*items),
        is_mutable=False,
    ),
    Container(
        is_one=lambda value: isinstance(value, tuple),
        items=tuple,
        rebuild=lambda kind, names, items: kind(items),
        is_mutable=False,
    ),
    Container(
        is_one=lambda value: isinstance(value, list),
        items=list,
        rebuild=lambda kind, names, items: kind(items),
    ),
    Container(
        is_one=lambda value: isinstance(value, dict),
        items=lambda value: value.values(),
        rebuild=lambda kind, names, items: kind(zip(names, items)),
        names=list,
    ),
)

PLAIN_VALUES = (bool, int, float, str, torch.dtype, torch.device, type(None))


def block_mask_parts(mask: Any) -> tuple:
    """Return what a flex BlockMask consists of: its fields, and what its `mask_mod` runs and has captured."""
    own = {name: value for name, value in vars(mask).items() if name != "mask_mod"}
    cells = [cell.cell_contents for cell in getattr(mask.mask_mod, "__closure__", None) or ()]
    return (*own, *own.values(), getattr(mask.mask_mod, "__code__", mask.mask_mod), *cells)


OPAQUE: dict[str, Callable[[Any], tuple]] = {"BlockMask": block_mask_parts}
"""By the names of their classes, which are not imported for it: what to look into, and what is there."""


def flatten(value: Any) -> tuple[list, Callable[[Iterable], Any]]:
    """Return what is in a result, in order, and a function that puts such leaves into containers of the same kinds."""
    leaves: list = []
    build = _take_apart(value, leaves)
    return leaves, lambda others: build(iter(others))


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return `value` with `function` applied to its tensors, in containers of the same kinds.

    What is opaque, such as a BlockMask, stays as it is.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    leaves, rebuild = flatten(value)
    return rebuild(function(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a result, those inside a BlockMask too.

    Raises:
        TypeError: for anything that cannot be stored, naming its type.
    """
    leaves, _ = flatten(value)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif type(leaf).__name__ in OPAQUE:
            yield from (part for part in OPAQUE[type(leaf).__name__](leaf) if isinstance(part, torch.Tensor))
        elif not isinstance(leaf, PLAIN_VALUES):
            raise TypeError(f"a {type(leaf).__qualname__} cannot be stored")


def look_into(leaf: Any) -> list:
    """Return a leaf's parts where it is opaque, each taken apart too; else the leaf alone."""
    if type(leaf).__name__ not in OPAQUE:
        return [leaf]
    return flatten(OPAQUE[type(leaf).__name__](leaf))[0]


def copier(value: Any) -> Callable[[], Any] | None:
    """Return a function that gives the result in containers of its own; None if only its tensors can be changed."""
    leaves, rebuild = flatten(value)
    return (lambda: rebuild(leaves)) if _has_mutable(value) else None


def same(stored: Any, fresh: Any) -> bool:
    """Return whether two results are equal: containers, plain values, every tensor's bits, and strides that matter."""
    if isinstance(stored, torch.Tensor) and isinstance(fresh, torch.Tensor):
        return _strides(stored) == _strides(fresh) and same_bits(stored, fresh)
    if type(stored) is not type(fresh):
        return False
    container = _container(stored)
    if container is not None:
        items, others = list(container.items(stored)), list(container.items(fresh))
        is_alike = len(items) == len(others) and container.names(stored) == container.names(fresh)
        return is_alike and all(map(same, items, others))
    if type(stored).__name__ in OPAQUE:
        parts = OPAQUE[type(stored).__name__]
        return same(parts(stored), parts(fresh))
    return repr(stored) == repr(fresh)  # nan is itself, and 0.0 is not -0.0


def _container(value: Any) -> Container | None:
    return next((each for each in CONTAINERS if each.is_one(value)), None)


def _take_apart(value: Any, leaves: list) -> Callable[[Iterator], Any]:
    """Append what is in `value` to `leaves`; returns what makes a value of the same kind of an iterator over leaves."""
    container = _container(value)
    if container is None:
        leaves.append(value)
        return next
    builds = [_take_apart(item, leaves) for item in container.items(value)]
    kind, names = type(value), container.names(value)  # as they are now: whoever made the value may change it later
    return lambda others: container.rebuild(kind, names, [build(others) for build in builds])


def _has_mutable(value: Any) -> bool:
    container = _container(value)
    return container is not None and (container.is_mutable or any(map(_has_mutable, container.items(value))))


def _strides(tensor: torch.Tensor) -> list[int]:
    """Return its strides, but for dimensions of one element, from which there is no step to take."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]
