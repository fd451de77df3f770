"""A site without a call of its own: the tensor code that a model's forward runs between two of its submodules.

A mode watches the torch functions that are called from the end of one submodule, or the beginning of the forward, to
the start of the next. A pure function whose tensor inputs are all known (arguments of the forward that the spec names,
or earlier results of the span) is memoised by its name, its other arguments and the identity of those inputs; all else
runs as it is. Each function is looked up by what it is called with, so no key can be too coarse: changed code or other
inputs are other keys. Asking a known tensor whether it is true is such a function, too: on a GPU the host waits for it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..errors import SiteError, suggest
from ..memo.context import context_key, transparent_modes
from ..memo.keys import Argument, Dependencies, Uncacheable
from ..memo.lookup import Memo
from ..memo.store import Entry
from ..spec.model import Site
from ..upstream.torch_internals import is_capturing, leave_function_mode
from . import scope
from .binding import Binding
from .resolve import Ends, is_compiled_along

_CPU = torch.device("cpu")
_FACTORIES = frozenset({"arange", "full", "ones", "tensor", "zeros"})
_METHODS = frozenset(
    """
    __bool__ all add sub mul eq ne ge gt le lt logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __eq__ __ne__ __ge__ __gt__ __le__ __lt__
    __and__ __or__ __invert__ bool cat cumsum expand flatten masked_fill pad permute repeat repeat_interleave
    reshape squeeze stack sum to transpose tril triu unsqueeze view where
    """.split()  # noqa: SIM905
)


class Span:
    """A span at work on one model. One that begins with the forward has to be told of it: `on_forward_start`.

    Raises:
        SiteError: the spec names an argument that the model's forward does not have.
    """

    #: It has no layer, and torch's hooks stay where they are.
    is_displaced = False
    is_replaced = False
    fixes = False
    leaves_modes = True

    def __init__(self, site: Site, label: str, binding: Binding, ends: Ends) -> None:
        self.site, self.label, self.model = site, label, binding.model
        #: The submodules that it lies between.
        self.ends = ends
        self.memo = Memo(label, binding.budget, binding.check)
        #: Arguments of the forward whose identity counts.
        self.arguments = [name.removeprefix("model.") for name in site.key]
        for name in self.arguments:
            if name not in binding.parameters and not binding.takes_any:
                near = suggest(name, binding.parameters)
                raise SiteError(f"{label}: the model's forward has no parameter `{name}`{near}")
        self._hooks: list = []
        #: How arguments enter keys, by the name of the torch function.
        self._readers: dict[tuple, Argument] = {}

    def __repr__(self) -> str:
        return f"<Span {self.site.at}: {self.memo.cache.hits} hits, {self.memo.cache.misses} misses>"

    @property
    def watches_forwards(self) -> bool:
        """Whether `on_forward_start` has to be called."""
        return self.ends.start is None

    def on_forward_start(self, frame: scope.Frame) -> None:
        """Begin to watch."""
        self.begin()

    def install(self) -> None:
        """Put hooks on the two submodules."""
        if not self._hooks:
            self._hooks = [self.ends.end.register_forward_pre_hook(scope.Hook(self.finish, self), prepend=True)]
            if self.ends.start is not None:
                self._hooks.append(self.ends.start.register_forward_hook(scope.Hook(self.begin, self)))

    def remove(self) -> bool:
        """Take the hooks away and forget every result."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.clear()
        return True

    def clear(self) -> None:
        """Forget every result."""
        self.memo.cache.clear()

    def argument(self, name: str, facets: tuple[str, ...]) -> Argument:
        """Return how arguments of the torch function of that name enter keys."""
        if (name, facets) not in self._readers:
            self._readers[name, facets] = Argument(name, facets, self.label)
        return self._readers[name, facets]

    def begin(self, *_) -> None:
        """Watch torch functions from now on, in a forward of the model, once in each."""
        frame = scope.current()
        if frame is None or frame.model is not self.model or frame.calls.get(self):
            return
        frame.calls[self] = 1
        if self.memo.off is not None or (self.site.accelerator and frame.device == _CPU):
            return
        try:
            if is_compiled_along(self.model, self.ends.path):
                # A mode that is on when a compiled function is entered would have it compiled again.
                raise Uncacheable("the submodule after it is compiled")
            if self.arguments and frame.refusal is not None:
                raise Uncacheable(frame.refusal)
            mode = _WatchMode(self, context_key(True), [frame.argument(name) for name in self.arguments])
        except Uncacheable as reason:
            self.memo.bypass(str(reason))
            return
        mode.__enter__()
        frame.on_exit(_WatchMode, mode.leave)

    def finish(self, *_) -> None:
        """Watch no longer."""
        frame = scope.current()
        if frame is not None and frame.model is self.model:
            frame.exit_early(_WatchMode)


