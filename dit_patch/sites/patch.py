"""A patch: what may be asked of any, and what those of an attribute share (a layer, and results that it displaces)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch

from ..memo.guards import PlaceGuard, find_path
from ..memo.lookup import Memo
from ..spec.model import Site
from .binding import Attribute, Binding, Overrides
from .layers import Placement
from .scope import Frame
from .shared import SharedPlacement


class Patch(Protocol):
    """A site at work on one model: on an attribute, or between two submodules (a span)."""

    site: Site
    #: The site with its spec and the place in it, for messages.
    label: str
    #: Results and counters.
    memo: Memo
    #: Whether `on_forward_start` has to be called.
    watches_forwards: bool
    #: Whether it changes the state of the interpreter during a forward, which an interrupt would leave changed.
    leaves_modes: bool

    def install(self) -> None:
        """Begin to work, or begin again where another library has been in the way."""

    def remove(self) -> bool:
        """End; False if a layer has to sleep inside another library's wrapper until that goes."""

    def clear(self) -> None:
        """Forget every result, and what was known of what they depend on."""

    def on_forward_start(self, frame: Frame) -> None:
        """Prepare for a forward of the model."""

    @property
    def is_displaced(self) -> bool:
        """Whether another library has taken it out of the way of the calls."""

    @property
    def is_replaced(self) -> bool:
        """Whether another module stands in the place of the one that it is on."""

    @property
    def fixes(self) -> bool:
        """Whether arguments are taken from the model's own call, which may change the result."""


class AttributePatch:
    """The part of a patch that wraps an attribute. Subclasses say what a call gives, as wrapt's wrappers do.

    Raises:
        SiteError: the spec names an argument that the attribute or the model's forward does not have.
    """

    leaves_modes = False

    def __init__(self, binding: Binding, attribute: Attribute) -> None:
        attribute.check_names(binding)
        self.attribute, self.model = attribute, binding.model
        self.site, self.label = attribute.site, attribute.label
        self.memo = Memo(attribute.label, binding.budget, binding.check)
        #: Arguments that the model's own call overrides; None where there are none.
        self.overrides = Overrides(self.site.bind, attribute.parameters) if binding.fixes and self.site.bind else None
        self._leftovers = Leftovers(attribute.leftovers)
        self._place = PlaceGuard(self._path())

    def __repr__(self) -> str:
        cache = self.memo.cache
        return f"<{type(self).__name__} {self.site.at}: {cache.hits} hits, {cache.misses} misses>"

    def __call__(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError

    @cached_property
    def _placement(self) -> Placement | SharedPlacement:
        owner, name = self.attribute.owner, self.attribute.name
        if self.attribute.is_global:
            return SharedPlacement(owner, name, self.target, self.model)
        return Placement(owner, name, self.target)

    @property
    def target(self) -> Callable:
        """What the layer calls."""
        return self

    def install(self) -> None:
        """Wrap the attribute, or wrap it again where another library has dropped the layer."""
        if self._placement.is_displaced:
            self._leftovers.take()
            self._placement.install()

    def remove(self) -> bool:
        """Take the layer away; False if it has to sleep inside another library's wrapper until that goes."""
        self.clear()
        self._leftovers.put_back()
        return self._placement.remove()

    def clear(self) -> None:
        """Forget every result, and what was known of what they depend on."""
        self.memo.cache.clear()

    def on_forward_start(self, frame: Frame) -> None:
        """Have results made again that the model keeps for another device."""
        self._leftovers.follow(frame.device)

    def depends_on(self, weight: torch.Tensor) -> bool:
        """Return whether a change of this weight makes what is kept worthless."""
        return False

    @property
    def watches_forwards(self) -> bool:
        """Whether `on_forward_start` has to be called."""
        return bool(self.attribute.leftovers)

    @property
    def is_displaced(self) -> bool:
        """Whether another library has taken the layer out of the way of the calls."""
        return self._placement.is_displaced

    @property
    def is_replaced(self) -> bool:
        """Whether another module stands in the place of the one that the attribute belongs to.

        The model is searched only where something has changed along the way to it: this is asked at forwards.
        """
        if self._place.still_holds():
            return False
        path = self._path()
        if path:  # it is inside what was put there: a LoRA layer, say
            self._place = PlaceGuard(path)
        return not path

    def _path(self) -> list[tuple[dict, str]]:
        owner = self.attribute.owner
        return find_path(self.model, owner) if isinstance(owner, torch.nn.Module) else []

    @property
    def fixes(self) -> bool:
        """Whether arguments are taken from the model's own call, which may change the result."""
        return self.overrides is not None

    @property
    def may_be_captured(self) -> bool:
        """Whether results depend on nothing that a tensor holds, and so may become a part of a CUDA graph."""
        contents = any(facet in ("identity", "values") for facets in self.site.key.values() for facet in facets)
        weighted = bool(self.attribute.weights) or any(
            True for each in self.attribute.all_modules for _ in each.parameters()
        )
        return not contents and not weighted


class Leftovers:
    """Attributes in which a model keeps results of a site: cleared while the site is patched, and put back after."""

    def __init__(self, places: Sequence[tuple[Any, str]]) -> None:
        self.places = places
        self._values: list[Any] | None = None
        self._device: torch.device | None = None

    def __repr__(self) -> str:
        return f"<Leftovers {[name for _, name in self.places]}>"

    def take(self) -> None:
        """Clear the attributes; what was in them at the first time is kept."""
        if self._values is None:
            self._values = [getattr(owner, name) for owner, name in self.places]
        self._clear()

    def follow(self, device: torch.device | None) -> None:
        """Clear the attributes if the model runs on another device than before."""
        if device != self._device:
            self._device = device
            self._clear()

    def put_back(self) -> None:
        """Restore what was in the attributes."""
        for (owner, name), value in zip(self.places, self._values or ()):
            setattr(owner, name, value)
        self._values = None

    def _clear(self) -> None:
        for owner, name in self.places:
            setattr(owner, name, None)
