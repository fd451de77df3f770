"""What sites are bound with: a model with its arguments, and an attribute with what the site's names mean there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import torch

from ..errors import SiteError, suggest
from ..memo.model_guards import ModelGuards
from ..memo.site_guards import SiteGuards
from ..memo.store import Budget
from ..spec.model import Site, Spec
from ..upstream import torch_internals
from . import layers, scope
from .inner_functions import InnerFunctions
from .surroundings import model_guards, site_guards


@dataclass(frozen=True)
class Binding:
    """All that the sites of one model are bound with."""

    model: torch.nn.Module
    #: Names of the arguments of the model's forward.
    parameters: Sequence[str]
    #: Whether the forward takes other arguments by keyword.
    takes_any: bool
    #: What the caches of all sites may hold together.
    budget: Budget
    #: What is looked at once a forward.
    guards: ModelGuards
    #: Which hits are computed again and compared: "first", "always" or "never".
    check: str = "first"
    #: Whether `bind:` in a spec counts.
    fixes: bool = False
    #: Paths of the model's block lists.
    blocks: Sequence[str] = ()

    @classmethod
    def of(
        cls, spec: Spec, model: torch.nn.Module, budget: Budget, check: str = "first", fixes: bool = False
    ) -> Binding:
        """Return what the sites of `spec` are bound with on `model`."""
        parameters = (*scope.parameters(model), *spec.parameters)
        blocks = [each.at for each in spec.blocks]
        takes_any = scope.takes_any(model)
        return cls(model, parameters, takes_any, budget, model_guards(model), check, fixes, blocks)

    def add_guards(self, attribute: Attribute) -> SiteGuards:
        """Return the guards of a site on this attribute; they are looked at from now on."""
        guards = site_guards(attribute, self.model, self.blocks)
        self.guards.add(guards)
        return guards

    def check_argument(self, name: str, label: str) -> None:
        """Raise SiteError if the model's forward has no argument of this name."""
        if name not in self.parameters and not self.takes_any:
            raise SiteError(
                f"{label}: the model has no parameter `{name}`{suggest(name, self.parameters)}\n"
                f"    Parameters: {', '.join(self.parameters) or 'none'}."
            )


@dataclass(frozen=True)
class Attribute:
    """One attribute that a site stands for; what the site reads and clears is looked up already."""

    site: Site
    #: The site with its spec and the place in it, for messages.
    label: str
    #: The module, Python module, stage of a pipeline or function that holds the attribute.
    owner: Any
    name: str
    #: Submodules that results depend on besides the owner.
    modules: Sequence[torch.nn.Module] = ()
    #: Single parameters that they depend on: the group that holds each, and its name there.
    weights: Sequence[tuple[dict, str]] = ()
    #: Functions of no arguments whose values they depend on.
    values: Sequence[Callable[[], Any]] = ()
    #: Attributes in which the model keeps results of the site, as (owner, name).
    leftovers: Sequence[tuple[Any, str]] = field(default=())
    #: The package that the model comes from.
    package: str = ""

    @property
    def is_global(self) -> bool:
        """Whether the attribute belongs to no model: it is shared, and outlives them."""
        return isinstance(self.owner, (ModuleType, InnerFunctions))

    @property
    def all_modules(self) -> list[torch.nn.Module]:
        """The modules that results depend on: the owner, if it is one, and those that the site reads."""
        return [*([self.owner] if isinstance(self.owner, torch.nn.Module) else []), *self.modules]

    @property
    def original(self) -> Callable:
        """The callable that a layer goes around."""
        return layers.innermost(self.owner, self.name)

    @cached_property
    def parameters(self) -> list[str]:
        """Names of the parameters that can be given by position or by name, in order, as the spec has them.

        An adapter or a quantised layer in the place of the one that the spec was written for may call them otherwise.
        """
        own = _names(self.original)
        if set(self._named) <= set(own):
            return own
        return next((names for names in map(_names, self._stands_for()) if set(self._named) <= set(names)), own)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """The spec's names for parameters that the attribute itself calls otherwise."""
        return {own: name for own, name in zip(_names(self.original), self.parameters) if own != name}

    @cached_property
    def takes_any(self) -> bool:
        """Whether the attribute takes other arguments by keyword."""
        given = inspect.signature(self.original).parameters.values()
        return any(each.kind is each.VAR_KEYWORD for each in given)

    @property
    def is_foreign(self) -> bool:
        """Whether a layer of another library stands in the place, of which the spec's names are not known."""
        if set(self._named) <= set(self.parameters) or not isinstance(self.owner, torch.nn.Module):
            return False
        module = type(self.owner).__module__
        return not module.startswith("torch.nn.") and module.partition(".")[0] != self.package

    @property
    def _named(self) -> list[str]:
        """Arguments of the attribute that the site names."""
        names = (*self.site.key, *self.site.bind)
        return [name for name in names if not name.startswith("model.")]

    def _stands_for(self) -> Iterator[Callable]:
        """Yield the attribute of the classes that the owner inherits from, and of the layer that it is around."""
        layer = self.owner
        while isinstance(layer, torch.nn.Module):
            yield from (vars(base)[self.name].__get__(layer) for base in type(layer).__mro__ if self.name in vars(base))
            layer = torch_internals.children(layer).get("base_layer")

    def check_names(self, binding: Binding) -> None:
        """Raise SiteError if the site names an argument that neither the attribute nor the model's forward has."""
        for name in [*self.site.key, *self.site.bind, *self.site.bind.values(), *self.site.unused_with]:
            if name.startswith("model."):
                binding.check_argument(name.removeprefix("model."), self.label)
            elif name not in self.parameters and not self.takes_any:
                raise SiteError(
                    f"{self.label}: it has no parameter `{name}`{suggest(name, self.parameters)}\n"
                    f"    Parameters: {', '.join(self.parameters) or 'none'}."
                )


def _names(function: Callable) -> list[str]:
    given = inspect.signature(function).parameters.values()
    return [each.name for each in given if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


class Overrides:
    """Arguments of a call that are taken from the model's own call instead: a `fix`, which may change the result."""

    def __init__(self, sources: Mapping[str, str], parameters: Sequence[str]) -> None:
        self.sources = {name: source.removeprefix("model.") for name, source in sources.items()}
        self.parameters = parameters

    def __repr__(self) -> str:
        return f"<Overrides {self.sources}>"

    def apply(self, frame: scope.Frame, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Return the arguments with the overrides in them; those that the model was not given are left."""
        args, kwargs = list(args), dict(kwargs)
        for name, source in self.sources.items():
            value = frame.argument(source)
            if value is None:
                continue  # nothing to override with
            if name in self.parameters[: len(args)]:
                args[self.parameters.index(name)] = value
            else:
                kwargs[name] = value
        return tuple(args), kwargs
