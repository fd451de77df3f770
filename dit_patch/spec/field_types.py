"""The types of a spec's fields: how an address, a key, a facet or a size is written, and what there is to choose from.

They are types for pydantic: checked when a spec is read, with a message in plain words, and patterns and choices in the
JSON Schema. What a field is for, and which of them go together, is for `model` and `recipe` to say.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from ..errors import quote
from .messages import one_of, show

_IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"
_MODULE = rf"{_IDENTIFIER}(?:\.{_IDENTIFIER})*"
_STEP = r"(?:[A-Za-z_][A-Za-z0-9_]*|[0-9]+)"
_PATH = rf"{_STEP}(?:\.{_STEP})*"
_BRANCH = rf"(?:{_STEP}|\*)(?:\.(?:{_STEP}|\*))*"
_SPAN = rf"(?:{_BRANCH})?\.\.{_BRANCH}"
_ATTRIBUTE = rf"(?:(?:{_STEP}|\*)\.)*{_IDENTIFIER}"
_GLOBAL = rf"{_MODULE}:{_IDENTIFIER}"
_LOCAL = rf"{_MODULE}:{_MODULE}\.<locals>\.{_IDENTIFIER}"


@dataclass(frozen=True)
class _Pattern:
    """A string that matches a pattern from end to end; messages say that it "is not `words`" where it does not."""

    pattern: str
    words: str

    def check(self, text: str) -> str:
        if not re.fullmatch(self.pattern, text):
            raise ValueError(f"{quote(text)} is not {self.words}")
        return text

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "pattern": f"^(?:{self.pattern})$"}


Identifier = Annotated[str, _Pattern(_IDENTIFIER, "a name (letters, digits and `_`)")]
ClassName = Annotated[str, _Pattern(rf"{_IDENTIFIER}\.{_MODULE}", "the dotted name of a class, `package.module.Class`")]
SpecName = Annotated[str, _Pattern(r"[^\s/.][^\s]*", "the name of a spec, such as `diffusers/wan`")]
SubmodulePath = Annotated[str, _Pattern(_PATH, "the path of a submodule, such as `blocks.0.attn` (no `*`)")]
AddressText = Annotated[
    str,
    _Pattern(
        rf"{_SPAN}|{_ATTRIBUTE}|{_GLOBAL}|{_LOCAL}",
        "an address; it is `path.to.attribute` (`*` is any one step, not the last), `forward:name`, `pipeline:name`, "
        "`package.module:name`, `package.module:Class.method.<locals>.name`, or `a..b` for the span between two "
        "submodules",
    ),
]
AttributePath = Annotated[
    str,
    _Pattern(_ATTRIBUTE, "the path of an attribute, such as `blocks.*.attn.table` (`*` is any one step, not the last)"),
]
Dependency = Annotated[
    str,
    _Pattern(
        rf"{_BRANCH}|{_GLOBAL}",
        "the path of a submodule, such as `blocks.0.attn`, or a function, `package.module:name`",
    ),
]
ModuleName = Annotated[str, _Pattern(_MODULE, "the dotted name of a Python module")]
KeyName = Annotated[str, _Pattern(rf"(?:model\.)?{_IDENTIFIER}", "an argument's name; it is `name` or `model.name`")]
ModelArgument = Annotated[str, _Pattern(rf"model\.{_IDENTIFIER}", "an argument of the model's forward, `model.name`")]
Function = Annotated[str, _Pattern(_GLOBAL, "a function, `package.module:name`")]
Fingerprint = Annotated[str, _Pattern("[0-9a-f]{12}", "a source fingerprint, 12 hexadecimal digits (0-9, a-f)")]

Kind = Literal["rope", "timestep", "mask", "context", "rotary", "kv_cache"]
Facet = Literal["shape", "dtype", "device", "identity", "values"]
FillWord = Literal["randn", "timestep", "mask", "zeros", "ones"]
Renewal = Literal["generation", "pass", "step", "call"]
Dtype = Literal[
    "float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128",
    "int64", "int32", "int16", "int8", "uint8", "bool",
]  # fmt: skip

Count = Annotated[int, Field(strict=True, gt=0)]
Flag = Annotated[bool, Field(strict=True)]


def no_repeats(items: tuple[str, ...]) -> tuple[str, ...]:
    """Return the items, if each is there once; ValueError otherwise."""
    seen: set[str] = set()
    for item in items:
        if item in seen:
            raise ValueError(f"{quote(item)} is listed twice")
        seen.add(item)
    return items


def _one_or_several(given: Any) -> Any:
    return given if isinstance(given, (list, tuple)) else (given,)


def _number_or_word(given: Any) -> Any:
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return given
    words = get_args(FillWord)
    if isinstance(given, str) and given in words:
        return given
    raise ValueError(f"expected a number or {one_of(words)}, not {show(given)}")


def _size_or_symbol(given: Any) -> Any:
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    if isinstance(given, str) and re.fullmatch(_IDENTIFIER, given):
        return given
    raise ValueError(f"{show(given)} is not a size; it is a whole number above 0, or a name that `sizes` binds")


def _requirement(text: str) -> str:
    from packaging.requirements import InvalidRequirement, Requirement

    # The parser recurses into a marker's parentheses, so length is what keeps it off the stack's end.
    if len(text) > 200:
        raise ValueError(f"{quote(text)} is too long for a requirement")
    try:
        Requirement(text)
    except InvalidRequirement as error:
        raise ValueError(f"{quote(text)} is not a requirement (PEP 508): {str(error).splitlines()[0]}") from error
    return text


Facets = Annotated[tuple[Facet, ...], Field(min_length=1), AfterValidator(no_repeats)]
Requirement = Annotated[str, AfterValidator(_requirement)]
Fill = Annotated[FillWord | float, BeforeValidator(_number_or_word, json_schema_input_type=FillWord | float)]
Size = Annotated[int | str, BeforeValidator(_size_or_symbol, json_schema_input_type=Count | Identifier)]
Sources = Annotated[
    tuple[Fingerprint, ...],
    BeforeValidator(_one_or_several, json_schema_input_type=Fingerprint | tuple[Fingerprint, ...]),
    AfterValidator(no_repeats),
]
