"""In a process under `dit-patch run`: every new instance of a known class is patched at its first forward.

The one thing that changes on a class is what stands around its `__init__` and `__setstate__`, through which models and
their copies come to be; on an instance it is a torch hook, which is gone after its first forwards, and of which copies
and pickles know nothing. A failure leaves the model as it is, and is said.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import wrapt

from ..errors import UnsupportedModelError
from ..handle import apply, handle_of
from ..report.journal import NEVER_CALLED, PATCHED, journal
from ..sites import layers
from ..sites.pipeline_models import find_models
from ..sites.scope import Hook, forget_copies, scope_of
from ..upstream.torch_internals import forward_pre_hooks, is_capturing, tracing_state
from .find_pipeline import pipeline_of
from .flags import Choice
from .folder import STRICT

record_in = journal.record_in

_watched: set[type] = set()
_lock = threading.RLock()


def watch(cls: type) -> None:
    """From now on patch each new instance of the class, or of a class that inherits from it, at its first forward."""
    if cls in _watched:
        return
    _watched.add(cls)
    for name, made in (("__init__", _made), ("__setstate__", _copied)):
        function = inspect.getattr_static(cls, name)
        setattr(cls, name, wrapt.FunctionWrapper(function, functools.partial(made, cls)))


def _made(cls: type, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
    result = original(*args, **kwargs)
    _prepare(cls, instance)
    return result


def _copied(cls: type, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
    result = original(*args, **kwargs)
    if isinstance(instance, torch.nn.Module):
        forget_copies(instance)
        for name in ("forward", "cache_context"):  # copy.copy takes what is on the original as it is
            layer = vars(instance).get(name)
            if type(layer) is layers.Wrapped and isinstance(layer.installer, First):
                delattr(instance, name)
    _prepare(cls, instance)
    return result


def _prepare(cls: type, model: Any) -> None:
    outermost = next((each for each in type(model).__mro__ if each in _watched), None)
    if cls is not outermost or not isinstance(model, torch.nn.Module):
        return
    waiting = (hook.owner for hook in forward_pre_hooks(model).values() if isinstance(hook, Hook))
    if any(isinstance(each, First) and each.is_of(model) for each in waiting):
        return
    try:
        First(model)
    except Exception as error:
        _failed(_name(model), error)


class First:
    """Waits for the first forward of one model, which it does not hold.

    A step cache has to stand around that forward, too: only for it something is put on `forward` beforehand, and on
    `cache_context`, in which the first pass is named.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._choice = Choice.of_environment(os.environ)
        self._settled = self._joined = False
        self._layers: list[layers.Wrapped] = []
        self._pass: str | None = None
        self._steppings: list[Any] = []
        self._hook = model.register_forward_pre_hook(Hook(self.begins, self), with_kwargs=True)
        if self._choice.options["step_cache"] is not None:
            self._layers.append(layers.install(model, "forward", self._through, self))
            if callable(getattr(model, "cache_context", None)):
                self._layers.append(layers.install(model, "cache_context", self._named, self))
        journal.note(_name(model), NEVER_CALLED)

    def is_of(self, model: torch.nn.Module) -> bool:
        return self._model() is model

    def begins(self, model: torch.nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        """Torch's hook before a forward."""
        if kwargs is None or not self.is_of(model) or _recording():  # a shallow copy has the hooks of its original
            return
        if self._settled:
            self._hook.remove()
            return
        with _lock:
            if not self._settled:
                self._settled = True
                self._joined = self._patch(model)
        scope = scope_of(model)
        if self._joined and scope is not None:
            # Its own hook comes too late for this forward; the one that ends it does not.
            scope.enter(model, args, kwargs)

    def _patch(self, model: torch.nn.Module) -> bool:
        """Patch it, with the pipeline that it is in; whether that was done just now."""
        name = _name(model)
        if scope_of(model) is not None:
            ours = handle_of(model).automatic
            journal.note(name, PATCHED if ours else "patched by the program itself", NEVER_CALLED)
            return False
        try:
            handle = apply(_target(model), **self._choice.options)
        except UnsupportedModelError as error:
            if not self._choice.options["only"]:
                self._failed(name, error)
            else:
                journal.note(name, "left alone: not of the specs that were chosen", NEVER_CALLED)
            return False
        except Exception as error:
            self._failed(name, error)
            return False
        handle.automatic = True
        journal.note(name, PATCHED, NEVER_CALLED)
        journal.keep(handle, refreshing=True)
        if self._layers:
            self._steppings = handle.step_caches
            for stepping in self._steppings:
                stepping.join(self._pass if stepping.model is model else None)
        return True

    def _failed(self, name: str, error: Exception) -> None:
        journal.note(name, "left as it was", NEVER_CALLED)
        _failed(name, error)

    def _through(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Around `forward`, until what was installed since is there too."""
        model = self._model()
        if not self._settled or model is None:
            return original(*args, **kwargs)
        on_top = layers.remove(self._layers[0]) and self._joined
        # Where the model had been patched before this forward, what was installed is above, and calls us.
        return (layers.innermost(model, "forward") if on_top else original)(*args, **kwargs)

    def _named(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        return self._passing(original(*args, **kwargs), kwargs.get("name", args[0] if args else None))

    @contextmanager
    def _passing(self, theirs: Any, name: str | None) -> Iterator[Any]:
        self._pass = name
        try:
            with theirs as value:
                yield value
        finally:
            self._pass = None
            if self._settled:
                layers.remove(self._layers[1])
                for stepping in self._steppings:
                    stepping.left()
                self._steppings = []


def _target(model: torch.nn.Module) -> Any:
    """The pipeline that runs the model; or the model, where there is none, or where others have patched some of it."""
    pipeline = pipeline_of(model)
    if pipeline is None:
        return model
    parts = find_models(pipeline).values()
    return model if any(scope_of(each) is not None for part in parts for each in part.modules()) else pipeline


def _failed(name: str, error: Exception) -> None:
    if os.environ.get(STRICT):
        journal.failed(name, f"{type(error).__name__}: {error}")
        raise error
    message = f"{type(error).__name__}: {error}"
    if not any(message == known for _, known in journal.failures):
        print(f"dit_patch: {name} is not patched, and runs as it is: {message}", file=sys.stderr, flush=True)
    journal.failed(name, message)


def _name(model: torch.nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _recording() -> bool:
    """Whether what runs is being recorded: the next forward will do."""
    return tracing_state() is not None or is_capturing()
