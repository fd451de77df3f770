"""What the sites of an unpatched model are called with and what they give, and so what their results depend on.

With several calls at hand whose arguments differ, a key can be judged: two calls that it takes for one although their
results differ show that it is too coarse; if it is another one at each step although the results repeat, too fine.
Nothing of that is a proof, as only the calls that were seen are known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch

from .. import scope, wrapped
from ..cache import mask_parts
from ..keys import Argument, Uncacheable
from ..patch import Patch
from ..scope import Frame, Scope
from ..spec import Spec

FACETS = ("shape", "dtype", "device", "identity", "values")
_METADATA = ("shape", "dtype", "device")
_COARSER = (("shape",), _METADATA, ("identity",), ("values",))
"""What to try in place of a key that is too fine, from what costs least."""


@dataclass
class Call:
    """One call: of which forward, generation and step, each facet of each argument (`model.x` is the forward's), and
    its result."""

    forward: int
    moment: tuple[int, int]
    ordinal: int
    parts: dict[str, dict[str, Hashable]]
    result: str
    plain: set[str] = field(default_factory=set)  # arguments without a tensor, which always count


def record(
    model: torch.nn.Module,
    spec: Spec,
    patches: Iterable[Patch],
    forwards: Iterable[Mapping[str, Any]],
    moments: Sequence[tuple[int, int]],
) -> dict[str, list[list[Call]]]:
    """Run the forwards, unpatched, and note the calls of each site, by its address and then by patched attribute.

    Args:
        moments: the generation and the step of each forward.
    """
    calls: dict[str, list[list[Call]]] = {}
    kept: list[Any] = []  # lest an address be used again
    state = _Running()
    with ExitStack() as undo, torch.no_grad():
        watching = Scope(model, lambda frame: None, names=spec.parameters)
        undo.callback(watching.remove)
        for patch in patches:
            own: list[Call] = []
            calls.setdefault(patch.site.at, []).append(own)
            layer = wrapped.install(patch.owner, patch.name, _Probe(patch, state, own, kept))
            undo.callback(wrapped.remove, layer)
        for number, arguments in enumerate(forwards):
            state.forward, state.moment = number, moments[number]
            model(**arguments)
    return calls


class _Running:
    forward = 0
    moment = (0, 0)


class _Probe:
    """Stands around an attribute and writes down its calls."""

    def __init__(self, patch: Patch, state: _Running, calls: list[Call], kept: list[Any]) -> None:
        self.patch, self.state, self.calls, self.kept = patch, state, calls, kept

    def __call__(self, original: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
        result = original(*args, **kwargs)
        frame = scope.current()
        if frame is None or frame.model is not self.patch.model:
            return result
        ordinal = frame.calls.get(self, 0)
        frame.calls[self] = ordinal + 1
        given = dict(zip(self.patch.parameters, args)) | kwargs
        given |= {f"model.{name}": value for name, value in _arguments(frame).items()}
        self.kept.append(given)
        call = Call(self.state.forward, self.state.moment, ordinal, {}, digest(result))
        for name, value in given.items():
            try:
                call.parts[name] = {
                    facet: Argument(name, (facet,), self.patch.where).part(value, None) for facet in FACETS
                }
            except Uncacheable:
                continue
            if not name.startswith("model.") and not any(True for _ in _tensors(value)):
                call.plain.add(name)
        self.calls.append(call)
        return result


def too_coarse(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> tuple[Call, Call, str] | None:
    """Two calls that the key takes for one although their results differ, and what would tell such calls apart."""
    pair = _contradiction(calls, key)
    if pair is None:
        return None
    names = sorted({name for call in calls for name in call.parts}, key=lambda name: (name.startswith("model."), name))
    for facet in FACETS:
        for name in names:
            finer = {**key, name: (*key.get(name, ()), facet)}
            if facet not in key.get(name, ()) and _contradiction(calls, finer) is None:
                return *pair, f"{name}: [{', '.join(finer[name])}]"
    return *pair, ""


def too_fine(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> str | None:
    """Where the key is a new one at each step: a coarser one that is not, and that no call seen here contradicts."""
    if not _new_at_each_step(calls, key):
        return None
    coarser = dict(key)
    for name in sorted(key, key=lambda name: name.startswith("model.")):
        choices = [choice for choice in _COARSER if choice != tuple(key[name])]
        if name.startswith("model."):
            choices.insert(0, ())
        for choice in choices:
            attempt = {**coarser, name: choice}
            if _contradiction(calls, attempt) is None:
                coarser = attempt
                break
    if _new_at_each_step(calls, coarser):
        return None
    changed = {name: facets for name, facets in coarser.items() if facets != tuple(key[name])}
    return ", ".join(f"{name}: [{', '.join(facets)}]" if facets else f"no {name}" for name, facets in changed.items())


def contradicted(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether two calls that the key takes for one have other results."""
    return _contradiction(calls, key) is not None


def distinct(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> int:
    """How many calls the key takes these for."""
    return len(set(_keys(calls, key)))


def digest(value: Any) -> str:
    """Equal for results that are equal in every bit."""
    if type(value).__name__ == "BlockMask":
        value = mask_parts(value)
    found = hashlib.sha256()
    for leaf in _leaves(value):
        if isinstance(leaf, torch.Tensor):
            flat = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
            found.update(repr((leaf.shape, leaf.dtype)).encode())
            found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def _contradiction(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> tuple[Call, Call] | None:
    groups: dict[Hashable, list[Call]] = {}
    for call, own in zip(calls, _keys(calls, key)):
        groups.setdefault(own, []).append(call)
    for group in groups.values():
        for one, other in combinations(group, 2):
            if one.result != other.result:
                return one, other
    return None


def _new_at_each_step(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether in each generation of several steps there are as many keys as steps, or more."""
    keys: dict[int, set[Hashable]] = {}
    steps: dict[int, set[int]] = {}
    for call, own in zip(calls, _keys(calls, key)):
        generation, step = call.moment
        keys.setdefault(generation, set()).add(own)
        steps.setdefault(generation, set()).add(step)
    several = [generation for generation, own in steps.items() if len(own) > 1]
    return bool(several) and all(len(keys[generation]) >= len(steps[generation]) for generation in several)


def _keys(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> list[Hashable]:
    borrows = any(name.startswith("model.") for name, facets in key.items() if facets)

    def of(call: Call) -> Hashable:
        always = [(name, call.parts[name]["values"]) for name in sorted(call.plain)]
        said = [
            (name, call.parts[name][facet])
            for name, facets in key.items()
            if name in call.parts and name not in call.plain
            for facet in facets
        ]
        return (call.ordinal if borrows else 0, *always, *said)

    return [of(call) for call in calls]


def _arguments(frame: Frame) -> dict[str, Any]:
    named = {name: frame.args[at] for name, at in frame.positions.items() if at < len(frame.args)}
    return named | frame.kwargs


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    return [value]


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor)]
