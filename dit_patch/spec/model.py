"""What a YAML spec may say: its parts, its rules, and one plain sentence for each way to break them.

A spec is data, frozen once it is read. This module knows nothing about torch or about the models that a spec describes:
whether an address exists, and what is done there, is for others to find out. Mappings, and what `config` and `value`
hold, stay plain dicts and lists for the models' sake, to be read and not written to.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from ..errors import SpecError, quote, suggest
from .field_types import (
    Address,
    AttributePath,
    ClassName,
    Count,
    Dependency,
    Dtype,
    Facet,
    Facets,
    Fill,
    Flag,
    Function,
    Identifier,
    KeyName,
    Kind,
    ModelArgument,
    ModuleName,
    Renewal,
    Requirement,
    Size,
    Sources,
    SpecName,
    SubmodulePath,
    no_repeats,
)
from .messages import dotted, in_words, is_echo
from .yaml_reader import Document, Loc, Position, parse, read_file

__all__ = [
    "Blocks",
    "Case",
    "Facet",
    "Input",
    "Kind",
    "Mini",
    "Site",
    "Spec",
    "StepCacheRule",
    "extend",
    "json_schema",
    "load",
    "loads",
]

MAX_COMPLAINTS = 50
OWN_CODE = ("dit_patch.functions.", "dit_patch.hosts.")

Complaint = tuple[Loc, str]


class _Declared(BaseModel):
    """What every part of a spec is: frozen, closed to unknown keys, and able to break several rules at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="after")
    def _keep_the_rules(self) -> Self:
        complaints = [*self._empty(), *self._broken_rules()]
        if complaints:
            raise ValidationError.from_exception_data(type(self).__name__, [_line(*each) for each in complaints])
        return self

    def _empty(self) -> Iterator[Complaint]:
        for name in sorted(self.model_fields_set - {"value"}):
            if getattr(self, name) is None:
                yield (name,), "is empty; give it a value or leave the key out"

    def _broken_rules(self) -> Iterator[Complaint]:
        """Each rule across several keys that this part breaks, with where in it."""
        yield from ()

    def _given(self, *names: str) -> list[str]:
        return [name for name in names if name in self.model_fields_set]


def _line(loc: Loc, message: str) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("rule", "{text}", {"text": message}), loc=loc, input=None)


class Blocks(_Declared):
    """A list of transformer blocks, for the step cache."""

    at: SubmodulePath = Field(description="Path of the module list that holds the blocks, such as `blocks`.")
    pattern: Annotated[int, Field(strict=True, ge=0, le=5)] = Field(
        description="What a block takes and returns: the number of cache-dit's forward pattern, 0 to 5."
    )


class StepCacheRule(_Declared):
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


