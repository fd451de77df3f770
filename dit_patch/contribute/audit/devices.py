"""Estimate the time of an operation on a named device, from the vendor's peak figures: a bound, not a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from ...errors import DitPatchError, quote, suggest
from .operations import Operation

KERNEL_US, COPY_US, SYNC_US = 3.0, 10.0, 10.0
"""The least that a kernel, a copy between host and device, and a wait of the host take, in microseconds."""
HOST_GB_PER_S = 10.0
"""What an operation on the host reads and writes in a second: one thread's share of the memory."""


@dataclass(frozen=True)
class Device:
    """A device's peak figures.

    Attributes:
        name: of the device.
        matrix: TFLOPS of its matrix units, by dtype.
        vector: TFLOPS of everything else, by dtype.
        memory: GB/s of its memory.
        link: GB/s from the host.
    """

    name: str
    matrix: Mapping[str, float]
    vector: Mapping[str, float]
    memory: float
    link: float

    def milliseconds(self, operation: Operation) -> float:
        """Return the least time that the operation takes: bound by arithmetic, by memory, or by being launched.

        Copies and waits of the host come on top. Nothing overlaps. What runs on the host is bound by its memory.
        """
        crossing = sum(COPY_US * 1e-3 + each.nbytes / self.link * 1e-6 for each in operation.copies)
        crossing += SYNC_US * 1e-3 * len(operation.syncs)
        if not operation.is_kernel:
            return crossing
        if not operation.on_device:
            return crossing + max(KERNEL_US * 1e-3, operation.work.nbytes / HOST_GB_PER_S * 1e-6)
        arithmetic = operation.work.flops / self._peak(operation) * 1e-9
        return crossing + max(KERNEL_US * 1e-3, arithmetic, operation.work.nbytes / self.memory * 1e-6)

    def _peak(self, operation: Operation) -> float:
        name = str(operation.work.dtype).removeprefix("torch.")
        if operation.work.is_product:
            return self.matrix.get(name, self.matrix["float32"])
        return self.vector.get(name, self.vector["float32"])


def _read() -> dict[str, Device]:
    content: dict[str, Any] = yaml.safe_load(files(__package__).joinpath("devices.yaml").read_text(encoding="utf-8"))
    return {name: Device(name, **figures) for name, figures in content.items()}


DEVICES = _read()


def device(name: str) -> Device:
    """Return the device of that name, whatever its case.

    Raises:
        DitPatchError: its peak figures are not known.
    """
    found = next((each for known, each in DEVICES.items() if known.lower() == name.lower()), None)
    if found is None:
        near = suggest(name, DEVICES) or "."
        raise DitPatchError(f"--device: no peak figures for {quote(name)}{near} Known: {', '.join(DEVICES)}.")
    return found
