"""One attribute, wrapped and unwrapped: in any order, invisible to compilers, copies and pickles.

Knows nothing about models, specs or caches. A plain `wrapt.FunctionWrapper` breaks `copy.deepcopy`, `pickle` and
`torch.compile(fullgraph=True)`, and popping the outermost wrapper removes somebody else's; `Wrapped`, `install` and
`remove` are what is needed on top of it. A `Placement` keeps a layer on one attribute.
"""

from __future__ import annotations

import copy
import functools
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import wrapt

from ..upstream import accelerate_internals, diffusers_internals
from ..upstream.torch_internals import is_compiling_anywhere

_lock = threading.RLock()
_is_compiling = torch.compiler.is_compiling
_DEEPEST = 64  # other libraries' layers may have been left in a circle


class Wrapped(wrapt.FunctionWrapper):
    """A callable with `wrapper(wrapped, instance, args, kwargs)` around it (wrapt's four arguments).

    While something is being compiled or exported, or after `remove`, it is the wrapped callable and nothing else.
    """

    def __init__(self, wrapped: Callable, wrapper: Callable, *, own: bool) -> None:
        super().__init__(wrapped, wrapper)
        #: Whether the owner held the attribute itself, rather than inheriting it from its class.
        self._self_own = own
        self._self_home: tuple[Any, str] | None = None
        # All that a call needs in one attribute, since reading one through wrapt's proxy takes its time; None: asleep.
        self._self_call: Callable | None = functools.partial(wrapper, wrapped, None)
        self._self_installer: Any = None

    @property
    def home(self) -> tuple[Any, str] | None:
        """The owner and the name of the attribute that the layer is around."""
        return self._self_home

    @property
    def installer(self) -> Any:
        """Whoever put the layer there, if they said so."""
        return self._self_installer

    @property
    def __class__(self):
        # wrapt answers with the class of the wrapped function; Dynamo then guards on a function that is not one.
        return Wrapped

    def __call__(self, *args, **kwargs):
        call = self._self_call
        if call is not None and not _is_compiling():
            return call(args, kwargs)
        if call is None and not _is_compiling():
            _settle(self)
        return self.__wrapped__(*args, **kwargs)

    def __copy__(self):
        return self.__wrapped__

    def __deepcopy__(self, memo):
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce_ex__(self, protocol):
        # Unpickles to the wrapped callable, without dit_patch being importable there.
        return operator.getitem, ((self.__wrapped__,), 0)


def install(owner: Any, name: str, wrapper: Callable, installer: Any = None) -> Wrapped:
    """Wrap the attribute `name` of `owner` (a module instance, a Python module, any object) and return the layer.

    Where accelerate or diffusers have hooked a `forward` before, the layer goes below their hooks: there it sees the
    weights where the hook has put them, and it survives the hook's removal.
    """
    with _lock:
        holder, attribute = _innermost(owner, name)
        own = holder is not owner or attribute in vars(holder)
        wrapped = Wrapped(getattr(holder, attribute), wrapper, own=own)
        wrapped._self_home, wrapped._self_installer = (owner, name), installer
        if not own:
            wrapped._self_call = functools.partial(wrapper, _inherited(owner, name), None)
        setattr(holder, attribute, wrapped)
        return wrapped