class Site(_Declared):
    """One call inside the model's forward whose result depends on less than what it is computed from each time."""

    model_config = ConfigDict(json_schema_extra={"dependentRequired": {"use": ["source"], "source": ["use"]}})

    at: Address = Field(
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

    _origin: str = PrivateAttr(default="")

    @property
    def origin(self) -> str:
        """The file and line that declare this site, "" where it was not read from text."""
        return self._origin

    @property
    def is_span(self) -> bool:
        """Whether this is code between two submodules rather than something that is called."""
        return ".." in self.at

    @property
    def span(self) -> tuple[str, str]:
        """The submodules that a span lies between; only for a site that is one."""
        start, _, end = self.at.partition("..")
        if not end:
            raise ValueError(f"{quote(self.at)} is not a span")
        return start, end

    @property
    def names_code(self) -> tuple[str, ...]:
        """The functions of `use`, `then` and `reads`, which are imported and called."""
        return tuple(name for name in (self.use, self.then, *self.reads) if name and ":" in name)

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
        elif self.at.startswith("pipeline:"):
            yield ("at",), "a method of the pipeline needs `then`: nothing that it returns is kept"
        if self.is_span:
            yield from self._broken_span_rules()
        elif self.accelerator:
            yield ("accelerator",), "goes only with a span"

    def _broken_span_rules(self) -> Iterator[Complaint]:
        start, end = self.span
        if start == end:
            yield ("at",), "a span lies between two different submodules"
        if start.count("*") != end.count("*"):
            yield ("at",), "both ends of a span have the same `*`: one span for each thing that they stand for"
        for name in sorted(self.model_fields_set - {"at", "kind", "key", "optional", "accelerator"}):
            yield (name,), "does not go with a span, which takes only at, kind, key, optional and accelerator"
        for name, facets in self.key.items():
            if not name.startswith("model."):
                yield ("key", name), f"a span has no arguments; did you mean `model.{name}`?"
            elif facets != ("identity",):
                yield ("key", name), "a span may know an argument only by `[identity]`"


class Input(_Declared):
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
        """Whether this is a plain value (which may be None) rather than a tensor to be made."""
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
        """The sizes and names in its shape and those of its items, with where they stand in it."""
        for index, symbol in enumerate(self.shape or ()):
            yield ("shape", index), symbol
        for index, item in enumerate(self.items):
            for loc, symbol in item.symbols():
                yield ("items", index, *loc), symbol


class Case(_Declared):
    """A model's config with inputs to call it with, complete or as the difference from another."""

    config: Mapping[str, Any] = Field(default={}, description="What the model's class is built with.")
    sizes: tuple[Mapping[Identifier, Count], ...] = Field(
        default=(), min_length=1, description="What the names in shapes stand for, one mapping for each size to try."
    )
    inputs: Mapping[Identifier, Input | None] = Field(
        default={}, description="The arguments of the model's forward; null leaves one out."
    )
    whole: Flag = Field(default=False, description="In `bench`: small enough to measure whole forwards of, too.")
    rollout: Function | None = Field(
        default=None,
        description="Instead of `inputs`, where forwards depend on each other (through a KV cache): a function that "
        "makes the arguments of each forward of a generation, `package.module:name`.",
    )

    def names(self, size: Mapping[str, int]) -> dict[str, int]:
        """What names in shapes stand for in one of the sizes."""
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
        """The mini model itself, or one of its variants in full; a copy, to be handed on to the model as it is."""
        if variant is None:
            return _merged(self, Case())
        if variant not in self.variants:
            known = ", ".join(self.variants) or "none"
            raise SpecError(f"no variant {quote(variant)}{suggest(variant, self.variants) or '.'} Known: {known}.")
        return _merged(self, self.variants[variant])

    def _broken_rules(self) -> Iterator[Complaint]:
        yield from super()._broken_rules()
        if not self.inputs and not self.rollout:
            yield (), "needs `inputs` (or a `rollout`): what to call the model with"
        yield from _unbound((), self, self)
        for name, variant in self.variants.items():
            yield from _unbound(("variants", name), variant, self)


class Spec(_Declared):
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

    _name: str = PrivateAttr(default="")
    _path: Path | None = PrivateAttr(default=None)
    _trusted: bool = PrivateAttr(default=False)
    _starts: dict[Loc, str] = PrivateAttr(default_factory=dict)

    @property
    def name(self) -> str:
        """How the spec is called, such as "diffusers/wan"."""
        return self._name

    @property
    def path(self) -> Path | None:
        """The file that it was read from."""
        return self._path

    @property
    def trusted(self) -> bool:
        """Whether its `use:` may name functions outside dit_patch."""
        return self._trusted

    @property
    def classes(self) -> tuple[str, ...]:
        """The dotted names of the classes that it is for."""
        return self.models or ((self.model,) if self.model else ())

    def is_wanted(self, names: Collection[str] | None) -> bool:
        """Whether it is taken up where specs of these names are asked for, or where none is named."""
        return self.name in names if names else self.off_by_default is None

    def where(self, key: str) -> str:
        """The file:line:column of a top-level key, for messages; the spec's name where it was not read from text."""
        return self._starts.get((key,), self._name)

    def called(self, site: Site) -> str:
        """How messages call one of its sites: `diffusers/wan: rope.forward (specs/diffusers/wan.yaml:9)`."""
        return f"{self.name}: {site.at} ({site.origin})"

    def bench_case(self, name: str) -> Case:
        """One of the real sizes in full; a copy, to be handed on to the model as it is."""
        if name not in self.bench or self.mini is None:
            known = ", ".join(self.bench) or "none"
            raise SpecError(f"{self.name} has no bench {quote(name)}{suggest(name, self.bench) or '.'} Known: {known}.")
        return _merged(self.mini, self.bench[name])

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
                yield from _unbound(("bench", name), case, self.mini)


def _merged(base: Case, over: Case) -> Case:
    parts = {"config": {**base.config, **over.config}, "sizes": over.sizes or base.sizes, "whole": over.whole}
    rollout = over.rollout or (None if over.inputs else base.rollout)
    if rollout:
        parts["rollout"] = rollout
    else:
        inputs = {**base.inputs, **over.inputs}
        parts["inputs"] = {name: given for name, given in inputs.items() if given is not None}
    return Case(**parts).model_copy(deep=True)


def _numbers(config: Mapping[str, Any]) -> dict[str, int]:
    """The whole numbers above 0 of a configuration, which shapes may use by name."""
    return {name: value for name, value in config.items() if type(value) is int and value > 0}


def _unbound(loc: Loc, own: Case, base: Case) -> Iterator[Complaint]:
    """Where `own` does not fit together with `base`: a name in a shape that a size does not bind, or an idle null."""
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


def load(path: str | Path, *, name: str | None = None, trusted: bool = False) -> Spec:
    """The spec in a YAML file; SpecError with file:line:column for everything that is wrong with it, all at once."""
    path = Path(path)
    file = _file(path)
    spec = _build(parse(read_file(path, file), file), name or path.stem, trusted)
    spec._path = path
    return spec


def loads(text: str, *, file: str = "<text>", name: str = "", trusted: bool = False) -> Spec:
    """The spec in a YAML text, which messages call `file`."""
    return _build(parse(text, file), name, trusted)


def extend(base: Spec, spec: Spec) -> Spec:
    """`spec` with what it inherits from `base`: sites and blocks by `at`, requirements, and the step cache's rule."""
    return spec.model_copy(
        update={
            "requires": tuple(dict.fromkeys((*base.requires, *spec.requires))),
            "parameters": spec.parameters or base.parameters,
            "blocks": tuple({each.at: each for each in (*base.blocks, *spec.blocks)}.values()),
            "sites": tuple({each.at: each for each in (*base.sites, *spec.sites)}.values()),
            "step_cache": spec.step_cache or base.step_cache,
        }
    )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a spec file, with which an editor completes and explains it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_tightened(Spec.model_json_schema())}


