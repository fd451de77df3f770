"""In a process under `dit-patch run`: patch every new instance of a watched class at its first forward.

On a class only `__init__` and `__setstate__` are wrapped, through which models and their copies are made. An instance
gets a torch hook, which is removed after its first forwards; copies and pickles do not have it. A model that cannot be
patched runs as it is, and the failure is reported.
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
from ..handle import apply, own_handle
from ..report.document import NEVER_CALLED, PATCHED
from ..report.journal import journal
from ..sites import layers
from ..sites.pipeline_models import find_models
from ..sites.scope import Hook, forget_copies, scope_of
from ..upstream.torch_internals import forward_pre_hooks, is_capturing, tracing_state
from .find_pipeline import pipeline_of
from .flags import Choice
from .run_folder import STRICT

_watched_classes: set[type] = set()
_patching = threading.RLock()  # held while a model is patched, so that threads which share it patch it once


def watch(cls: type) -> None:
    """Patch each new instance of the class, or of a class that inherits from it, at its first forward."""
    if cls in _watched_classes:
        return
    _watched_classes.add(cls)
    for name, wrapper in (("__init__", _on_init), ("__setstate__", _on_copy)):
        function = inspect.getattr_static(cls, name)
        setattr(cls, name, wrapt.FunctionWrapper(function, functools.partial(wrapper, cls)))


def _on_init(cls: type, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
    result = original(*args, **kwargs)
    _prepare(cls, instance)
    return result


def _on_copy(cls: type, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
    result = original(*args, **kwargs)
    if isinstance(instance, torch.nn.Module):
        forget_copies(instance)
        for name in ("forward", "cache_context"):  # copy.copy takes what is on the original as it is
            layer = vars(instance).get(name)
            if type(layer) is layers.Wrapped and isinstance(layer.installer, FirstForward):
                delattr(instance, name)
    _prepare(cls, instance)
    return result


def _prepare(cls: type, model: Any) -> None:
    outermost = next((each for each in type(model).__mro__ if each in _watched_classes), None)
    if cls is not outermost or not isinstance(model, torch.nn.Module):
        return
    owners = (hook.owner for hook in forward_pre_hooks(model).values() if isinstance(hook, Hook))
    if any(isinstance(owner, FirstForward) and owner.waits_for(model) for owner in owners):
        return
    try:
        FirstForward(model)
    except Exception as error:
        _report_failure(_name(model), error)


class FirstForward:
    """Waits for the first forward of one model, which it references weakly, and patches it then.

    A step cache has to wrap that forward, too. For it alone `forward` is wrapped beforehand, and `cache_context`, which
    names the CFG pass of the first forward.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._choice = Choice.from_environment(os.environ)
        self._is_decided = self._was_patched = False
        self._layers: list[layers.Wrapped] = []
        self._pass_name: str | None = None
        self._step_caches: list[Any] = []
        self._hook = model.register_forward_pre_hook(Hook(self.before_forward, self), with_kwargs=True)
        if self._choice.options["step_cache"] is not None:
            self._layers.append(layers.install(model, "forward", self._wrap_forward, self))
            if callable(getattr(model, "cache_context", None)):
                self._layers.append(layers.install(model, "cache_context", self._wrap_cache_context, self))
        journal.count_model(_name(model), NEVER_CALLED)

    def waits_for(self, model: torch.nn.Module) -> bool:
        """Return whether `model` is the one this object was made for: a shallow copy shares its hooks."""
        return self._model() is model

    def __repr__(self) -> str:
        model = self._model()
        state = "done" if self._is_decided else "waiting"
        return f"<FirstForward of {'a model that is gone' if model is None else type(model).__name__}, {state}>"

    def before_forward(self, model: torch.nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        """Patch the model, unless it was decided before. Torch calls this before each forward."""
        if kwargs is None or not self.waits_for(model) or _is_recording():
            return
        if self._is_decided:
            self._hook.remove()
            return
        with _patching:
            if not self._is_decided:
                self._is_decided = True
                self._was_patched = self._patch(model)
        scope = scope_of(model)
        if self._was_patched and scope is not None:
            # Its own hook comes too late for this forward; the one that ends it does not.
            scope.enter(model, args, kwargs)

    def _patch(self, model: torch.nn.Module) -> bool:
        """Patch the model with the pipeline that runs it; return whether that was done now."""
        name = _name(model)
        if scope_of(model) is not None:
            ours = own_handle(model).is_automatic
            journal.count_model(name, PATCHED if ours else "patched by the program itself", NEVER_CALLED)
            return False
        try:
            handle = apply(_target(model), **self._choice.options)
        except UnsupportedModelError as error:
            if not self._choice.options["only"]:
                self._leave_alone(name, error)
            else:
                journal.count_model(name, "left alone: not of the specs that were chosen", NEVER_CALLED)
            return False
        except Exception as error:
            self._leave_alone(name, error)
            return False
        handle.is_automatic = True
        journal.count_model(name, PATCHED, NEVER_CALLED)
        journal.keep(handle, refreshing=True)
        if self._layers:
            self._step_caches = handle.step_caches
            for step_cache in self._step_caches:
                step_cache.join(self._pass_name if step_cache.model is model else None)
        return True

    def _leave_alone(self, name: str, error: Exception) -> None:
        journal.count_model(name, "left as it was", NEVER_CALLED)
        _report_failure(name, error)

    def _wrap_forward(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Run the first forward through the step cache that `before_forward` has installed meanwhile."""
        model = self._model()
        if not self._is_decided or model is None:
            return original(*args, **kwargs)
        on_top = layers.remove(self._layers[0]) and self._was_patched
        # A model that was patched before this forward has its step cache above this layer, which calls it.
        return (layers.innermost(model, "forward") if on_top else original)(*args, **kwargs)

    def _wrap_cache_context(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        return self._in_pass(original(*args, **kwargs), kwargs.get("name", args[0] if args else None))

    @contextmanager
    def _in_pass(self, context: Any, name: str | None) -> Iterator[Any]:
        self._pass_name = name
        try:
            with context as value:
                yield value
        finally:
            self._pass_name = None
            if self._is_decided:
                layers.remove(self._layers[1])
                for step_cache in self._step_caches:
                    step_cache.leave_pass()
                self._step_caches = []


def _target(model: torch.nn.Module) -> Any:
    """Return the pipeline that runs the model; the model itself where there is none, or where part of it is patched."""
    pipeline = pipeline_of(model)
    if pipeline is None:
        return model
    modules = (module for each in find_models(pipeline).values() for module in each.modules())
    return model if any(scope_of(module) is not None for module in modules) else pipeline


def _report_failure(name: str, error: Exception) -> None:
    """Record and print that the model is not patched; with `--strict` raise `error` again."""
    if os.environ.get(STRICT):
        journal.add_failure(name, f"{type(error).__name__}: {error}")
        raise error
    message = f"{type(error).__name__}: {error}"
    if not any(message == earlier for _, earlier in journal.failures):
        print(f"dit_patch: {name} is not patched, and runs as it is: {message}", file=sys.stderr, flush=True)
    journal.add_failure(name, message)


def _name(model: torch.nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _is_recording() -> bool:
    """Return whether torch is tracing or capturing a graph: then a later forward will do."""
    return tracing_state() is not None or is_capturing()
