"""Whole forwards of models that have sites of kind rotary: with all their other sites patched, and with these too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from typing import Any

import torch

from ...contribute import verify
from ...handle import apply
from ...spec import mini
from ...spec.model import Spec
from ...spec.recipe import Case
from ...spec.registry import KINDS
from .rows import Row
from .timing import Timed, differing, in_turns, peak_bytes

KIND = "rotary"
WITHOUT, WITH = "without rotary", "with rotary"
_DEPTHS = ("num_layers", "num_single_layers")


def has_rotary_sites(spec: Spec) -> bool:
    """Return whether the spec has sites to compare."""
    return any(site.kind == KIND for site in spec.sites)


def sizes(spec: Spec, *, real: bool) -> dict[str, Case]:
    """Return the spec's real sizes, or only those that a CPU can run soon; its mini where there are none."""
    chosen = {name: spec.bench_case(name) for name, case in spec.bench.items() if real or case.whole}
    return chosen or {"mini": spec.mini.case()}


def measure(spec: Spec, name: str, case: Case, device: torch.device, seconds: float, layers: int | None) -> list[Row]:
    """Return a row without the rotary sites and one with them, with random weights, in bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case = _with_layers(case, layers)
    with ExitStack() as undo:
        models = [_build(spec, case, dtype).to(device) for _ in range(2)]
        if any(site.kind != KIND for site in spec.sites):
            undo.enter_context(apply(models[0], only=[kind for kind in KINDS if kind != KIND]))
        undo.enter_context(apply(models[1]))
        undo.enter_context(mini.autocast(spec, dtype, device))
        calls = list(mini.forwards(case, case.sizes[0], steps=2, dtype=dtype, device=device))
        results = [[tensor for each in verify.run(model, calls) for tensor in each] for model in models]
        shares = [differing(each, results[0]) for each in results]
        generations = [_Generations(model, case, dtype, device) for model in models]
        peaks = [peak_bytes(each.run, device) for each in generations]
        timed = [Timed(each.run, len(each.calls), each.renew) for each in generations]
        times = in_turns(timed, device, seconds, turn=0)
    return [
        Row(
            part="forwards",
            case=f"{spec.name} {name}",
            contestant=contestant,
            dtype=str(dtype).removeprefix("torch."),
            us=each.us,
            us_20=each.us_20,
            us_80=each.us_80,
            speedup=times[0].us / each.us,
            differing=share,
            peak_bytes=peak,
        )
        for contestant, each, share, peak in zip((WITHOUT, WITH), times, shares, peaks)
    ]


class _Generations:
    """The forwards of one generation at a time, each with inputs of its own."""

    def __init__(self, model: torch.nn.Module, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.case, self.options = model, case, {"dtype": dtype, "device": device}
        self.calls: list[dict[str, Any]] = []
        self._made = self._generations()
        self.renew()

    def renew(self) -> None:
        """Take the inputs of the next generation."""
        self.calls = next(self._made)

    def __repr__(self) -> str:
        return f"<_Generations of {type(self.model).__name__}, {len(self.calls)} forwards each>"

    @torch.no_grad()
    def run(self) -> None:
        """Run the forwards of the present generation."""
        for arguments in self.calls:
            self.model(**arguments)

    def _generations(self) -> Iterator[list[dict[str, Any]]]:
        for number in count():
            yield list(mini.forwards(self.case, self.case.sizes[0], steps=2, generation=number, **self.options))


def _build(spec: Spec, case: Case, dtype: torch.dtype) -> torch.nn.Module:
    """Build the model as if loaded from a checkpoint: parameters in `dtype`, buffers as the model makes them."""
    model = mini.build(spec, case)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def _with_layers(case: Case, layers: int | None) -> Case:
    if layers is None:
        return case
    depths = {name: layers for name in _DEPTHS if name in case.config}
    return case.model_copy(update={"config": {**case.config, **depths}})