class _WatchMode(TorchFunctionMode):
    """Memoises torch functions of known tensors while it is on, for one pass through a span.

    Args:
        context: what results depend on besides arguments, see `memo.keys`.
        arguments: those of the forward that the span knows, in which lists of tensors count as tensors.
    """

    def __init__(self, span: Span, context: Hashable, arguments: list[Any]) -> None:
        super().__init__()
        self.span, self.context = span, context
        items = [item for value in arguments for item in (value if isinstance(value, (list, tuple)) else (value,))]
        #: Tensors among the arguments.
        self.inputs = [value for value in items if isinstance(value, torch.Tensor)]
        #: Tensors that may be a part of a key, by id: inputs, and results so far.
        self.known = {id(tensor): tensor for tensor in self.inputs}
        #: Where the results so far are stored, by their id.
        self.entries: dict[int, Entry] = {}
        self.is_capturing = is_capturing()

    def __repr__(self) -> str:
        return f"<_WatchMode of {self.span!r}: {len(self.known)} tensors known>"

    def leave(self) -> None:
        """Take the mode off the stack, wherever in it it is."""
        leave_function_mode(self)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.__name__
        if name not in _METHODS and name not in _FACTORIES:
            return function(*args, **kwargs)
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if not inputs and name not in _FACTORIES or any(id(tensor) not in self.known for tensor in inputs):
            return function(*args, **kwargs)
        memo = self.span.memo
        call = _FunctionCall(self, function, args, kwargs)
        try:
            key = (self.context, name, *call.parts(None))
        except Uncacheable as reason:
            memo.bypass(str(reason))
            return function(*args, **kwargs)
        if self.is_capturing:
            # What has no tensor in it is the same at every replay.
            entry = None if inputs else memo.get_in_capture(key)
            return function(*args, **kwargs) if entry is None else entry.result()
        result = memo.recall(key, call)
        entry = memo.cache.entries.get(key)
        if entry is not None and isinstance(result, torch.Tensor):
            self.known[id(result)], self.entries[id(result)] = result, entry
        return result


transparent_modes.add(_WatchMode)


class _FunctionCall:
    """One call of a torch function in a span, as `Memo` asks about it."""

    __slots__ = ("args", "function", "kwargs", "mode")

    def __init__(self, mode: _WatchMode, function: Any, args: tuple, kwargs: dict) -> None:
        self.mode, self.function, self.args, self.kwargs = mode, function, args, kwargs

    def __repr__(self) -> str:
        return f"<_FunctionCall {self.function.__name__}>"

    def parts(self, dependencies: Dependencies | None, facets: tuple[str, ...] = ("identity",)) -> list[Hashable]:
        argument = self.mode.span.argument(self.function.__name__, facets)
        return [
            *(argument.part(value, dependencies) for value in self.args),
            *((name, argument.part(value, dependencies)) for name, value in self.kwargs.items()),
        ]

    def compute(self) -> Any:
        return self.function(*self.args, **self.kwargs)

    def dependencies(self) -> Dependencies:
        dependencies = Dependencies()
        self.parts(dependencies)
        # A view keeps the storage that it is keyed by, so it must go with the result that it is a view of.
        entries = self.mode.entries
        dependencies.others = [entries[id(tensor)].is_stored for tensor in self.stored() if id(tensor) in entries]
        return dependencies

    def signature(self) -> Hashable:
        return self.function.__name__, *self.parts(None, ("shape", "dtype", "device"))

    def sources(self) -> list[torch.Tensor]:
        return self.mode.inputs

    def stored(self) -> list[torch.Tensor]:
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, torch.Tensor)]
