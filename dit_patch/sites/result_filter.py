"""A site whose result goes through a function, which the spec names with `then:`. Nothing of it is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import scope
from .binding import Attribute, Binding
from .patch import AttributePatch


class ResultFilter(AttributePatch):
    """Calls the original, and puts its result through `function`; in a forward of the model or outside of one."""

    def __init__(self, binding: Binding, attribute: Attribute, function: Callable[[Any], Any]) -> None:
        super().__init__(binding, attribute)
        #: Takes the result and returns what goes out.
        self.function = function

    def __call__(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        frame = scope.current()
        result = original(*args, **kwargs)
        self.memo.cache.hits += 1
        if frame is not None:
            frame.calls[self] = 1
        return self.function(result)
