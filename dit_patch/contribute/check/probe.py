"""Record the calls of sites in an unpatched model, and judge keys by them.

A key is too coarse if two calls have the same key and different results. It is too fine if it is new at each step
although the results repeat. Neither is a proof: only the recorded calls are known.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch

from ...memo.keys import Argument, Uncacheable, flat
from ...memo.results import flatten, look_into, map_tensors
from ...sites import layers, scope
from ...sites.patch import AttributePatch
from ...sites.scope import Scope
from ...spec import mini
from ...spec.model import Spec
from ...spec.recipe import Case
from ...upstream.torch_internals import parameters

FACETS = ("shape", "dtype", "device", "identity", "values")
METADATA = ("shape", "dtype", "device")
_COARSER = (("shape",), METADATA, ("identity",), ("values",))
"""The facets to try in place of a key that is too fine, the cheapest first."""


@dataclass
class Call:
    """One call of a site.

    Attributes:
        forward: the number of the model's forward, from 0.
        moment: the generation and the step of that forward.
        ordinal: the number of the call within the forward.
        facets: of each argument; `model.x` is argument x of the model's forward.
        result: a digest of it.
        without_tensors: the arguments that contain none, and so always count.
        arguments: kept alive, so that no address is used twice.
    """

    forward: int
    moment: tuple[int, int]
    ordinal: int
    facets: dict[str, dict[str, Hashable]]
    result: str
    without_tensors: set[str] = field(default_factory=set)
    arguments: Any = None


def generations(case: Case, steps: int, **options: Any) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """Return the arguments of forwards, and the generation and step of each.

    There is a generation of each size, and one more of the first size with other inputs.
    """
    passes = 1 if case.rollout else len(mini.PASSES)
    forwards, moments = [], []
    for generation, size in enumerate([*case.sizes, case.sizes[0]]):
        for number, arguments in enumerate(mini.forwards(case, size, steps=steps, generation=generation, **options)):
            forwards.append(arguments)
            moments.append((generation, number // passes))
    return forwards, moments


def record_calls(
    model: torch.nn.Module,
    spec: Spec,
    patches: Iterable[AttributePatch],
    forwards: Iterable[Mapping[str, Any]],
    moments: Sequence[tuple[int, int]],
) -> dict[str, list[list[Call]]]:
    """Run the forwards unpatched, and return the calls of each site, by its address and then by its attributes.

    Args:
        moments: the generation and the step of each forward.
    """
    calls: dict[str, list[list[Call]]] = {}
    position = _Position()
    with ExitStack() as undo, torch.no_grad():
        watching = Scope(model, lambda frame: None, names=spec.parameters)
        undo.callback(watching.remove)
        for patch in patches:
            calls_of_one: list[Call] = []
            calls.setdefault(patch.site.at, []).append(calls_of_one)
            layer = layers.install(
                patch.attribute.owner, patch.attribute.name, _Recorder(patch, position, calls_of_one)
            )
            undo.callback(layers.remove, layer)
        for number, arguments in enumerate(forwards):
            position.forward, position.moment = number, moments[number]
            model(**arguments)
    return calls


class _Position:
    """The forward that runs."""

    forward = 0
    moment = (0, 0)


class _Recorder:
    """Wraps an attribute, and records its calls."""

    def __init__(self, patch: AttributePatch, position: _Position, calls: list[Call]) -> None:
        self.patch, self.position, self.calls = patch, position, calls

    def __repr__(self) -> str:
        return f"<_Recorder of {self.patch.site.at}, {len(self.calls)} calls>"

    def __call__(self, original: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
        result = original(*args, **kwargs)
        frame = scope.current()
        if frame is None or frame.model is not self.patch.model:
            return result
        ordinal = frame.calls.get(self, 0)
        frame.calls[self] = ordinal + 1
        arguments = dict(zip(self.patch.attribute.parameters, args)) | kwargs
        arguments |= {f"model.{name}": value for name, value in frame.arguments.items()}
        call = Call(self.position.forward, self.position.moment, ordinal, {}, digest(result), arguments=arguments)
        for name, value in arguments.items():
            try:
                call.facets[name] = {
                    facet: Argument(name, (facet,), self.patch.label).part(value, None) for facet in FACETS
                }
            except Uncacheable:
                continue
            if not name.startswith("model.") and not _has_tensors(value):
                call.without_tensors.add(name)
        self.calls.append(call)
        return result


def too_coarse(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> tuple[Call, Call, str] | None:
    """Return two calls with the same key and different results, and a facet that would tell them apart ("": none)."""
    pair = _contradiction(calls, key)
    if pair is None:
        return None
    names = sorted({name for call in calls for name in call.facets}, key=lambda name: (name.startswith("model."), name))
    for facet in FACETS:
        for name in names:
            finer = {**key, name: (*key.get(name, ()), facet)}
            if facet not in key.get(name, ()) and _contradiction(calls, finer) is None:
                return *pair, f"{name}: [{', '.join(finer[name])}]"
    return *pair, ""


def too_fine(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> str | None:
    """Return a coarser key in words, if the key is new at each step and no call contradicts the coarser one."""
    if not _is_new_at_each_step(calls, key):
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
    if _is_new_at_each_step(calls, coarser):
        return None
    changed = {name: facets for name, facets in coarser.items() if facets != tuple(key[name])}
    return ", ".join(f"{name}: [{', '.join(facets)}]" if facets else f"no {name}" for name, facets in changed.items())


def missing_from_keys(
    model: torch.nn.Module,
    spec: Spec,
    patches: Iterable[AttributePatch],
    arguments: Mapping[str, Any],
    keys: Mapping[str, Mapping[str, tuple[str, ...]]],
) -> dict[str, list[str]]:
    """Return for each site what changes its results but not its key: `model.x`, submodules, or single parameters.

    One forward is run for each tensor argument of the model with another tensor in its place, and one for the weights
    of each submodule with other values in them. The weights of a site's own module and those in its `reads` count
    anyway. A change with which the forward fails is passed over.
    """
    patches = list(patches)
    plain = record_calls(model, spec, patches, [arguments], [(0, 0)])
    paths = {id(module): path for path, module in model.named_modules()}
    missing: dict[str, list[str]] = {}

    def try_change(arguments: Mapping[str, Any], cause: str, weights: Sequence[torch.Tensor] = ()) -> None:
        try:
            changed = record_calls(model, spec, patches, [arguments], [(0, 0)])
        except Exception:  # of the model's own, which refuses such an argument
            return
        number: Counter[str] = Counter()
        for patch in patches:
            at, name = patch.site.at, cause
            before, after = plain[at][number[at]], changed[at][number[at]]
            number[at] += 1
            if weights:
                if patch.depends_on(weights[0]):
                    continue
                name = _outermost(cause, paths.get(id(patch.attribute.owner), ""))
            if _is_stale(before, after, keys[at]) and name not in missing.setdefault(at, []):
                missing[at].append(name)

    for name, value in arguments.items():
        if _has_tensors(value):
            try_change({**arguments, name: map_tensors(_with_other_content, value)}, f"model.{name}")
    for path, holder in list(model.named_modules()):
        own = {name: each for name, each in parameters(holder).items() if each is not None}
        # What the model holds itself has no module to be named by.
        groups = {name: [each] for name, each in own.items()} if not path else {path: [*own.values()]} if own else {}
        for cause, weights in groups.items():
            with _changed_weights(weights):
                try_change(arguments, cause, weights)
    return {at: causes for at, causes in missing.items() if causes}


def _with_other_content(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape and dtype with other content."""
    if tensor.dtype is torch.bool:
        other = tensor.clone()
        other.view(-1)[-1:] ^= True
        return other
    return tensor * 1.5 + 0.25 if tensor.is_floating_point() else tensor + 1


