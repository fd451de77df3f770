"""What to measure: the command line's options, checked before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...errors import DitPatchError, quote, suggest
from ...handle import is_installed
from ...pipelines import loading
from ...spec.model import Spec
from ...spec.registry import Registry
from ..surroundings import choose
from . import forwards
from .cases import CASES, Case

PARTS = ("ops", "forwards")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        device: to measure on.
        cases: in which to measure the operation.
        specs: whose forwards to measure.
        real_sizes: measure forwards of the specs' real sizes, which take minutes on a CPU.
        checks: also check what only a GPU can tell.
        threads: of the CPU; None for as many as torch uses.
        seconds: to time each contestant for.
        layers: of the models whose forwards are measured; None for as many as their specs say.
    """

    device: torch.device
    cases: Sequence[Case]
    specs: Sequence[Spec]
    real_sizes: bool
    checks: bool
    threads: int | None
    seconds: float
    layers: int | None

    @classmethod
    def from_options(
        cls,
        names: Sequence[str] = (),
        *,
        parts: Sequence[str] = PARTS,
        everything: bool = False,
        device: str | None = None,
        threads: int | None = None,
        seconds: float = 0.5,
        layers: int | None = None,
        checks: bool = False,
        cases: Mapping[str, Case] = CASES,
    ) -> Plan:
        """Return the plan for the options of the command line.

        Args:
            names: of cases, or of specs or libraries whose forwards to measure; by default what the device is fit for.
            parts: which of PARTS.
            everything: also measure what takes minutes on a CPU.
            cases: the cases that there are, by name.

        Raises:
            DitPatchError: a name, device or number cannot be used.
        """
        place = _device(device)
        if checks and place.type != "cuda":
            raise DitPatchError(f"--checks: they need a CUDA device, not {quote(place)}")
        everything = everything or place.type == "cuda"
        chosen, specs = _choose(names, cases, Registry(), everything)
        return cls(
            device=place,
            cases=chosen if "ops" in parts else (),
            specs=specs if "forwards" in parts else (),
            real_sizes=everything,
            checks=checks,
            threads=threads,
            seconds=seconds,
            layers=layers,
        )


def _choose(
    names: Sequence[str], cases: Mapping[str, Case], registry: Registry, everything: bool
) -> tuple[list[Case], list[Spec]]:
    """Return the cases and the specs to measure.

    Raises:
        DitPatchError: a name of neither, or no spec with anything to measure.
    """
    if not names:
        fit = [case for case in cases.values() if everything or not case.big]
        return fit, [spec for spec in registry if forwards.has_rotary_sites(spec) and is_installed(spec)]
    libraries_and_specs = {*registry.names(), *(name.partition("/")[0] for name in registry.names())}
    for name in names:
        if name not in libraries_and_specs.union(cases):
            near = suggest(name, (*cases, *libraries_and_specs))
            raise DitPatchError(f"{quote(name)} is no case and no spec{near}\n    Cases: {', '.join(cases)}.")
    others = [name for name in names if name not in cases]
    specs = list(filter(forwards.has_rotary_sites, choose(registry, others))) if others else []
    if others and not specs:
        raise DitPatchError(f"{', '.join(map(quote, others))}: no sites of kind {forwards.KIND}, so nothing to compare")
    return [cases[name] for name in dict.fromkeys(names) if name in cases], specs


def _device(word: str | None) -> torch.device:
    """Return the device; make a GPU the current one.

    Raises:
        DitPatchError: it is not there, or there is no clock for it.
    """
    device = loading.device(word)
    if device.type not in ("cpu", "cuda"):
        raise DitPatchError(f"--device: this measures on a CPU or a CUDA device, not on {quote(device)}")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device
