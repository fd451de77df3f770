"""What an operation brings to a device or back, and whether the host has to wait for it.

Everything that is not on the host is on the device: a real one, or the simulated one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_INTERNAL = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
# Those that return what the host reads, or a shape that depends on what the tensor holds.
SYNCS = {"_local_scalar_dense", "equal", "allclose", "nonzero", "masked_select", "repeat_interleave"}
SYNCS |= {"_unique2", "unique_dim", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass(frozen=True)
class Copy:
    """One copy between host and device, and the line (`package/file.py:12`) that asked for it."""

    to_device: bool
    nbytes: int
    line: str


@dataclass(frozen=True)
class Sync:
    """One wait of the host for the device: which operation (or `tolist`), and the line that asked for it."""

    operation: str
    line: str


def is_on_device(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is not on the host; what is on the meta device stands for something on the host."""
    return tensor.device.type not in ("cpu", "meta")


def copies(name: str, args: tuple, on_device: bool) -> list[Copy]:
    """Return the copies that an operation asks for; `on_device` says where its result is."""
    if name == "_to_copy":
        found = [_crossing(args[0], on_device)]
    elif name == "copy_":
        found = [_crossing(args[1], is_on_device(args[0]))]
    elif name in INDEXING:
        found = [_crossing(each, is_on_device(args[0])) for each in args[1] if each is not None]
    else:
        return []
    return [each for each in found if each is not None]


def syncs(name: str, args: tuple, kwargs: Mapping[str, Any]) -> list[Sync]:
    """Return the waits of the host that an operation on the device causes."""
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        # Filling with one value under a mask needs no list of positions.
        masked = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        if masked and (name == "index" or args[2].numel() != 1):
            return [Sync(f"{name} by a mask", asking_line())]
    elif name in SYNCS and kwargs.get("output_size") is None:
        return [Sync(name, asking_line())]
    return []


def asking_line() -> str:
    """Return the line of the program that runs now, as `package/file.py:12`: the innermost outside of torch."""
    frame = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_INTERNAL):
            return f"{frame.f_code.co_filename.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def _crossing(source: torch.Tensor, to_device: bool) -> Copy | None:
    if is_on_device(source) == to_device:
        return None
    return Copy(to_device, source.numel() * source.element_size(), asking_line())
