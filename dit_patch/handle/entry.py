"""`apply`: from what a user asks for to a handle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..report.reported import ReportedHandle
from ..sites.pipeline_models import find_models
from ..spec.registry import Registry
from ..step_cache import StepCache
from .handle import handle_of
from .options import Options
from .transaction import check_versions, existing_handle, patch_exchanged, patch_models, with_specs

if TYPE_CHECKING:
    from ..launch.workers import RemoteHandle
    from .handle import Handle

_elsewhere: list[tuple[Callable[[Any], bool], Callable[..., ReportedHandle]]] = []


def register(is_elsewhere: Callable[[Any], bool], apply_there: Callable[..., ReportedHandle]) -> None:
    """Have `apply_there`, which takes what `apply` takes, patch targets whose models live in other processes."""
    _elsewhere.append((is_elsewhere, apply_there))


def apply(
    target: Any,
    *,
    only: Iterable[str] | None = None,
    max_bytes: int = 256 << 20,
    check: str = "first",
    fixes: bool = False,
    strict: bool = True,
    specs: Iterable[str | PathLike] = (),
    trust: bool = False,
    step_cache: StepCache | str | Mapping[str, Any] | None = None,
) -> Handle | RemoteHandle:
    """Patch the transformers of `target` so that what does not change between steps is computed once: same bits out.

    Called again with the same options it returns the same handle, puts back what another library has displaced, and
    patches what has been exchanged since.

    Args:
        target: a diffusers or FastVideo pipeline, or a bare transformer, compiled or distributed ones too; or a
            FastVideo `VideoGenerator`, whose models are patched in its worker processes.
        only: kinds of sites to patch, of "rope", "timestep", "mask", "context", "rotary", "kv_cache"; or names of
            specs, such as "diffusers/wan", whose models alone are patched then. All by default, but for specs that
            are `off_by_default`, which have to be named.
        max_bytes: what all caches of this handle may hold together, in bytes.
        check: "first" computes the first hit of each new signature again and compares it bit for bit, "always" every
            hit, "never" none.
        fixes: also bind per-call overrides where upstream ignores them (`bind:` in a spec); this may change results.
        strict: refuse to patch with versions that a spec's `requires` excludes; otherwise only warn.
        specs: further directories with specs.
        trust: let specs from `specs` name functions outside dit_patch in `use:`.
        step_cache: also skip blocks where a step changes little, which **changes the output**: a preset ("quality",
            "balanced", "performance"), a `StepCache`, or a mapping of its knobs. Off by default.

    Returns:
        A `Handle`; a `RemoteHandle`, which does the same, for a `VideoGenerator`.

    Raises:
        UnsupportedModelError: no spec for any model in `target`, or no way to reach its workers.
        SiteError: a spec does not fit the model. Nothing stays patched.
        VersionError: an installed package is outside the spec's `requires`.
        StepCacheError: step caching was asked for, and cannot be had on one of the models; it says why.
        DitPatchError: already patched with other options, or an option that does not exist.
    """
    asked = {"only": only, "max_bytes": max_bytes, "check": check, "fixes": fixes}
    asked["step_cache"] = StepCache.of(step_cache)
    for is_elsewhere, apply_there in _elsewhere:
        if is_elsewhere(target):
            return apply_there(target, strict=strict, specs=specs, trust=trust, **asked)
    directories = (specs,) if isinstance(specs, (str, PathLike)) else tuple(specs)
    registry = Registry(directories, trust=trust)
    options = Options.from_user(registry, directories=directories, **asked)
    chosen = with_specs(find_models(target), registry, options.specs)
    existing = existing_handle(chosen, options)
    fresh = {name: (model, spec) for name, (model, spec) in chosen.items() if handle_of(model) is None}
    for _, spec in fresh.values():
        check_versions(spec, strict)
    if existing is None:
        return patch_models(target, fresh, options)
    patch_exchanged(existing, target, fresh)
    existing.repair(target)
    return existing
