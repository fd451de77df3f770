"""What an audit says: totals of a forward, how much of each repeats, and a row for each line that does the work."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .audit import Cost, Forward
from .devices import Device
from .repeats import pattern


class Category(enum.Enum):
    """What a result depends on, from the least to the most; the words are for people."""

    SIZES = "sizes and weights alone"
    STEPS = "the same at all steps"
    PASSES = "shared by the passes of a step"
    PERHAPS = "the same in what was tried, not proved"
    CHANGING = "new each time"

    @classmethod
    def of(cls, cost: Cost) -> Category:
        """Return the category of an operation's result."""
        known, seen = cost.known, cost.seen
        if known.steps > 0.5 and known.generations > 0.5 and not cost.operation.causes:
            return cls.SIZES
        if known.steps > 0.5:
            return cls.STEPS
        if known.passes > 0.5:
            return cls.PASSES
        return cls.PERHAPS if max(seen.steps, seen.passes) > 0.5 else cls.CHANGING

    @property
    def repeats(self) -> bool:
        """Whether the result is proved to repeat."""
        return self in (Category.SIZES, Category.STEPS, Category.PASSES)


@dataclass
class Amount:
    """How much of everything: of a forward, or of a part of it; the milliseconds are an estimate."""

    flops: float = 0.0
    nbytes: float = 0.0
    kernels: float = 0.0
    copies: float = 0.0
    copied: float = 0.0
    downloads: float = 0.0
    syncs: float = 0.0
    milliseconds: float = 0.0

    def add(self, cost: Cost, milliseconds: float, share: float) -> None:
        """Add a share of an operation."""
        operation = cost.operation
        uploads = [each for each in operation.copies if each.to_device]
        self.flops += share * operation.work.flops
        self.nbytes += share * operation.work.nbytes
        self.kernels += share * operation.is_kernel
        self.copies += share * len(uploads)
        self.copied += share * sum(each.nbytes for each in uploads)
        self.downloads += share * (len(operation.copies) - len(uploads))
        self.syncs += share * len(operation.syncs)
        self.milliseconds += share * milliseconds

    def join(self, other: Amount) -> None:
        """Add another amount."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def as_dict(self) -> dict[str, float]:
        """Return it as JSON can hold it."""
        return {name: round(value, 6) for name, value in vars(self).items()}


@dataclass
class Row:
    """What one line of the program does in one module, in all instances of it.

    Attributes:
        module: its path, with * for numbers; "" is the model itself.
        stage: the part of the forward that it belongs to.
        line: `package/file.py:12`.
        category: of its results.
        causes: the arguments of the model that they depend on.
        reads: arguments that the host has read before, on which they may depend.
        operations: the names of its operations.
        amount: of it, in one forward.
        order: the number of its first operation in the forward.
    """

    module: str
    stage: str
    line: str
    category: Category
    causes: tuple[str, ...]
    reads: tuple[str, ...]
    operations: tuple[str, ...]
    amount: Amount
    order: int

    @property
    def about(self) -> str:
        """What its results depend on, in words."""
        return self.category.value + (f" (from {', '.join(self.causes)})" if self.causes else "")

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "module": self.module,
            "stage": self.stage,
            "line": self.line,
            "category": self.category.name.lower(),
            "depends_on": list(self.causes),
            "may_depend_on": list(self.reads),
            "operations": list(self.operations),
            **self.amount.as_dict(),
        }


@dataclass(frozen=True)
class Summary:
    """The sums of a forward.

    Attributes:
        total: of everything.
        by_category: of what each category has.
        repeats: of what is proved to repeat, over the steps or the passes of a generation, by how often it does.
        perhaps: of what was seen to, and is not proved to.
        steps, passes, generations: of what repeats over these.
        rows: the one that takes longest first.
        peak_nbytes: the most that was on the device at once.
    """

    total: Amount
    by_category: dict[Category, Amount]
    repeats: Amount
    perhaps: Amount
    steps: Amount
    passes: Amount
    generations: Amount
    rows: Sequence[Row]
    peak_nbytes: int

    def stages(self) -> dict[str, dict[Category, Amount]]:
        """Return what each stage has of each category, in the order in which they begin."""
        found: dict[str, dict[Category, Amount]] = {}
        for row in sorted(self.rows, key=lambda row: row.order):
            own = found.setdefault(row.stage, {})
            own.setdefault(row.category, Amount()).join(row.amount)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "total": self.total.as_dict(),
            "by_category": {each.name.lower(): amount.as_dict() for each, amount in self.by_category.items()},
            "repeats": self.repeats.as_dict(),
            "perhaps": self.perhaps.as_dict(),
            "repeats_over_steps": self.steps.as_dict(),
            "repeats_over_passes": self.passes.as_dict(),
            "repeats_over_generations": self.generations.as_dict(),
            "peak_bytes": self.peak_nbytes,
            "rows": [row.as_dict() for row in self.rows],
        }


def summary(forward: Forward, device: Device) -> Summary:
    """Return the sums of one forward, the mean of those of a step, with times estimated for a device."""
    total, repeats, perhaps, steps, passes, generations = (Amount() for _ in range(6))
    by_category: dict[Category, Amount] = defaultdict(Amount)
    rows: dict[tuple, Row] = {}
    each_time = 1 / forward.passes
    for order, cost in enumerate(forward.costs):
        took = device.milliseconds(cost.operation)
        category = Category.of(cost)
        total.add(cost, took, each_time)
        by_category[category].add(cost, took, each_time)
        best = max(cost.known.steps, cost.known.passes)
        repeats.add(cost, took, each_time * best)
        perhaps.add(cost, took, each_time * max(0.0, max(cost.seen.steps, cost.seen.passes) - best))
        steps.add(cost, took, each_time * cost.known.steps)
        passes.add(cost, took, each_time * cost.known.passes)
        generations.add(cost, took, each_time * cost.known.generations)
        module = pattern(cost.operation.module)
        own = module, cost.operation.line, category
        row = rows.get(own)
        if row is None:
            row = rows[own] = Row(module, stage(module), own[1], category, (), (), (), Amount(), order)
        row.amount.add(cost, took, each_time)
        row.causes = _united(row.causes, sorted(cost.operation.causes))
        row.reads = _united(row.reads, sorted(cost.operation.reads - cost.operation.causes))
        row.operations = _united(row.operations, [cost.operation.name])
    ordered = sorted(rows.values(), key=lambda row: -row.amount.milliseconds)
    ranked = {each: by_category[each] for each in Category if each in by_category}
    return Summary(total, ranked, repeats, perhaps, steps, passes, generations, ordered, forward.peak_nbytes)


def together(amounts: Iterable[Amount]) -> Amount:
    """Return the sum of amounts."""
    total = Amount()
    for each in amounts:
        total.join(each)
    return total


def stage(module: str) -> str:
    """Return the part of the forward that a module belongs to: the module itself, or a child of each block."""
    parts = module.split(".")
    if "*" in parts:
        return ".".join(parts[: parts.index("*") + 2])
    return parts[0] or "(the model itself)"


def _united(known: tuple[str, ...], more: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*known, *more)))
