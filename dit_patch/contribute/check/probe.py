"""What the sites of an unpatched model are called with and what they give, and so what their results depend on.

With several calls at hand whose arguments differ, a key can be judged: two calls that it takes for one although their
results differ show that it is too coarse; if it is another one at each step although the results repeat, too fine.
Nothing of that is a proof, as only the calls that were seen are known.
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
    given: Any = None  # the arguments, held lest the address of one be used again


def generations(case: Case, steps: int, **options: Any) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """The forwards of a generation of each size, and of the first size once more with other inputs; and the generation
    and the step of each forward."""
    passes = 1 if case.rollout else len(mini.PASSES)
    forwards, moments = [], []
    for generation, size in enumerate([*case.sizes, case.sizes[0]]):
        for number, arguments in enumerate(mini.forwards(case, size, steps=steps, generation=generation, **options)):
            forwards.append(arguments)
            moments.append((generation, number // passes))
    return forwards, moments


def record(
    model: torch.nn.Module,
    spec: Spec,
    patches: Iterable[AttributePatch],
    forwards: Iterable[Mapping[str, Any]],
    moments: Sequence[tuple[int, int]],
) -> dict[str, list[list[Call]]]:
    """Run the forwards, unpatched, and note the calls of each site, by its address and then by patched attribute.

    Args:
        moments: the generation and the step of each forward.
    """
    calls: dict[str, list[list[Call]]] = {}
    state = _Running()
    with ExitStack() as undo, torch.no_grad():
        watching = Scope(model, lambda frame: None, names=spec.parameters)
        undo.callback(watching.remove)
        for patch in patches:
            own: list[Call] = []
            calls.setdefault(patch.site.at, []).append(own)
            layer = layers.install(patch.attribute.owner, patch.attribute.name, _Probe(patch, state, own))
            undo.callback(layers.remove, layer)
        for number, arguments in enumerate(forwards):
            state.forward, state.moment = number, moments[number]
            model(**arguments)
    return calls


class _Running:
    forward = 0
    moment = (0, 0)


class _Probe:
    """Stands around an attribute and writes down its calls."""

    def __init__(self, patch: AttributePatch, state: _Running, calls: list[Call]) -> None:
        self.patch, self.state, self.calls = patch, state, calls

    def __call__(self, original: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
        result = original(*args, **kwargs)
        frame = scope.current()
        if frame is None or frame.model is not self.patch.model:
            return result
        ordinal = frame.calls.get(self, 0)
        frame.calls[self] = ordinal + 1
        given = dict(zip(self.patch.attribute.parameters, args)) | kwargs
        given |= {f"model.{name}": value for name, value in frame.arguments.items()}
        call = Call(self.state.forward, self.state.moment, ordinal, {}, digest(result), given=given)
        for name, value in given.items():
            try:
                call.parts[name] = {
                    facet: Argument(name, (facet,), self.patch.label).part(value, None) for facet in FACETS
                }
            except Uncacheable:
                continue
            if not name.startswith("model.") and not _has_tensors(value):
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


def uncounted(
    model: torch.nn.Module,
    spec: Spec,
    patches: Iterable[AttributePatch],
    arguments: Mapping[str, Any],
    keys: Mapping[str, Mapping[str, tuple[str, ...]]],
) -> dict[str, list[str]]:
    """For each site what changes its results, but not its key: `model.x`, submodules, or single parameters.

    One forward is run with each of the model's tensor arguments replaced by another of its kind, and with each of its
    weights changed for a time (those of a submodule together). What a site's own module holds, and what its `reads`
    names, counts anyway. What the forward does not go through with is passed over.
    """
    patches = list(patches)
    plain = record(model, spec, patches, [arguments], [(0, 0)])
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, list[str]] = {}

    def look(given: Mapping[str, Any], cause: str, weights: Sequence[torch.Tensor] = ()) -> None:
        try:
            changed = record(model, spec, patches, [given], [(0, 0)])
        except Exception:  # of the model's own: it cannot do with such an argument
            return
        number: Counter[str] = Counter()
        for patch in patches:
            at, place = patch.site.at, cause
            before, after = plain[at][number[at]], changed[at][number[at]]
            number[at] += 1
            if weights:
                if patch.depends_on(weights[0]):
                    continue
                place = _outermost(cause, paths.get(id(patch.attribute.owner), ""))
            if _stale(before, after, keys[at]) and place not in found.setdefault(at, []):
                found[at].append(place)

    for name, value in arguments.items():
        if _has_tensors(value):
            look({**arguments, name: map_tensors(_another, value)}, f"model.{name}")
    for path, holder in list(model.named_modules()):
        own = {name: each for name, each in parameters(holder).items() if each is not None}
        # What the model holds itself has no module to be named by.
        groups = {name: [each] for name, each in own.items()} if not path else {path: [*own.values()]} if own else {}
        for cause, weights in groups.items():
            with _changed(weights):
                look(arguments, cause, weights)
    return {at: causes for at, causes in found.items() if causes}


def _another(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind with other content."""
    if tensor.dtype is torch.bool:
        other = tensor.clone()
        other.view(-1)[-1:] ^= True
        return other
    return tensor * 1.5 + 0.25 if tensor.is_floating_point() else tensor + 1


def _stale(before: list[Call], after: list[Call], key: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a call would get the result that it had before."""
    if len(before) != len(after):
        return False
    keys = _keys([*before, *after], key)
    together = zip(before, after, keys[: len(before)], keys[len(before) :])
    return any(one.result != other.result and own == others for one, other, own, others in together)


@contextmanager
def _changed(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
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
    """The largest part of the model that what is at `path` is in, and the owner is not."""
    steps = path.split(".")
    places = (".".join(steps[: count + 1]) for count in range(len(steps)))
    return next((place for place in places if not f"{owner}.".startswith(f"{place}.")), path)


def contradicted(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether two calls that the key takes for one have other results."""
    return _contradiction(calls, key) is not None


def distinct(calls: list[Call], key: Mapping[str, tuple[str, ...]]) -> int:
    """How many calls the key takes these for."""
    return len(set(_keys(calls, key)))


def digest(value: Any) -> str:
    """Equal for results that are equal in every bit."""
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


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in flatten(value)[0])
