"""What a YAML spec may say: its parts, its rules, and one plain sentence for each way to break them.

A spec is data, frozen once it is read. This module knows nothing about torch or about the models that a spec describes:
whether an address exists, and what is done there, is for others to find out. Mappings, and what `config` and `value`
hold, stay plain dicts and lists for the models' sake, to be read and not written to.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, PrivateAttr

from ..errors import SpecError, quote, suggest
from .address import Address, GlobalAddress, SpanAddress, StageAddress
from .declared import Complaint, Declared
from .field_types import (
    AddressText,
    AttributePath,
    ClassName,
    Count,
    Dependency,
    Dtype,
    Facets,
    Flag,
    Function,
    Identifier,
    KeyName,
    Kind,
    ModelArgument,
    Requirement,
    Sources,
    SpecName,
    SubmodulePath,
    no_repeats,
)
from .origin import Origin
from .recipe import Case, Mini, merge, unbound_names


class Blocks(Declared):
    """A list of transformer blocks, for the step cache."""

    at: SubmodulePath = Field(description="Path of the module list that holds the blocks, such as `blocks`.")
    pattern: Annotated[int, Field(strict=True, ge=0, le=5)] = Field(
        description="What a block takes and returns: the number of cache-dit's forward pattern, 0 to 5."
    )


class StepCacheRule(Declared):
    """What step caching has to know about this model."""

    model_config = ConfigDict(json_schema_extra={"dependentRequired": {"reason": ["supported"]}})

    supported: Flag = Field(default=True, description="false: step caching is refused for this model, for `reason`.")
    reason: str | None = Field(default=None, description="Why it is refused, as the user will read it.")
    min_steps: Count | None = Field(
        default=None, description="Refuse below this many denoising steps, where there is nothing to skip."
    )

    def _broken_rules(self) -> Iterator[Complaint]:
        if self.supported and self.reason is not None:
            yield ("reason",), "goes only with `supported: false`"
        if not self.supported and not self.reason:
            yield ("supported",), "false needs a `reason`, which is what the user will read"
        if not self.supported and self.min_steps is not None:
            yield ("min_steps",), "says nothing next to `supported: false`"


class Site(Declared):
    """One call inside the model's forward whose result depends on less than what it is computed from each time."""

    model_config = ConfigDict(json_schema_extra={"dependentRequired": {"use": ["source"], "source": ["use"]}})

    at: AddressText = Field(
        description="What is called: `path.to.attribute` from the model (`*` is any one step), `forward:name` for a "
        "global as the model's forward sees it, `package.module:name` for a global elsewhere, "
        "`package.module:Class.method.<locals>.name` for a function that a method defines, `pipeline:name` for a "
        "method of the pipeline's stages that run the model, or `a..b` for the tensor code that the forward runs "
        "between leaving submodule a (with no a: its beginning) and entering submodule b."
    )
    kind: Kind = Field(description="What the result is; users switch sites on by kind.")
    key: Mapping[KeyName, Facets] = Field(
        default={},
        description="For each tensor argument, what of it the result depends on. `model.x` is argument x of the "
        "model's forward. Arguments that are not tensors always count and are not listed.",
    )
    use: Function | None = Field(
        default=None, description="A function to call instead, `package.module:name`; needs `source`."
    )
    source: Sources = Field(
        default=(), description="Fingerprint(s) of the original's source that the function in `use` stands in for."
    )
    then: Function | None = Field(
        default=None,
        description="A function to put the result through, `package.module:name`, where that is all there is to do.",
    )
    reads: tuple[Dependency, ...] = Field(
        default=(),
        description="What else counts: submodules with whose weights the tensor arguments were computed (`*` is what "
        "it is in `at`), single parameters of that kind, and functions without arguments, `package.module:name`, whose "
        "value counts.",
    )
    device: Literal["model"] | None = Field(
        default=None, description="`model`: put the result where the model runs, once."
    )
    dtype: Dtype | None = Field(default=None, description="Convert the result to this dtype, once.")
    clears: tuple[AttributePath, ...] = Field(
        default=(),
        description="Attributes, as paths from the model, in which a forward leaves the result: reset to None at the "
        "start and whenever the model moves to another device.",
    )
    optional: Flag = Field(default=False, description="true: a model without this address is fine.")
    accelerator: Flag = Field(
        default=False,
        description="For a span; true: only where the model runs on another device than the CPU, on which there would "
        "be nothing to save.",
    )
    unused: Flag = Field(default=False, description="true: the result is never read, so a stand-in is returned.")
    unused_with: tuple[ModelArgument, ...] = Field(
        default=(),
        description="Where all of these arguments of the model's forward are given, and every item of them, the result "
        "is never read, and a stand-in is returned.",
    )
    bind: Mapping[Identifier, ModelArgument] = Field(
        default={},
        description="Arguments to take from the model's own call, `{name: model.name}`; only if fixes are asked for.",
    )

    @property
    def address(self) -> Address:
        """What `at` says."""
        return Address.parse(self.at)

    @property
    def borrows(self) -> bool:
        """Whether results are known by arguments of the model's forward, which are not the call's own."""
        return any(name.startswith("model.") for name in self.key)

    @property
    def functions_read(self) -> tuple[GlobalAddress, ...]:
        """The functions in `reads`, whose values count."""
        return tuple(each for each in map(Address.parse, self.reads) if isinstance(each, GlobalAddress))

    @property
    def paths_read(self) -> tuple[str, ...]:
        """The submodules and parameters in `reads`, as paths from the model."""
        return tuple(path for path in self.reads if not isinstance(Address.parse(path), GlobalAddress))

    def _broken_rules(self) -> Iterator[Complaint]:
        if self.use and not self.source:
            yield ("use",), "needs `source`, the fingerprint of the original that it was checked against"
        if self.source and not self.use:
            yield ("source",), "goes only with `use`"
        if self.unused:
            for name in self._given("key", "use", "source", "then", "reads", "unused_with", "bind"):
                yield (name,), "says nothing next to `unused: true`: the result is never computed"
        if self.then:
            for name in sorted(self.model_fields_set - {"at", "kind", "then", "optional"}):
                yield (name,), "does not go with `then`, which takes only at, kind and optional"
        elif isinstance(self.address, StageAddress):
            yield ("at",), "a method of the pipeline needs `then`: nothing that it returns is kept"
        if isinstance(self.address, SpanAddress):
            yield from self._broken_span_rules(self.address)
        elif self.accelerator:
            yield ("accelerator",), "goes only with a span"

    def _broken_span_rules(self, span: SpanAddress) -> Iterator[Complaint]:
        if span.start == span.end:
            yield ("at",), "a span lies between two different submodules"
        if span.start.count("*") != span.end.count("*"):
            yield ("at",), "both ends of a span have the same `*`: one span for each thing that they stand for"
        for name in sorted(self.model_fields_set - {"at", "kind", "key", "optional", "accelerator"}):
            yield (name,), "does not go with a span, which takes only at, kind, key, optional and accelerator"
        for name, facets in self.key.items():
            if not name.startswith("model."):
                yield ("key", name), f"a span has no arguments; did you mean `model.{name}`?"
            elif facets != ("identity",):
                yield ("key", name), "a span may know an argument only by `[identity]`"