def _tightened(schema: Any) -> Any:
    """The schema as strict as the reader: no keys but those of the shape given, and no null for a key left out."""
    if isinstance(schema, list):
        return [_tightened(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: _tightened(part) for name, part in schema.items()}
    if "patternProperties" in schema:
        schema["additionalProperties"] = False
    if "anyOf" in schema and schema.get("default", ...) is None:
        (given,) = (part for part in schema.pop("anyOf") if part != {"type": "null"})
        del schema["default"]
        schema |= given
    return schema


def _file(path: Path) -> str:
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return os.fspath(path)


def _build(document: Document, name: str, trusted: bool) -> Spec:
    complaints = list(document.complaints)
    spec = None
    if isinstance(document.data, dict):
        try:
            spec = Spec.model_validate(document.data)
        except ValidationError as error:
            complaints += [in_words(each, document, Spec) for each in error.errors() if not is_echo(each)]
    else:
        complaints.append((document.places[()].value, "a spec is a mapping that begins with `model:`"))
    if not trusted and isinstance(document.data, dict):
        complaints += _untrusted(document)
    if complaints or spec is None:
        lines = list(dict.fromkeys(f"{document.where(at)}: {message}" for at, message in sorted(complaints)))
        more = [f"{document.file}: and {len(lines) - MAX_COMPLAINTS} more"] if len(lines) > MAX_COMPLAINTS else []
        raise SpecError("\n".join(lines[:MAX_COMPLAINTS] + more))
    spec._name, spec._trusted = name, trusted
    spec._starts = {loc: document.where(place.start) for loc, place in document.places.items() if len(loc) == 1}
    for index, site in enumerate(spec.sites):
        site._origin = f"{document.file}:{document.places['sites', index].start.line}"
    return spec


def _untrusted(document: Document) -> Iterator[tuple[Position, str]]:
    models = [
        place.text for loc, place in document.places.items() if loc[:1] in (("model",), ("models",)) and place.text
    ]
    theirs = tuple(f"{model.partition('.')[0]}." for model in models)
    for loc, place in document.places.items():
        if not place.text or not _names_code(loc, place.text):
            continue
        module = place.text.partition(":")[0]
        # What a model's own package says of itself is as good as the model.
        if not f"{module}.".startswith(OWN_CODE + theirs if "reads" in loc else OWN_CODE):
            message = (
                f"{quote(place.text)} is code outside `{OWN_CODE[0].rstrip('.')}`, which a spec of your own may name "
                "only if you trust it: trust=True, or --trust-specs"
            )
            yield place.start, f"{dotted(loc)}: {message}"


def _names_code(loc: Loc, text: str) -> bool:
    """Whether what stands there is imported and called, other than what is patched itself."""
    if loc[0] == "sites":
        return len(loc) > 2 and (loc[2] in ("use", "then") or (loc[2] == "reads" and ":" in text))
    return loc[0] in ("mini", "bench") and loc[-1] in ("host", "rollout")
