"""KV caches whose fill indices are Python integers, where the attention that reads them takes both.

An index in a tensor on the device makes the host wait for the device, twice in each layer of each forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def integer_indices(caches: Any) -> Any:
    """Replace each one-element tensor `..._end_index` by an `int`, in place, and return `caches`. For `then:`.

    All indices are read from the device at once.

    Args:
        caches: a dict for each layer, in lists or tuples.
    """
    indices = list(_indices(caches))
    if indices:
        values = torch.cat([cache[name].reshape(1) for cache, name in indices]).tolist()
        for (cache, name), value in zip(indices, values):
            cache[name] = value
    return caches


def _indices(caches: Any) -> Iterator[tuple[dict, str]]:
    if isinstance(caches, (list, tuple)):
        for item in caches:
            yield from _indices(item)
    elif isinstance(caches, dict):
        for name, value in caches.items():
            integral = isinstance(value, torch.Tensor) and value.numel() == 1 and not value.dtype.is_floating_point
            if integral and isinstance(name, str) and name.endswith("_end_index"):
                yield caches, name
