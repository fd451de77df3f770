"""How to build a small model and what to call it with: the `mini:` of a spec, its variants, and its `bench:` sizes.

A recipe is data; `mini` makes models and tensors of it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field

from ..errors import SpecError, quote, suggest
from .declared import Complaint, Declared
from .field_types import Count, Dtype, Fill, Flag, Function, Identifier, ModuleName, Renewal, Size
from .yaml_reader import Loc


class Input(Declared):
    """How to make one argument of the model's forward: a tensor of a shape, a list of such, or a plain value."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["shape"]}, {"required": ["items"]}, {"required": ["value"]}]}
    )

    shape: tuple[Size, ...] | None = Field(
        default=None,
        description="A tensor of this shape: sizes, or names that `sizes` binds or that are whole numbers in `config`.",
    )
    items: tuple["Input", ...] = Field(default=(), min_length=1, description="A list of these.")
    value: Any = Field(default=None, description="This very value, for an argument that is no tensor.")
    fill: Fill = Field(default="randn", description="What the tensor is filled with; a number fills it everywhere.")
    new: Renewal = Field(
        default="generation",
        description="How often a pipeline makes a new tensor: once in a generation, pass, step or call.",
    )
    dtype: Literal["model", Dtype] = Field(
        default="model", description="The tensor's dtype; `model` is the model's own."
    )

    @property
    def is_value(self) -> bool:
        """Whether the input is a plain value (which may be None) rather than a tensor to be made."""
        return "value" in self.model_fields_set

    def _broken_rules(self) -> Iterator[Complaint]:
        kinds = self._given("shape", "items", "value")
        if len(kinds) > 1:
            yield (kinds[-1],), f"an input has a `{kinds[0]}` or a `{kinds[-1]}`, not both"
        elif self.is_value:
            for name in self._given("fill", "new", "dtype"):
                yield (name,), "goes only with `shape`"
        elif self.items:
            for name in self._given("fill", "dtype"):
                yield (name,), "goes only with `shape`; each item has its own"
            for index, item in enumerate(self.items):
                for name in item._given("new"):
                    yield ("items", index, name), "goes with the whole list, not with one of its items"
        elif self.shape is None:
            yield (), "an input needs a `shape` (a tensor), `items` (a list of them) or a `value`"

    def symbols(self) -> Iterator[tuple[Loc, str | int]]:
        """Yield the sizes and names in the shape, and in those of the items, each with its path."""
        for index, symbol in enumerate(self.shape or ()):
            yield ("shape", index), symbol
        for index, item in enumerate(self.items):
            for loc, symbol in item.symbols():
                yield ("items", index, *loc), symbol


class Case(Declared):
    """A model's config with inputs to call it with, complete or as the difference from another."""

    config: Mapping[str, Any] = Field(default={}, description="What the model's class is built with.")
    sizes: tuple[Mapping[Identifier, Count], ...] = Field(
        default=(), min_length=1, description="What the names in shapes stand for, one mapping for each size to try."
    )
    inputs: Mapping[Identifier, Input | None] = Field(
        default={}, description="The arguments of the model's forward; null leaves one out."
    )
    whole: Flag = Field(default=False, description="In `bench`: small enough to measure whole forwards of, too.")
    depth: Mapping[str, Any] = Field(
        default={},
        description="In `bench`: what the configuration of the whole model has instead, above all how many blocks; "
        "`dit-patch audit` counts with these.",
    )
    rollout: Function | None = Field(
        default=None,
        description="Instead of `inputs`, where forwards depend on each other (through a KV cache): a function that "
        "makes the arguments of each forward of a generation, `package.module:name`.",
    )

    def names(self, size: Mapping[str, int]) -> dict[str, int]:
        """Return the number that each name in a shape stands for, in one of the sizes."""
        return {**_numbers(self.config), **size}

    def _broken_rules(self) -> Iterator[Complaint]:
        if self.rollout and self.inputs:
            yield ("rollout",), "makes the arguments itself; `inputs` does not go with it"


class Mini(Case):
    """A model tiny enough to build with random weights and run anywhere, and its variants."""

    host: ModuleName | None = Field(
        default=None,
        description="A module whose `prepare()` and `build(cls, config)` know what the model's library needs.",
    )
    config: Mapping[str, Any] = Field(description="What the model's class is built with.")
    sizes: tuple[Mapping[Identifier, Count], ...] = Field(
        min_length=1, description="What the names in shapes stand for, one mapping for each size to try."
    )
    inputs: Mapping[Identifier, Input] = Field(default={}, description="The arguments of the model's forward.")
    variants: Mapping[str, Case] = Field(
        default={}, description="Other ways to build and call the model, each merged over what stands above."
    )

    def case(self, variant: str | None = None) -> Case:
        """Return the mini model itself, or one of its variants in full, as a copy that may be handed on to the model.

        Raises:
            SpecError: there is no such variant; the message names those that there are.
        """
        if variant is None:
            return merge(self, Case())
        if variant not in self.variants:
            known = ", ".join(self.variants) or "none"
            raise SpecError(f"no variant {quote(variant)}{suggest(variant, self.variants) or '.'} Known: {known}.")
        return merge(self, self.variants[variant])

    def _broken_rules(self) -> Iterator[Complaint]:
        yield from super()._broken_rules()
        if not self.inputs and not self.rollout:
            yield (), "needs `inputs` (or a `rollout`): what to call the model with"
        yield from unbound_names((), self, self)
        for name, variant in self.variants.items():
            yield from unbound_names(("variants", name), variant, self)


def merge(base: Case, over: Case) -> Case:
    """Return `base` with what `over` says instead, as a copy; `over` leaves out an input by giving it as None."""
    parts = {
        "config": {**base.config, **over.config},
        "sizes": over.sizes or base.sizes,
        "whole": over.whole,
        "depth": over.depth,
    }
    rollout = over.rollout or (None if over.inputs else base.rollout)
    if rollout:
        parts["rollout"] = rollout
    else:
        inputs = {**base.inputs, **over.inputs}
        parts["inputs"] = {name: given for name, given in inputs.items() if given is not None}
    return Case(**parts).model_copy(deep=True)


def _numbers(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the whole numbers above 0 of a configuration, which shapes may use by name."""
    return {name: value for name, value in config.items() if type(value) is int and value > 0}


def unbound_names(loc: Loc, own: Case, base: Case) -> Iterator[Complaint]:
    """Yield what is wrong with `own` merged over `base`: a null that leaves out nothing, a name that no size binds.

    Args:
        loc: the path of `own` in the spec.
    """
    for name, given in own.inputs.items():
        if given is None and name not in base.inputs:
            yield (*loc, "inputs", name), f"leaves out an input that `mini` does not have{suggest(name, base.inputs)}"
    sizes, numbers = own.sizes or base.sizes, _numbers({**base.config, **own.config})
    for name, given in {**base.inputs, **own.inputs}.items():
        if given is None or not (name in own.inputs or own.sizes):
            continue
        for at, symbol in given.symbols():
            number = next((number for number, size in enumerate(sizes) if symbol not in size), None)
            if isinstance(symbol, int) or number is None or symbol in numbers:
                continue
            here = ("inputs", name, *at) if name in own.inputs else ("sizes", number)
            hint = suggest(symbol, (*sizes[number], *numbers))
            yield (
                (*loc, *here),
                f"the shape of {quote(name)} uses {quote(symbol)}, which sizes.{number} does not bind, nor `config`"
                f"{hint}",
            )