class Spec(Declared):
    """One YAML file: a model's sites and blocks, and how to build a small one to verify them with."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["model"]}, {"required": ["models"]}]})

    model: ClassName | None = Field(
        default=None, description="The model's class, `package.module.Class`, by the module that defines it."
    )
    models: Annotated[tuple[ClassName, ...], AfterValidator(no_repeats)] = Field(
        default=(), min_length=1, description="Several classes, where one spec fits them all."
    )
    parameters: Annotated[tuple[Identifier, ...], AfterValidator(no_repeats)] = Field(
        default=(),
        description="The positional parameters of the model's forward, where its signature does not name them.",
    )
    extends: SpecName | None = Field(
        default=None,
        description="Another spec, such as `diffusers/wan`: its sites and blocks come first; own ones with the same "
        "`at` take their place.",
    )
    requires: tuple[Requirement, ...] = Field(
        default=(), description="The packages and versions that this was verified with, as for pip."
    )
    off_by_default: str | None = Field(
        default=None,
        description="Why this is taken up only where it is asked for by name, as the user will read it. A spec that "
        "extends this one says so itself, or is on.",
    )
    blocks: tuple[Blocks, ...] = Field(default=(), description="The lists of blocks, for the step cache.")
    step_cache: StepCacheRule | None = Field(
        default=None, description="What step caching has to know about this model."
    )
    sites: tuple[Site, ...] = Field(default=(), description="The calls that need not be made each time.")
    mini: Mini | None = Field(
        default=None, description="A tiny config and its inputs, to verify the spec with random weights."
    )
    bench: Mapping[str, Case] = Field(
        default={}, description="Real sizes for `dit-patch bench`, each merged over `mini`."
    )

    _origin: Origin = PrivateAttr(default=Origin())

    def model_post_init(self, context: Any) -> None:
        """Take the spec's origin, if it is read from text, which then is the context of the validation."""
        if isinstance(context, Origin):
            self._origin = context

    @property
    def origin(self) -> Origin:
        """What the spec is called, and the text that declares it."""
        return self._origin

    @property
    def name(self) -> str:
        """The spec's name, such as "diffusers/wan"."""
        return self._origin.name

    @property
    def path(self) -> Path | None:
        """The file that the spec was read from."""
        return self._origin.path

    @property
    def trusted(self) -> bool:
        """Whether `use:` may name functions outside dit_patch."""
        return self._origin.trusted

    @property
    def classes(self) -> tuple[str, ...]:
        """The dotted names of the classes that the spec is for."""
        return self.models or ((self.model,) if self.model else ())

    def is_wanted(self, names: Collection[str] | None) -> bool:
        """Return whether the spec is taken up where specs of these names are asked for, or none is named."""
        return self.name in names if names else self.off_by_default is None

    def position(self, key: str) -> str:
        """Return the file:line:column of a top-level key; the spec's name where it was not read from text."""
        return self._origin.keys.get(key, self.name)

    def label(self, site: Site) -> str:
        """Return how messages call one of the sites: `diffusers/wan: rope.forward (specs/diffusers/wan.yaml:9)`."""
        return f"{self.name}: {site.at} ({self._origin.sites.get(site.at, '')})"

    def bench_case(self, name: str) -> Case:
        """Return one of the real sizes in full, as a copy that may be handed on to the model.

        Raises:
            SpecError: there is none of that name; the message names those that there are.
        """
        if name not in self.bench or self.mini is None:
            known = ", ".join(self.bench) or "none"
            raise SpecError(f"{self.name} has no bench {quote(name)}{suggest(name, self.bench) or '.'} Known: {known}.")
        return merge(self.mini, self.bench[name])

    def _broken_rules(self) -> Iterator[Complaint]:
        if self.model and self.models:
            yield ("models",), "a spec has a `model` or `models`, not both"
        elif not self.classes:
            yield (), "`model` is missing: the dotted name of the class that the spec is for"
        if self.off_by_default is not None and not self.off_by_default.strip():
            yield ("off_by_default",), "needs the reason, which is what the user will read"
        if not (self.sites or self.blocks or self.extends):
            yield (), "a spec needs at least one of `sites`, `blocks` and `extends`; without them it does nothing"
        for part in ("blocks", "sites"):
            first: dict[str, int] = {}
            for index, each in enumerate(getattr(self, part)):
                if first.setdefault(each.at, index) != index:
                    yield (part, index, "at"), f"{quote(each.at)} is listed twice, first as {part}.{first[each.at]}"
        if self.bench and not self.mini:
            yield ("bench",), "needs `mini`, which its cases are merged over"
        elif self.mini:
            for name, case in self.bench.items():
                yield from unbound_names(("bench", name), case, self.mini)


def extend(base: Spec, spec: Spec) -> Spec:
    """Return `spec` with what it inherits: the sites and blocks of `base` by `at`, its requirements, its step cache."""
    extended = spec.model_copy(
        update={
            "requires": tuple(dict.fromkeys((*base.requires, *spec.requires))),
            "parameters": spec.parameters or base.parameters,
            "blocks": tuple({each.at: each for each in (*base.blocks, *spec.blocks)}.values()),
            "sites": tuple({each.at: each for each in (*base.sites, *spec.sites)}.values()),
            "step_cache": spec.step_cache or base.step_cache,
        }
    )
    extended._origin = spec.origin.extending(base.origin)
    return extended