def after(action: Callable[[], Any]) -> Callable[[Callable, Any, tuple, dict], Any]:
    """Return a wrapper that calls `action` after each call, also after one that raises."""

    def wrapper(original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            action()

    return wrapper


def _inherited(owner: Any, name: str) -> Callable:
    """Return what calls the attribute that the owner's class has by then: it may be given another one later."""
    cls = type(owner)

    def original(*args: Any, **kwargs: Any) -> Any:
        found = next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
        return found.__get__(owner, cls)(*args, **kwargs)

    return original


def layers_on(owner: Any, name: str) -> Iterator[Wrapped]:
    """Yield our layers on an attribute, as far as no other library's wrapper is around them; outermost first."""
    value = vars(owner).get(name)
    while type(value) is Wrapped:
        yield value
        value = value.__wrapped__


def innermost(owner: Any, name: str) -> Callable:
    """Return what `install` would wrap: the attribute, or what a hook of accelerate or diffusers calls in its place."""
    return getattr(*_innermost(owner, name))


def installed(wrapped: Wrapped) -> bool:
    """Return whether a call of the attribute still reaches the layer, as far as can be seen from the outside."""
    owner, name = wrapped._self_home
    with _lock:
        return _find(owner, name, wrapped) is not None or _hidden(wrapped)


def remove(wrapped: Wrapped) -> bool:
    """Undo `install`; return False if another library holds the layer inside a wrapper of its own, where it sleeps.

    A sleeping layer passes every call through, and takes itself away at the first call that finds it on top again.
    """
    with _lock:
        wrapped._self_call = None
        return _settle(wrapped) or not _hidden(wrapped)


class Placement:
    """Keeps a layer on the attribute `name` of `owner`, and puts it back where another library has dropped it."""

    def __init__(self, owner: Any, name: str, wrapper: Callable) -> None:
        self.owner, self.name, self.wrapper = owner, name, wrapper
        #: The layer that was installed last; it may be gone.
        self.layer: Wrapped | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.name} on a {type(self.owner).__name__}>"

    @property
    def is_displaced(self) -> bool:
        """Whether no layer is in the way of the calls: there was none, or another library has taken it away."""
        return self.layer is None or not installed(self.layer)

    def install(self) -> None:
        """Put a new layer on the attribute, in place of one that is displaced."""
        self.remove()
        self.layer = install(self.owner, self.name, self.wrapper)

    def remove(self) -> bool:
        """Take the layer away; False if it has to sleep inside another library's wrapper until that goes."""
        return self.layer is None or remove(self.layer)


def remove_unless_compiling(wrapped: Wrapped) -> None:
    """Remove a layer; if something is being compiled just now, at a later collection.

    A collection may come while a compiler writes down as guards which layers it went through.
    """
    if is_compiling_anywhere():
        finalizer = weakref.finalize(_Circle(), remove_unless_compiling, wrapped)
        finalizer.atexit = False
    else:
        remove(wrapped)


class _Circle:
    """Refers to itself, so that it is the next collection that frees it."""

    def __init__(self) -> None:
        self.itself = self


def _settle(wrapped: Wrapped) -> bool:
    owner, name = wrapped._self_home
    with _lock:
        place = _find(owner, name, wrapped)
        if place is None:
            return False
        holder, attribute, above = place
        if above is not None:
            above._self_own = wrapped._self_own
            above.__wrapped__ = wrapped.__wrapped__
            if above._self_call is not None:
                above._self_call = functools.partial(above._self_wrapper, above.__wrapped__, None)
        elif holder is owner and attribute == name and not wrapped._self_own:
            delattr(owner, name)
        else:
            setattr(holder, attribute, wrapped.__wrapped__)
        return True


def _find(owner: Any, name: str, wrapped: Wrapped) -> tuple[Any, str, Wrapped | None] | None:
    """Return where the layer is: its slot (holder, attribute), and the layer of ours directly above it, if any."""
    for holder, attribute in slots(owner, name):
        above, here = None, vars(holder).get(attribute)
        while type(here) is Wrapped:
            if here is wrapped:
                return holder, attribute, above
            above, here = here, here.__wrapped__
    return None


def _innermost(owner: Any, name: str) -> tuple[Any, str]:
    *_, last = slots(owner, name)
    return last


def slots(owner: Any, name: str) -> Iterator[tuple[Any, str]]:
    """Yield the attributes that a call goes through, outermost first: `owner.name`, then what hooks have saved."""
    holder, attribute = owner, name
    for _ in range(_DEEPEST):
        yield holder, attribute
        value = vars(holder).get(attribute)
        while type(value) is Wrapped:
            value = value.__wrapped__
        below = _saved_by_hook(owner, value)
        if below is None or below == (holder, attribute):
            return
        holder, attribute = below


def _saved_by_hook(module: Any, value: Any) -> tuple[Any, str] | None:
    """Return where accelerate's or diffusers' hook, if `value` is one, keeps the forward that it replaced."""
    return accelerate_internals.saved_forward(module, value) or diffusers_internals.saved_forward(value)


def _hidden(wrapped: Wrapped) -> bool:
    """Return whether the layer is inside another library's wrapper, going by the `__wrapped__` convention."""
    owner, name = wrapped._self_home
    value = vars(owner).get(name)
    for _ in range(_DEEPEST):
        if value is None or value is wrapped:
            break
        # A hook's `__wrapped__` is what it found when it was added, not what it calls now.
        below = _saved_by_hook(owner, value)
        value = getattr(value, "__wrapped__", None) if below is None else vars(below[0]).get(below[1])
    return value is wrapped
