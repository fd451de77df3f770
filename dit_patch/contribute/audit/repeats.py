"""How often the results of operations repeat: over the steps of a generation, its passes, and generations."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .operations import Operation
from .recorder import content


class Moment(NamedTuple):
    """When a forward runs: each a number from 0."""

    generation: int
    step: int
    number: int  # of the pass


@dataclass(frozen=True)
class Repeats:
    """The share of calls whose result had been there before, from 0 to 1.

    Attributes:
        steps: at an earlier step of the same generation, in the same pass.
        passes: in another pass of the same step.
        generations: in an earlier generation, at the same step and pass.
    """

    steps: float
    passes: float
    generations: float

    @property
    def best(self) -> float:
        """The largest of the three."""
        return max(self.steps, self.passes, self.generations)

    def least(self, other: Repeats) -> Repeats:
        """Return what repeats only where both do."""
        pairs = zip(
            (self.steps, self.passes, self.generations), (other.steps, other.passes, other.generations), strict=True
        )
        return Repeats(*(min(pair) for pair in pairs))


ALWAYS = Repeats(1.0, 1.0, 1.0)
NEVER = Repeats(0.0, 0.0, 0.0)


def repeats(results: Mapping[Moment, Hashable]) -> Repeats:
    """Return how often a result repeats, from what it was at each moment; what there is no second of never does."""
    steps, passes, generations = Counter[bool](), Counter[bool](), Counter[bool]()
    for moment, result in results.items():
        generation, step, number = moment
        if step:
            earlier = (results.get(Moment(generation, each, number)) for each in range(step))
            steps[any(each == result for each in earlier if each is not None)] += 1
        if number:
            others = (results.get(Moment(generation, step, each)) for each in range(number))
            passes[any(each == result for each in others if each is not None)] += 1
        if generation:
            before = (results.get(Moment(each, step, number)) for each in range(generation))
            generations[any(each == result for each in before if each is not None)] += 1
    return Repeats(*(each[True] / each.total() if each else 0.0 for each in (steps, passes, generations)))


_RENEWED = {
    "generation": Repeats(1.0, 1.0, 0.0),
    "pass": Repeats(1.0, 0.0, 0.0),
    "step": Repeats(0.0, 1.0, 1.0),
    "call": NEVER,
}


class Key(NamedTuple):
    """What an operation is known by in models of one class, whatever their size."""

    module: str
    line: str
    name: str
    ordinal: int  # of those with the same three in one module

    @property
    def general(self) -> Key:
        """The same in any block, whatever the depth: with * for numbers in the module's path."""
        return self._replace(module=pattern(self.module))


def keys(operations: Iterable[Operation]) -> list[Key]:
    """Return the key of each operation of a forward."""
    seen: Counter[tuple] = Counter()
    found = []
    for each in operations:
        own = each.module, each.line, each.name
        found.append(Key(*own, seen[own]))
        seen[own] += 1
    return found


def pattern(path: str) -> str:
    """Return the path of a module with * in the place of numbers."""
    return re.sub(r"\b\d+\b", "*", path)


@dataclass
class Observed:
    """What was seen in forwards of a small model, with numbers.

    Attributes:
        arguments: how often the content of each argument of the model repeats.
        results: how often that of each operation's result does.
        moments: of the forwards.
        causes: the arguments that each operation's inputs were seen to depend on.
    """

    arguments: dict[str, Repeats]
    results: dict[Key, Repeats]
    moments: Sequence[Moment]
    causes: dict[Key, frozenset[str]]

    def of(self, operation: Operation, key: Key) -> tuple[Repeats, Repeats]:
        """Return how often the operation's result is known to repeat, and how often it was seen to.

        It is known to repeat as often as all that it is computed from, and no more often than it was seen to; what the
        host had read before counts as well. An operation that the small model does not have is not seen to.
        """
        # The small model has fewer blocks: for others than it has, all of its blocks speak.
        key = key if key in self.results else key.general
        seen = self.results.get(key, NEVER)
        # What was kept before it was recorded has no past: a patched forward hands out such results.
        for name in operation.causes | self.causes.get(key, frozenset()):
            seen = seen.least(self.arguments.get(name, NEVER))
        known = seen
        for name in operation.reads:
            known = known.least(self.arguments.get(name, NEVER))
        if not any(each.generation for each in self.moments) and not operation.causes:
            # There was one generation, and nothing says that another would differ.
            known, seen = replace(known, generations=known.steps), replace(seen, generations=seen.steps)
        return known, seen


class Observation:
    """Collects forward after forward what `Observed` holds."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self._arguments: dict[str, dict[Moment, int]] = defaultdict(dict)
        self._results: dict[Key, dict[Moment, Hashable]] = defaultdict(dict)
        self._causes: dict[Key, frozenset[str]] = defaultdict(frozenset)

    def __repr__(self) -> str:
        return f"<Observation of {len(self.moments)} forwards>"

    def begin(self, moment: Moment, arguments: Mapping[str, Any]) -> None:
        """Begin a forward with these arguments, whose content is that of now."""
        self.begin_with(moment, {name: content(value) for name, value in arguments.items()})

    def begin_with(self, moment: Moment, contents: Mapping[str, int]) -> None:
        """Begin a forward whose arguments have these contents, as `content` numbers them."""
        self.moments.append(moment)
        for name, value in contents.items():
            self._arguments[name][moment] = value

    def end(self, operations: Sequence[Operation]) -> None:
        """End the forward, in which these operations ran."""
        moment = self.moments[-1]
        for each, key in zip(operations, keys(operations), strict=True):
            self._results[key][moment] = each.digest
            for own in (key, key.general):
                self._causes[own] |= each.causes

    def observed(self, renewed: Mapping[str, str] | None = None) -> Observed:
        """Return what came of it; of an operation in all blocks, that of the one in which it repeats least.

        Args:
            renewed: how often pipelines make an argument anew, whatever is in it here: each "generation", "pass",
                "step" or "call".
        """
        results: dict[Key, Repeats] = {}
        for key, digests in self._results.items():
            known = {moment: digest for moment, digest in digests.items() if digest is not None}
            found = results[key] = repeats(known) if known else NEVER
            general = key.general
            if general != key:
                results[general] = results[general].least(found) if general in results else found
        arguments = {
            name: repeats(contents).least(_RENEWED.get((renewed or {}).get(name, ""), ALWAYS))
            for name, contents in self._arguments.items()
        }
        return Observed(arguments, results, self.moments, dict(self._causes))
