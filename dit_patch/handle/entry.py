"""`apply`: from what a user asks for to a handle; and `handle_of` and `remove`, for a handle that was not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import DitPatchError
from ..findings import LOGGER
from ..report.reported import ReportedHandle
from ..sites.pipeline_models import find_models
from ..spec.registry import Registry
from ..step_cache import StepCache
from .handle import own_handle
from .options import Options
from .transaction import check_versions, existing_handle, patch_exchanged, patch_models, with_specs

if TYPE_CHECKING:
    from ..launch.workers import RemoteHandle
    from .handle import Handle


class Elsewhere(NamedTuple):
    """What patches targets whose models live in other processes."""

    #: Whether the models of a target do.
    is_elsewhere: Callable[[Any], bool]
    #: Takes what `apply` takes.
    apply: Callable[..., ReportedHandle]
    #: The handle of a target that is patched, or None.
    handle_of: Callable[[Any], ReportedHandle | None]


_elsewhere: list[Elsewhere] = []


def register(elsewhere: Elsewhere) -> None:
    """Have targets whose models live in other processes patched by `elsewhere`."""
    _elsewhere.append(elsewhere)


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
    step_cache: StepCache | str | PathLike | Mapping[str, Any] | None = None,
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
            "balanced", "performance"), a `StepCache`, a mapping of its knobs, or a YAML file of them. Off by default.

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
    for elsewhere in _elsewhere:
        if elsewhere.is_elsewhere(target):
            return elsewhere.apply(target, strict=strict, specs=specs, trust=trust, **asked)
    directories = (specs,) if isinstance(specs, (str, PathLike)) else tuple(specs)
    registry = Registry(directories, trust=trust)
    options = Options.from_user(registry, directories=directories, **asked)
    chosen = with_specs(find_models(target), registry, options.specs)
    existing = existing_handle(chosen, options)
    fresh = {name: (model, spec) for name, (model, spec) in chosen.items() if own_handle(model) is None}
    for _, spec in fresh.values():
        check_versions(spec, strict)
    if existing is None:
        handle = patch_models(target, fresh, options)
        LOGGER.info("patched %s", ", ".join(f"{name} ({spec.name})" for name, (_, spec) in fresh.items()))
        return handle
    patch_exchanged(existing, target, fresh)
    existing.repair(target)
    return existing


def handle_of(target: Any) -> Handle | RemoteHandle | None:
    """Return the handle of what was patched in `target`, where it was not kept; None if nothing is.

    Args:
        target: what `apply` takes.

    Raises:
        DitPatchError: several handles have patched models of it; ask for one of the models.
    """
    handles = _handles_of(target)
    if len(handles) > 1:
        raise DitPatchError(
            f"{len(handles)} handles have patched models in this {type(target).__name__}: "
            f"{'; '.join(', '.join(handle.models) for handle in handles)}\n"
            "    Ask for one of the models: dit_patch.handle_of(pipeline.transformer)."
        )
    return handles[0] if handles else None


def remove(target: Any) -> bool:
    """Take every patch in `target` back, as `remove()` of its handle does; several handles go, too.

    Args:
        target: what `apply` takes.

    Returns:
        Whether there was anything to take back.
    """
    handles = _handles_of(target)
    for handle in handles:
        handle.remove()
    return bool(handles)


def _handles_of(target: Any) -> list[Any]:
    for elsewhere in _elsewhere:
        if elsewhere.is_elsewhere(target):
            handle = elsewhere.handle_of(target)
            return [] if handle is None else [handle]
    modules = (module for model in find_models(target).values() for module in model.modules())
    return list(dict.fromkeys(handle for module in modules if (handle := own_handle(module)) is not None))
