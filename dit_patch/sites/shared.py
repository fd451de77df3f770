"""One layer on a function that all models share: each call goes to the site of the model whose forward runs.

However many models are patched, a call finds its site in one look, and nobody goes through the sites of others.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import layers, scope

_lock = threading.RLock()


class Switch:
    """Hands a call on to the sites of the model whose forward runs; outside of their forwards, to the original.

    It holds no site, and so no model.
    """

    def __init__(self) -> None:
        #: Weak references to what answers the calls of each model, by the model's id: its site keeps it alive.
        self.sites: dict[int, tuple[weakref.ref, ...]] = {}

    def __repr__(self) -> str:
        return f"<Switch between {len(self.sites)} models>"

    def __call__(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        frame = scope.current()
        sites = () if frame is None else self.sites.get(id(frame.model), ())
        for reference in sites:
            site = reference()
            if site is not None:
                if reference is sites[-1]:
                    return site(original, instance, args, kwargs)
                original = partial(_call, site, original)
        return original(*args, **kwargs)

    def add(self, model: torch.nn.Module, site: Callable) -> None:
        """Hand calls in forwards of the model on to `site`."""
        with _lock:
            self.sites[id(model)] = (*self.sites.get(id(model), ()), weakref.ref(site))

    def drop(self, model_id: int, site: weakref.ref | None) -> None:
        """Hand no more calls on to the site, or to one that is gone."""
        with _lock:
            kept = [each for each in self.sites.get(model_id, ()) if each() is not None and each() is not site]
            self.sites[model_id] = tuple(kept)
            if not kept:
                del self.sites[model_id]

    def has(self, model: torch.nn.Module, site: Callable) -> bool:
        """Return whether calls in forwards of the model are handed on to `site`."""
        return any(each() is site for each in self.sites.get(id(model), ()))


class SharedPlacement:
    """Keeps a site in the one layer on a function that all models share; the first brings it, the last takes it away.

    Args:
        site: what answers the calls of `model`; when it is freed, its place goes with it.
    """

    def __init__(self, owner: Any, name: str, site: Callable, model: torch.nn.Module) -> None:
        self.owner, self.name = owner, name
        self._site, self._model = weakref.ref(site), weakref.ref(model)
        self._model_id = id(model)
        #: The layer that the site is in; it may be gone.
        self.layer: layers.Wrapped | None = None
        self._finalizer: weakref.finalize | None = None

    def __repr__(self) -> str:
        return f"<SharedPlacement of {self.name} in {self.owner!r}>"

    @property
    def is_displaced(self) -> bool:
        """Whether no layer with the site is in the way of the calls."""
        layer = self.layer
        return layer is None or not layer.installer.has(self._model(), self._site()) or not layers.installed(layer)

    def install(self) -> None:
        """Have the layer that is there hand calls on to the site; put one there if there is none."""
        with _lock:
            self.remove()
            on_top = layers.layers_on(self.owner, self.name)
            self.layer = next((each for each in on_top if isinstance(each.installer, Switch)), None)
            if self.layer is None:
                switch = Switch()
                self.layer = layers.install(self.owner, self.name, switch, switch)
            self.layer.installer.add(self._model(), self._site())
            self._finalizer = weakref.finalize(self._site(), _leave, self.layer, self._model_id)
            self._finalizer.atexit = False

    def remove(self) -> bool:
        """Take the site out, and the layer if it was the last; False if that has to sleep inside another's wrapper."""
        with _lock:
            if self.layer is None:
                return True
            if self._finalizer is not None:
                self._finalizer.detach()
            switch = self.layer.installer
            switch.drop(self._model_id, self._site())
            return True if switch.sites else layers.remove(self.layer)


def _call(site: Callable, original: Callable, *args: Any, **kwargs: Any) -> Any:
    return site(original, None, args, kwargs)


def _leave(layer: layers.Wrapped, model_id: int) -> None:
    """Take a freed site out of a layer, and the layer if it was the last."""
    with _lock:
        layer.installer.drop(model_id, None)
        if not layer.installer.sites:
            layers.remove_unless_compiling(layer)
