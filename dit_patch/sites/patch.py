"""A site of a spec on one attribute of one model: what happens when that attribute is called.

It turns a call into a key (arguments, the forward around it, the owner's weights, the ambient state) and asks the
site's `Memo`; or calls the replacement that the spec names with `use:`; or, where the result is `unused`, hands out a
stand-in; or puts the result through what `then:` names. Knows nothing about where the attribute was found, nor about
the other sites.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ..errors import SiteError, suggest
from ..findings import Finding, FindingKind, warn
from ..memo.guards import State
from ..memo.keys import Pins, Plan, Uncacheable, ambient
from ..memo.lookup import Memo, same
from ..memo.store import Budget, map_tensors
from ..spec.model import Site
from ..upstream.torch_internals import is_capturing
from . import layers, scope
from .inner_functions import Locals
from .scope import Frame
from .stand_in import stand_in


@dataclass(frozen=True)
class Means:
    """What the names in a site stand for in one model.

    `replacement` is the function of `use`, if the original is the one it was written for, and `then` that of `then`;
    `modules`, `weights` and `values` are the submodules, parameters and functions of `reads`; `leftovers` the (owner,
    attribute) of `clears`; `parameters` the names of the model's arguments, `open_ended` whether it takes others by
    keyword.
    """

    parameters: Sequence[str]
    open_ended: bool = False
    replacement: Callable | None = None
    then: Callable | None = None
    modules: Sequence[torch.nn.Module] = ()
    weights: Sequence[tuple[dict, str]] = ()
    values: Sequence[Callable[[], Any]] = ()
    leftovers: Sequence[tuple[Any, str]] = ()


class Patch:
    """A live site on `owner.name`, for the forwards of `model`.

    Args:
        site: what the spec says.
        owner: the module, Python module, stage of a pipeline or function that holds the attribute.
        means: what the site's names stand for here.
        where: `diffusers/wan: rope.forward (specs/diffusers/wan.yaml:6)`, for messages.
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
        means: Means,
        *,
        where: str,
        budget: Budget,
        check: str,
        fixes: bool = False,
    ) -> None:
        self.site, self.model, self.owner, self.name, self.where = site, model, owner, name, where
        self.memo = Memo(where, budget, check)
        self.replacement, self.then = means.replacement, means.then
        self.parameters, anything = _parameters(layers.innermost(owner, name))
        _check_names(site, self.parameters, anything, means, where)
        self.plan = Plan(self.parameters, site.key, where)
        self._everything = Plan(self.parameters, {}, where, default=("shape", "dtype", "device", "stride"))
        self._everywhere = isinstance(owner, (ModuleType, Locals))
        modules = [*([owner] if isinstance(owner, torch.nn.Module) else []), *means.modules]
        self._state = None
        if modules or means.weights:
            self._state = State(modules, model, subtree=owner is not model, parameters=means.weights)
        self._values = tuple(means.values)
        self._epoch = 0
        self._unused = site.unused
        self._unread = self._nobody_reads if site.unused or site.unused_with else None
        self._unused_with = tuple(name.removeprefix("model.") for name in site.unused_with)
        contents = any(facet in ("identity", "values") for facets in site.key.values() for facet in facets)
        weighted = bool(means.weights) or any(True for module in modules for _ in module.parameters())
        self._constant = not contents and not weighted
        self._moves = site.device is not None
        self._dtype = getattr(torch, site.dtype) if site.dtype else None
        self._unkeyed = means.replacement is not None and not site.key
        self._bound = dict(site.bind) if fixes else {}
        self._proven: set[Hashable] = set()
        self._stand_ins: dict[torch.device | None, Any] = {}
        self._leftovers = means.leftovers
        self._cleared: list[Any] | None = None
        self._layer: layers.Wrapped | None = None
        self._end: weakref.finalize | None = None

    def install(self) -> None:
        """Wrap the attribute, or wrap it again where another library has dropped the layer."""
        if self._layer is not None and layers.installed(self._layer):
            return
        if self._layer is not None:
            layers.remove(self._layer)
        if self._cleared is None:
            self._cleared = [getattr(owner, attribute) for owner, attribute in self._leftovers]
        self.moved()
        if not self._everywhere:
            self._layer = layers.install(self.owner, self.name, self)
            return
        # A global outlives the model, which must not live on in it.
        self._layer = layers.install(self.owner, self.name, _Weakly(self))
        self._end = layers.remove_when_freed(self, self._layer)

    def moved(self) -> None:
        """Have the model make again what it keeps in attributes: it runs on another device from now on."""
        for owner, attribute in self._leftovers:
            setattr(owner, attribute, None)

    def remove(self) -> bool:
        """Take the layer away; False if it has to sleep inside another library's wrapper until that goes."""
        self.memo.cache.clear()
        self._stand_ins = {}
        for (owner, attribute), value in zip(self._leftovers, self._cleared or ()):
            setattr(owner, attribute, value)
        self._cleared = None
        if self._end is not None:
            self._end.detach()
        return self._layer is None or layers.remove(self._layer)

    def clear(self) -> None:
        self.memo.cache.clear()
        self._stand_ins = {}
        if self._state is not None:
            self._state.forget()

    @property
    def displaced(self) -> bool:
        """Whether another library has taken the layer out of the way of the calls."""
        return self._layer is None or not layers.installed(self._layer)

    @property
    def fixes(self) -> bool:
        """Whether arguments are taken from the model's own call, which may change the result."""
        return bool(self._bound)

    @property
    def leaves_something(self) -> bool:
        """Whether the model keeps results of this site in attributes of its own."""
        return bool(self._leftovers)

    def counts(self, weight: torch.Tensor) -> bool:
        """Whether a change of this weight makes what is kept worthless."""
        return self._state is not None and any(weight is each for each in self._state.tensors())

    def __call__(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        frame = scope.current()
        if self.then is not None:
            return self._put_through(original(*args, **kwargs), frame)
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
            around = ambient(self._constant)
            if around is not None and is_capturing():
                return self._in_capture(around, ordinal, original, args, kwargs, frame)
            if self._unread is not None and self._unread(frame):
                return self._stand_in(original, args, kwargs, frame)
            if self._unkeyed:
                result = self.place(self.replace(original, args, kwargs), frame)
                memo.cache.hits += memo.off is None
                return result
            key = self._key(around, ordinal, args, kwargs, frame)
        except Uncacheable as reason:
            memo.bypass(str(reason))
            return original(*args, **kwargs)
        entry = memo.ready(key)
        if entry is not None:
            return entry.fresh()
        return memo.recall(key, _Call(self, original, args, kwargs, frame))

    def _in_capture(
        self, around: Hashable, ordinal: int, original: Callable, args: tuple, kwargs: dict, frame: Frame | None
    ) -> Any:
        """What is there already, or the original's result: a CUDA graph must not hold what is meant for later calls."""
        if self._unread is not None and self._unread(frame):
            made = self._stand_ins.get(self._target(frame))
            if made is not None:
                return made
        elif self._unkeyed:
            if self.memo.check == "never" or self.signature(args, kwargs) in self._proven:
                return self.replacement(original, self.owner, args, kwargs)
        elif (entry := self.memo.found(self._key(around, ordinal, args, kwargs, frame))) is not None:
            return entry.fresh()
        return original(*args, **kwargs)

    def _key(self, around: Hashable, ordinal: int, args: tuple, kwargs: dict, frame: Frame | None) -> Hashable:
        epoch = 0
        if self._state is not None:
            epoch = self._state.epoch()
            if epoch != self._epoch:
                self.memo.cache.clear()
                self._epoch = epoch
        borrowed = self.plan.borrowed
        if borrowed and frame is None:
            raise Uncacheable("called outside the model's forward")
        parts = self.plan.parts(args, kwargs, frame)
        if self._moves:
            parts.append(self._target(frame))
        if self._values:
            parts += [read() for read in self._values]
        # What a call borrows from the model's forward does not tell two calls within one forward apart.
        return (epoch, around, ordinal, *parts) if borrowed else (epoch, around, *parts)

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

    def _nobody_reads(self, frame: Frame | None) -> bool:
        """Whether the result is for nobody: in any forward, or in this one, which got all of `unused_with`."""
        if frame is None or frame.nameless and self._unused_with:
            return False
        given = [frame.argument(name) for name in self._unused_with]
        return (
            self._unused
            or bool(given)
            and all(
                value is not None and not (isinstance(value, (list, tuple)) and any(item is None for item in value))
                for value in given
            )
        )

    def _stand_in(self, original: Callable, args: tuple, kwargs: dict, frame: Frame | None) -> Any:
        """In place of a result that nobody reads: one that would show if somebody did."""
        device = self._target(frame)
        if device not in self._stand_ins:
            self.memo.cache.miss()
            result = self.memo.timed(lambda: original(*args, **kwargs))
            self._stand_ins[device] = stand_in(result, device, self._dtype)
        else:
            self.memo.cache.hits += 1
        return map_tensors(lambda tensor: tensor, self._stand_ins[device])

    def _put_through(self, result: Any, frame: Frame | None) -> Any:
        self.memo.cache.hits += 1
        if frame is not None:
            frame.calls[self] = 1
        return self.then(result)

    def _target(self, frame: Frame | None) -> torch.device | None:
        """Where the spec wants results to be; None: wherever they are made."""
        return frame.device if frame is not None and self._moves else None

    def place(self, value: Any, frame: Frame | None) -> Any:
        """`value` where and as the spec wants it, so that the caller's own `.to()` has nothing left to do."""
        device = self._target(frame)
        if device is None and self._dtype is None:
            return value
        return map_tensors(lambda tensor: tensor.to(device=device, dtype=self._dtype), value)

    def replace(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        """The replacement's result, held to the original bit for bit at the first sight of each signature.

        Where it fails at first sight (a kernel that cannot be compiled here, say), the original's.
        """
        signature = None if self.memo.check == "never" else self.signature(args, kwargs)
        known = signature in self._proven
        try:
            result = self.replacement(original, self.owner, args, kwargs)
        except (Uncacheable, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if known:
                raise
            expected = original(*args, **kwargs)
            said = (str(error) or "no message").splitlines()[0]
            self._do_without(f"failed ({type(error).__name__}: {said})")
            return expected
        if signature is None or known and self.memo.check != "always":
            return result
        expected = original(*args, **kwargs)
        if not same(expected, result):
            self._do_without("is not equal to the original here")
            return expected
        self._proven.add(signature)
        return result

    def _do_without(self, why: str) -> None:
        self.replacement, self._unkeyed = None, False
        finding = Finding(FindingKind.REPLACEMENT_FAILED, site=f"{self.where}: {self.site.use}", detail=why)
        warn(finding, stacklevel=2)
        if not self.site.key:
            self.memo.off = finding

    def signature(self, args: tuple, kwargs: dict) -> Hashable:
        return tuple(self._everything.parts(args, kwargs, None))


class _Weakly:
    """Hands calls on to a patch for as long as that is there."""

    __slots__ = ("_patch",)

    def __init__(self, patch: Patch) -> None:
        self._patch = weakref.ref(patch)

    def __call__(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        patch = self._patch()
        return original(*args, **kwargs) if patch is None else patch(original, instance, args, kwargs)


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


def _check_names(site: Site, own: list[str], anything: bool, means: Means, where: str) -> None:
    for name in [*site.key, *site.bind, *site.bind.values(), *site.unused_with]:
        of_model, word = name.startswith("model."), name.removeprefix("model.")
        known, others = (means.parameters, means.open_ended) if of_model else (own, anything)
        if word not in known and not others:
            raise SiteError(
                f"{where}: {'the model' if of_model else 'it'} has no parameter `{word}`{suggest(word, known)}\n"
                f"    Parameters: {', '.join(known) or 'none'}."
            )
