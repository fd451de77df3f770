"""A site of a spec on one attribute of one model: what happens when that attribute is called.

It turns a call into a key (arguments, the forward around it, the owner's weights, the ambient state) and asks the
site's `Memo`; or calls the replacement that the spec names with `use:`; or, for `unused: true`, hands out a stand-in.
Knows nothing about where the attribute was found, nor about the other sites.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch

from . import scope, wrapped
from .cache import Budget, map_tensors
from .errors import SiteError, suggest
from .keys import Pins, Plan, Uncacheable, ambient
from .memo import Memo, same
from .scope import Frame
from .spec import Site
from .state import State


class Patch:
    """A live site on `owner.name`, for the forwards of `model`.

    Args:
        site: what the spec says.
        owner: the module, or Python module, that holds the attribute.
        reads: modules whose weights the site's tensor arguments were computed with.
        where: `diffusers/wan: rope.forward (specs/diffusers/wan.yaml:6)`, for messages.
        replacement: the function that `use:` names, if its original is the one it was written for.
        fixes: whether `bind:` is on.

    Raises:
        SiteError: where the spec names an argument that the attribute or the model's forward does not have.
    """

    def __init__(
        self,
        site: Site,
        model: torch.nn.Module,
        owner: Any,
        name: str,
        *,
        reads: list[torch.nn.Module],
        where: str,
        budget: Budget,
        check: str,
        replacement: Callable | None = None,
        fixes: bool = False,
    ) -> None:
        self.site, self.model, self.owner, self.name, self.where = site, model, owner, name, where
        self.memo = Memo(where, budget, check)
        self.replacement = replacement
        self.parameters, anything = _parameters(wrapped.innermost(owner, name))
        _check_names(site, self.parameters, anything, scope.parameters(model), where)
        self.plan = Plan(self.parameters, site.key, where)
        self._everything = Plan(self.parameters, {}, where, default=("shape", "dtype", "device"))
        self._everywhere = not isinstance(owner, torch.nn.Module)
        self._state = None if self._everywhere else State([owner, *reads], model, subtree=owner is not model)
        self._epoch = 0
        self._unused = site.unused
        self._unkeyed = replacement is not None and not site.key
        self._bound = dict(site.bind) if fixes else {}
        self._proven: set[Hashable] = set()
        self._stand_ins: dict[torch.device | None, Any] = {}
        self._cleared: dict[str, Any] = {}
        self._layer: wrapped.Wrapped | None = None

    def install(self) -> None:
        """Wrap the attribute, or wrap it again where another library has dropped the layer."""
        if self._layer is not None and wrapped.installed(self._layer):
            return
        if self._layer is not None:
            wrapped.remove(self._layer)
        for attribute in self.site.clears:
            if getattr(self.owner, attribute, None) is not None:
                self._cleared[attribute] = getattr(self.owner, attribute)
                setattr(self.owner, attribute, None)
        self._layer = wrapped.install(self.owner, self.name, self)

    def remove(self) -> bool:
        """Take the layer away; False if it has to sleep inside another library's wrapper until that goes."""
        self.memo.cache.clear()
        self._stand_ins = {}
        for attribute, value in self._cleared.items():
            setattr(self.owner, attribute, value)
        self._cleared = {}
        return self._layer is None or wrapped.remove(self._layer)

    def clear(self) -> None:
        self.memo.cache.clear()
        self._stand_ins = {}
        if self._state is not None:
            self._state.forget()

    @property
    def displaced(self) -> bool:
        """Whether another library has taken the layer out of the way of the calls."""
        return self._layer is None or not wrapped.installed(self._layer)

    def __call__(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        frame = scope.current()
        ordinal = 0
        if frame is not None and frame.model is self.model:
            ordinal = frame.calls.get(self, 0)
            frame.calls[self] = ordinal + 1
            if self._bound:
                args, kwargs = self._bind(frame, args, kwargs)
        elif self._everywhere:
            return original(*args, **kwargs)
        else:
            frame = None
        memo = self.memo
        if memo.off is not None:
            return original(*args, **kwargs)
        try:
            around = ambient()
            if self._unused:
                return self._stand_in(original, args, kwargs, frame)
            if self._unkeyed:
                return self.place(self.replace(original, args, kwargs), frame)
            key = self._key(around, ordinal, args, kwargs, frame)
        except Uncacheable as reason:
            memo.bypass(str(reason))
            return original(*args, **kwargs)
        entry = memo.ready(key)
        if entry is not None:
            return entry.fresh()
        return memo.recall(key, _Call(self, original, args, kwargs, frame))

    def _key(self, around: Hashable, ordinal: int, args: tuple, kwargs: dict, frame: Frame | None) -> Hashable:
        epoch = 0
        if self._state is not None:
            epoch = self._state.epoch()
            if epoch != self._epoch:
                self.memo.cache.clear()
                self._epoch = epoch
        if self.plan.borrowed:
            if frame is None:
                raise Uncacheable("called outside the model's forward")
            # What a call borrows from the model's forward does not tell two calls within one forward apart.
            return (epoch, around, ordinal, *self.plan.parts(args, kwargs, frame))
        return (epoch, around, *self.plan.parts(args, kwargs, frame))

    def _bind(self, frame: Frame, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        args, kwargs = list(args), dict(kwargs)
        for name, source in self._bound.items():
            value = frame.argument(source.removeprefix("model."))
            if value is None:
                continue  # nothing to override with
            if name in self.parameters[: len(args)]:
                args[self.parameters.index(name)] = value
            else:
                kwargs[name] = value
        return tuple(args), kwargs

    def _stand_in(self, original: Callable, args: tuple, kwargs: dict, frame: Frame | None) -> Any:
        """In place of a result that nobody reads: NaN in its shape, without memory, so that a reader would show."""
        device = frame.device if frame is not None and self.site.device else None
        if device not in self._stand_ins:
            self.memo.cache.misses += 1
            with torch.inference_mode(False), torch.no_grad():
                result = original(*args, **kwargs)
            self._stand_ins[device] = map_tensors(lambda tensor: _unreadable(tensor, device), result)
        else:
            self.memo.cache.hits += 1
        return map_tensors(lambda tensor: tensor, self._stand_ins[device])

    def place(self, value: Any, frame: Frame | None) -> Any:
        """`value` where and as the spec wants it, so that the caller's own `.to()` has nothing left to do."""
        device = frame.device if frame is not None and self.site.device else None
        dtype = getattr(torch, self.site.dtype) if self.site.dtype else None
        if device is None and dtype is None:
            return value
        return map_tensors(lambda tensor: tensor.to(device=device, dtype=dtype), value)

    def replace(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        """The replacement's result, held to the original bit for bit at the first sight of each signature."""
        result = self.replacement(original, self.owner, args, kwargs)
        if self.memo.check == "never":
            return result
        signature = self.signature(args, kwargs)
        if signature not in self._proven or self.memo.check == "always":
            expected = original(*args, **kwargs)
            if not same(expected, result):
                self.replacement, self._unkeyed = None, False
                self.memo.warn(f"{self.site.use} is not equal to the original here; the original is used")
                if not self.site.key:
                    self.memo.off = "its replacement is not equal to the original"
                return expected
            self._proven.add(signature)
        return result

    def signature(self, args: tuple, kwargs: dict) -> Hashable:
        return tuple(self._everything.parts(args, kwargs, None))


class _Call:
    """One call of a patched attribute, as `Memo` asks about it."""

    __slots__ = ("args", "frame", "kwargs", "original", "patch")

    def __init__(self, patch: Patch, original: Callable, args: tuple, kwargs: dict, frame: Frame | None) -> None:
        self.patch, self.original, self.args, self.kwargs, self.frame = patch, original, args, kwargs, frame

    def compute(self) -> Any:
        patch = self.patch
        if patch.replacement is not None:
            return patch.place(patch.replace(self.original, self.args, self.kwargs), self.frame)
        return patch.place(self.original(*self.args, **self.kwargs), self.frame)

    def pins(self) -> Pins:
        pins = Pins()
        self.patch.plan.parts(self.args, self.kwargs, self.frame, pins)
        return pins

    def signature(self) -> Hashable:
        return self.patch.signature(self.args, self.kwargs)

    def sources(self) -> list[torch.Tensor]:
        given = [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, torch.Tensor)]
        state = self.patch._state
        return given if state is None else given + state.tensors()

    def stored(self) -> list[torch.Tensor]:
        return []


def _parameters(function: Callable) -> tuple[list[str], bool]:
    """Names of the parameters that can be given by position or name, in order, and whether any other name is taken."""
    parameters = inspect.signature(function).parameters.values()
    names = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    return names, any(each.kind is each.VAR_KEYWORD for each in parameters)


def _check_names(site: Site, own: list[str], anything: bool, model: list[str], where: str) -> None:
    for name in [*site.key, *site.bind, *site.bind.values()]:
        of_model, word = name.startswith("model."), name.removeprefix("model.")
        known = model if of_model else own
        if word not in known and (of_model or not anything):
            raise SiteError(
                f"{where}: {'the model' if of_model else 'it'} has no parameter `{word}`{suggest(word, known)}\n"
                f"    Parameters: {', '.join(known) or 'none'}."
            )


def _unreadable(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    special = tensor.is_floating_point() or tensor.is_complex()
    scalar = torch.full((), float("nan") if special else 0, dtype=tensor.dtype, device=device or tensor.device)
    return scalar.expand(tensor.shape)
