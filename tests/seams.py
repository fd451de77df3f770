"""What the tests of the seams share: a patched model beside its unpatched twin, both changed alike after a warm-up.

The same input tensors come again before and after each change, and often enough before it that no first hit is checked
any more: whatever is handed out after the change is handed out on the strength of the guards alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_patch.contribute import verify
from dit_patch.memo.results import map_tensors

WARM = 3
"""Rounds before a change: results are stored in the first, checked in the second, and just handed out in the third."""

Undo = Callable[[], Any]

_WITHOUT_VERSION = ("numpy_view", "dlpack", "from_dlpack", "storage", "typed", "data", "shared")

_HOW = ("attribute", "list", "object")

_NOT_SEEN = {
    "attributes that are set within a forward, before the site is called, and not there when it begins": [
        f"set condition_embedder: {how}, late" for how in ("attribute", "object")
    ],
    "what context variables and the environment hold: nothing, so that such a function would have to be recomputed": [
        "inside: context variable",
        "inside: environment",
    ],
    "the contents of a result that went out: only a later check sees that it was written into": [
        "memory: result data",
        "memory: result numpy_view",
    ],
    "the frame that an interrupt leaves: torch calls no hook then, and it holds model and inputs": [
        "life: KeyboardInterrupt",
        "life: SystemExit",
        "life: GeneratorExit",
    ],
    "the frames of other threads, in remove()": ["life: remove in another thread"],
}
"""What does not hold yet: what would have to be looked at, and the cases that show it."""

STALE = {name: f"nobody looks at {what}" for what, names in _NOT_SEEN.items() for name in names}


def marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    """The mark of a case that does not hold yet; none if it does."""
    return (pytest.mark.xfail(strict=True, reason=STALE[name]),) if name in STALE else ()


def case(name: str, *values: Any) -> Any:
    """A parameter set with its name, marked if it does not hold yet."""
    return pytest.param(*values, id=name, marks=marks(name))


def known(name: str) -> Callable[[Callable], Callable]:
    """Mark a test that has no parameters, if what it shows does not hold yet."""

    def decorate(test: Callable) -> Callable:
        for mark in marks(name):
            test = mark(test)
        return test

    return decorate


def warm(tiny, calls: list[dict]) -> None:
    """Have the model patched, and the calls answered from what is stored."""
    if tiny.handle is None:
        tiny.apply()
    for _ in range(WARM):
        tiny.agree(calls)


def assert_seen(tiny, calls: list[dict], edit: Callable[[torch.nn.Module], Undo | None], matters: bool = True) -> bool:
    """Assert that both models agree before, after, and without an edit again; returns whether it changed anything.

    Args:
        tiny: the patched model and its twin.
        calls: arguments of forwards, which are used over and over.
        edit: changes a model, and may return what takes the change back.
        matters: whether the edit has to change what the unpatched model gives.
    """
    warm(tiny, calls)
    before = verify.run(tiny.plain, calls)
    undo = [edit(model) for model in tiny.both]
    try:
        # Each of the two is called as often as the other, since an edit may count.
        after = [[verify.run(model, calls) for _ in range(2)] for model in (tiny.plain, tiny.model)]
    finally:
        for each in undo:
            if each is not None:
                each()
    changed = any(verify.first_difference(before, each) is not None for each in after[0])
    assert changed or not matters, "the edit changes nothing, so that the case shows nothing"
    for theirs, ours in zip(*after):
        assert verify.first_difference(ours, theirs) is None, "stale"
    tiny.agree(calls)
    return changed


def altered(value: Any) -> Any:
    """What a hook makes of it: tensors with other contents, of the same shape and dtype."""
    return map_tensors(_altered, value)


def _altered(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor * 1.25 + 0.125
    if tensor.dtype not in (torch.int32, torch.int64):
        return tensor
    return tensor + 3 if tensor.max() > 8 else 1 - tensor.clamp(0, 1)  # small ones may be rows of an embedding


def pre_hook(module: torch.nn.Module) -> Undo:
    """Have a hook change what the module is called with."""

    def hook(_, args, kwargs):
        return tuple(map(altered, args)), {name: altered(value) for name, value in kwargs.items()}

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def hook(module: torch.nn.Module) -> Undo:
    """Have a hook change what the module gives."""
    return module.register_forward_hook(lambda _, args, output: altered(output)).remove


def own_forward(module: torch.nn.Module) -> Undo:
    """Set a forward on the module that calls the one it had, and changes what that gives."""
    before, had_own = module.forward, "forward" in vars(module)
    module.forward = lambda *args, **kwargs: altered(before(*args, **kwargs))

    def undo() -> None:
        if had_own:
            module.forward = before
        else:
            del module.forward

    return undo


def other_argument(name: str) -> Callable[[torch.nn.Module], Undo]:
    """An edit that has a hook change one argument of the model."""

    def edit(model: torch.nn.Module) -> Undo:
        def hook(_, args, kwargs):
            return args, kwargs | {name: altered(kwargs[name])}

        return model.register_forward_pre_hook(hook, with_kwargs=True).remove

    return edit
