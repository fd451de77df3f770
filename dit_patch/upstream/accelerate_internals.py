"""What dit_patch knows of accelerate beyond its documented interface; accelerate itself is not imported."""

from __future__ import annotations

import functools
from typing import Any


def saved_forward(module: Any, forward: Any) -> tuple[Any, str] | None:
    """Return where accelerate's hook keeps the forward that it replaced, as (holder, attribute); None if it is no hook.

    `add_hook_to_module` puts a `functools.partial` of its inner `new_forward` on the module, and what was there before
    in `_old_forward`. A layer of ours goes there: above the hook it would see weights that are still offloaded, and
    `remove_hook_from_module` would drop it together with the hook.

    Seen in accelerate 1.15, hooks.py. Where it keeps the forward elsewhere, layers go above its hooks.
    """
    function = forward.func if isinstance(forward, functools.partial) else None
    hooked = getattr(function, "__qualname__", "").startswith("add_hook_to_module.")
    return (module, "_old_forward") if hooked and "_old_forward" in vars(module) else None
