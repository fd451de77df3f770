"""Where a site is, as a spec writes it: one small class for each form of address.

    Address.parse("blocks.*.attn.forward")             # AttributeAddress("blocks.*.attn", "forward")
    Address.parse("forward:apply_rope")                # GlobalAddress("forward", "apply_rope")
    Address.parse("package.module:Class.f.<locals>.g") # InnerFunctionAddress("package.module", "Class.f", "g")
    Address.parse("pipeline:prepare")                  # StageAddress("prepare")
    Address.parse("patch_embedding..blocks.0")         # SpanAddress("patch_embedding", "blocks.0")

This is text alone; `sites.resolve` finds what an address names in a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

FORWARD = "forward"
_LOCALS = ".<locals>."


class Address:
    """Where a site is, in one of five forms."""

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> Address:
        """Return the address that `text` is; what an address may look like is checked where a spec is read."""
        place, colon, name = text.partition(":")
        if not colon:
            start, dots, end = text.partition("..")
            if dots:
                return SpanAddress(start, end)
            path, _, name = text.rpartition(".")
            return AttributeAddress(path, name)
        if place == "pipeline":
            return StageAddress(name)
        function, inside, name = name.rpartition(_LOCALS)
        return InnerFunctionAddress(place, function, name) if inside else GlobalAddress(place, name)


@dataclass(frozen=True)
class AttributeAddress(Address):
    """An attribute of a submodule, `path.to.attribute`."""

    #: The submodule's path, in which `*` is any one step; empty for the model itself.
    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


@dataclass(frozen=True)
class GlobalAddress(Address):
    """A global of a Python module, `package.module:name`; `forward:name`: of the one that the forward is defined in."""

    #: The module's dotted name, or FORWARD.
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


@dataclass(frozen=True)
class InnerFunctionAddress(Address):
    """A function that another one defines, `package.module:Class.method.<locals>.name`."""

    #: The module's dotted name, or FORWARD.
    module: str
    #: The path of the outer function in the module.
    function: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}:{self.function}{_LOCALS}{self.name}"


@dataclass(frozen=True)
class StageAddress(Address):
    """A method of those stages of the pipeline that run the model, `pipeline:name`."""

    name: str

    def __str__(self) -> str:
        return f"pipeline:{self.name}"


@dataclass(frozen=True)
class SpanAddress(Address):
    """The tensor code of a forward between leaving one submodule and entering another, `a..b`."""

    #: The path of the submodule that it begins after; empty: at the beginning of the forward.
    start: str
    #: The path of the submodule that it ends before.
    end: str

    def __str__(self) -> str:
        return f"{self.start}..{self.end}"
