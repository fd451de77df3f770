"""A site without a call of its own: the tensor code that a model's forward runs between two of its submodules.

From the end of one submodule, or the beginning of the forward, to the start of the next, torch functions are watched.
A pure one whose tensor inputs are all known (arguments of the forward that the spec names, or earlier results of the
span) is memoised by its function, its other arguments and the identity of those inputs; everything else runs as it is.
Every step is looked up by what it is called with, so that no key can be too coarse: changed code or other inputs are
other keys. Asking a known tensor whether it is true is such a step, too: on a GPU the host waits for that.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..errors import SiteError, suggest
from ..memo.context import context_key
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
        SiteError: where the spec names an argument that the model's forward does not have.
    """

    def __init__(
        self,
        site: Site,
        label: str,
        binding: Binding,
        ends: Ends,
    ) -> None:
        self.site, self.label, self.model, self.ends = site, label, binding.model, ends
        self.memo = Memo(label, binding.budget, binding.check)
        self.names = [name.removeprefix("model.") for name in site.key]
        for name in self.names:
            if name not in binding.parameters and not binding.takes_any:
                near = suggest(name, binding.parameters)
                raise SiteError(f"{label}: the model's forward has no parameter `{name}`{near}")
        self._hooks: list = []
        self._arguments: dict[tuple, Argument] = {}

    def __repr__(self) -> str:
        return f"<Span {self.site.at}: {self.memo.cache.hits} hits, {self.memo.cache.misses} misses>"

    @property
    def watches_forwards(self) -> bool:
        """Whether it begins where a forward does."""
        return self.ends.start is None

    def on_forward_start(self, frame: scope.Frame) -> None:
        """Begin to watch, at the start of a forward."""
        self.begin()

    def install(self) -> None:
        if not self._hooks:
            self._hooks = [self.ends.end.register_forward_pre_hook(scope.Hook(self.finish, self), prepend=True)]
            if self.ends.start is not None:
                self._hooks.append(self.ends.start.register_forward_hook(scope.Hook(self.begin, self)))

    def remove(self) -> bool:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.clear()
        return True

    def clear(self) -> None:
        self.memo.cache.clear()

    is_displaced = False  # torch's hooks stay where they are
    fixes = False
    leaves_modes = True

    def argument(self, name: str, facets: tuple[str, ...]) -> Argument:
        """Return how arguments of the torch function of that name enter keys."""
        if (name, facets) not in self._arguments:
            self._arguments[name, facets] = Argument(name, facets, self.label)
        return self._arguments[name, facets]

    def begin(self, *_) -> None:
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
            if self.names and frame.nameless:
                raise Uncacheable("the model was called with positional arguments that its spec does not name")
            mode = _Watch(self, context_key(True), [frame.argument(name) for name in self.names])
        except Uncacheable as reason:
            self.memo.bypass(str(reason))
            return
        mode.__enter__()
        frame.on_exit(_Watch, mode.finish)

    def finish(self, *_) -> None:
        frame = scope.current()
        if frame is not None and frame.model is self.model:
            frame.exit_early(_Watch)


class _Watch(TorchFunctionMode):
    def __init__(self, span: Span, around: Hashable, arguments: list[Any]) -> None:
        super().__init__()
        self.span, self.around = span, around
        listed = [item for value in arguments for item in (value if isinstance(value, (list, tuple)) else (value,))]
        self.given = [value for value in listed if isinstance(value, torch.Tensor)]
        self.known = {id(tensor): tensor for tensor in self.given}
        self.made: dict[int, Entry] = {}
        self.capturing = is_capturing()

    def finish(self) -> None:
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
        step = _Step(self, function, args, kwargs)
        try:
            key = (self.around, name, *step.parts(None))
        except Uncacheable as reason:
            memo.bypass(str(reason))
            return function(*args, **kwargs)
        if self.capturing:
            # What has no tensor in it is the same at every replay.
            entry = None if inputs else memo.get_in_capture(key)
            return function(*args, **kwargs) if entry is None else entry.result()
        result = memo.recall(key, step)
        entry = memo.cache.entries.get(key)
        if entry is not None and isinstance(result, torch.Tensor):
            self.known[id(result)], self.made[id(result)] = result, entry
        return result


class _Step:
    """One torch function of the span, as `Memo` asks about it."""

    __slots__ = ("args", "function", "kwargs", "watch")

    def __init__(self, watch: _Watch, function: Any, args: tuple, kwargs: dict) -> None:
        self.watch, self.function, self.args, self.kwargs = watch, function, args, kwargs

    def parts(self, dependencies: Dependencies | None, facets: tuple[str, ...] = ("identity",)) -> list[Hashable]:
        argument = self.watch.span.argument(self.function.__name__, facets)
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
        dependencies.others = [
            self.watch.made[id(tensor)].is_stored for tensor in self.stored() if id(tensor) in self.watch.made
        ]
        return dependencies

    def signature(self) -> Hashable:
        return self.function.__name__, *self.parts(None, ("shape", "dtype", "device"))

    def sources(self) -> list[torch.Tensor]:
        return self.watch.given

    def stored(self) -> list[torch.Tensor]:
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, torch.Tensor)]