def _is_stale(before: list[Call], after: list[Call], key: Mapping[str, tuple[str, ...]]) -> bool:
    """Return whether a cache with this key would give a call of `after` the other result that it had in `before`."""
    if len(before) != len(after):
        return False
    keys = _keys([*before, *after], key)
    together = zip(before, after, keys[: len(before)], keys[len(before) :])
    return any(one.result != other.result and own == others for one, other, own, others in together)


@contextmanager
def _changed_weights(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        try:
            for parameter in parameters:
                parameter.mul_(1.5).add_(0.25)
            yield
        finally:
            for parameter, content in zip(parameters, kept):
                parameter.copy_(content)


def _outermost(path: str, owner: str) -> str:
    """Return the largest submodule that contains `path` and not the owner."""
    steps = path.split(".")
    modules = (".".join(steps[: count + 1]) for count in range(len(steps)))
    return next((module for module in modules if not f"{owner}.".startswith(f"{module}.")), path)


def is_contradicted(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> bool:
    """Return whether two calls have the same key and different results."""
    return _contradiction(calls, key) is not None


def count_keys(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> int:
    """Return how many different keys the calls have."""
    return len(set(_keys(calls, key)))


def digest(value: Any) -> str:
    """Return a hash of a result that is the same for the same bits."""
    found = hashlib.sha256()
    leaves, _ = flatten(value)
    for leaf in (part for each in leaves for part in look_into(each)):
        if isinstance(leaf, torch.Tensor):
            found.update(repr((leaf.shape, leaf.dtype)).encode())
            found.update(flat(leaf).cpu().view(torch.uint8).numpy().tobytes() if leaf.numel() else b"")
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


def _is_new_at_each_step(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> bool:
    """Return whether each generation of several steps has as many keys as steps, or more."""
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

    def key_of(call: Call) -> Hashable:
        always = [(name, call.facets[name]["values"]) for name in sorted(call.without_tensors)]
        declared = [
            (name, call.facets[name][facet])
            for name, facets in key.items()
            if name in call.facets and name not in call.without_tensors
            for facet in facets
        ]
        return (call.ordinal if borrows else 0, *always, *declared)

    return [key_of(call) for call in calls]


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in flatten(value)[0])
