"""Single calls of sites, recorded in a forward of the unpatched model, to be repeated and timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import SiteError
from ..handle import apply
from ..sites import layers, resolve, scope
from ..spec import mini
from ..spec.address import SpanAddress
from ..spec.model import Site, Spec
from ..spec.recipe import Case


@dataclass(frozen=True)
class RecordedCall:
    """One call of a site as the model makes it, which can be repeated."""

    site: Site
    owner: Any
    name: str
    args: tuple
    kwargs: dict[str, Any]
    device: torch.device


def record_calls(
    model: torch.nn.Module, spec: Spec, arguments: dict[str, Any], before: torch.nn.Module | None = None
) -> list[RecordedCall]:
    """Return the first call of every site in one forward of the unpatched model, which ends at `before` if given."""
    calls: dict[str, RecordedCall] = {}
    device = next(model.parameters()).device
    undo = ExitStack()
    for site in spec.sites:
        if isinstance(site.address, SpanAddress):
            continue
        try:
            owner, name, _ = resolve.places(site.address, model, spec.name)[0]
        except SiteError:
            continue

        def note(original, instance, args, kwargs, site=site, owner=owner, name=name):
            calls.setdefault(site.at, RecordedCall(site, owner, name, args, kwargs, device))
            return original(*args, **kwargs)

        undo.callback(layers.remove, layers.install(owner, name, note))
    if before is not None:
        undo.callback(before.register_forward_pre_hook(_stop).remove)
    with undo, torch.no_grad(), suppress(_Stopped):
        model(**arguments)
    return list(calls.values())


def model_at_real_size(
    spec: Spec, case: Case, device: str
) -> tuple[torch.nn.Module, dict[str, Any], list[RecordedCall]]:
    """Return a model of real width with random weights, arguments of real size, and the calls of its sites.

    These are the calls before the first block, in bfloat16; in a `whole` case all calls, in float32.
    """
    dtype = torch.float32 if case.whole else torch.bfloat16
    model = mini.build(spec, case, dtype=dtype).to(device)
    arguments = next(mini.forwards(case, case.sizes[0], dtype=dtype, device=device))
    first = None if case.whole or not spec.blocks else model.get_submodule(f"{spec.blocks[0].at}.0")
    return model, arguments, record_calls(model, spec, arguments, first)


@contextmanager
def patched_frame(model: torch.nn.Module, spec: Spec, arguments: dict[str, Any]) -> Iterator[None]:
    """Patch the model and enter one of its forwards, so that its sites can be called one by one."""
    with apply(model, only=spec.name, max_bytes=8 << 30), torch.no_grad():
        hooks = scope.scope_of(model)
        hooks.enter(model, (), arguments)
        try:
            yield
        finally:
            hooks.leave(model, (), arguments, None)


class _Stopped(Exception):
    """Raised to end a forward."""


def _stop(*_: Any) -> None:
    raise _Stopped
