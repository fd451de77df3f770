"""All or nothing: which models are patched by which spec, and patching them so that a failure leaves none patched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from packaging.requirements import Requirement

from ..errors import DitPatchError, UnsupportedModelError, VersionError, quote
from ..extras import version
from ..findings import Finding, FindingKind, warn
from ..sites.pipeline_models import is_compiled_in, unwrap
from ..spec.model import Spec
from ..spec.registry import Registry
from .handle import Handle, own_handle
from .options import Options

Chosen = Mapping[str, tuple[torch.nn.Module, Spec]]
"""Models by their names in the pipeline, each with its spec."""


def patch_models(target: Any, chosen: Chosen, options: Options) -> Handle:
    """Patch models of `target`, each by its spec.

    Raises:
        SiteError, StepCacheError: one of them cannot be patched, so none is.
        DitPatchError: none of them has a site that is wanted.
    """
    with ExitStack() as undo:
        handle = Handle(options)
        undo.callback(handle.take_back)
        for name, (model, spec) in chosen.items():
            handle.add(name, model, spec, target)
        handle.watch(target)
        undo.pop_all()
    if not options.step_cache and not any(model.patches for model in handle.patched_models):
        handle.remove()
        names = ", ".join(dict.fromkeys(spec.name for _, spec in chosen.values()))
        what = f"site of kind {' or '.join(options.only)}" if options.only else "site"
        raise DitPatchError(f"nothing to patch: no {what} of {names} is in {', '.join(chosen)}")
    for name, (model, _) in chosen.items():
        if is_compiled_in(target, model):
            warn(Finding(FindingKind.COMPILED_WHOLE, detail=f"{name} ({type(model).__name__})"), stacklevel=3)
    return handle


def patch_exchanged(handle: Handle, target: Any, fresh: Chosen) -> None:
    """Patch models that have come into `target` in the place of others since `handle` patched those.

    Raises:
        SiteError, StepCacheError: one of them cannot be patched, so none is; the others stay patched.
    """
    gone = [each for each in handle.patched_models if each.name in fresh]
    count = len(handle.patched_models)
    try:
        for name, (model, spec) in fresh.items():
            handle.add(name, model, spec, target)
    except BaseException:
        for each in handle.patched_models[count:]:
            handle.drop(each)
        raise
    for each in gone:
        handle.drop(each)


def with_specs(
    models: dict[str, torch.nn.Module], registry: Registry, names: Iterable[str] | None = None
) -> dict[str, tuple[torch.nn.Module, Spec]]:
    """Pair each model with its spec; keep only specs in `names`, if given, else those that are on by default.

    Raises:
        UnsupportedModelError: there is no spec for any of them, or none that is wanted.
    """
    paired = _pair_with_specs(models, registry)
    chosen = {name: each for name, each in paired.items() if each[1].is_wanted(names)}
    if chosen:
        return chosen
    if paired and names:
        others = ", ".join(f"{name} ({spec.name})" for name, (_, spec) in paired.items())
        raise UnsupportedModelError(f"only: no model is for {' or '.join(map(quote, names))}; there are: {others}")
    raise UnsupportedModelError("\n".join(_why_none(models, paired, registry)))


def existing_handle(chosen: Chosen, options: Options) -> Handle | None:
    """Return the handle that has patched all these models, or what they stand for; None if none of them is patched.

    What `dit-patch run` patched gives way to what the program asks for.

    Raises:
        DitPatchError: some are patched by another handle, or with other options.
    """
    handles = _handles(chosen)
    for handle in handles:
        if handle.is_automatic and (handle.options != options or handle is not handles[0]):
            handle.remove()
    handles = _handles(chosen)
    if not handles:
        return None
    patched = {each.name for each in handles[0].patched_models}
    is_whole = all(own_handle(model) is not None or name in patched for name, (model, _) in chosen.items())
    if not is_whole or any(handle is not handles[0] for handle in handles):
        raise DitPatchError(
            "some of these models are patched by another handle already\n"
            "    Call dit_patch.remove(...) on what you apply to, or that handle's remove(), first."
        )
    if handles[0].options != options:
        raise DitPatchError(
            f"already patched with other options: {handles[0].options.difference(options)}\n"
            "    Call dit_patch.remove(...) on what you apply to, or handle.remove(), first."
        )
    return handles[0]


def _handles(chosen: Chosen) -> list[Handle]:
    return [handle for model, _ in chosen.values() if (handle := own_handle(model)) is not None]


def is_installed(spec: Spec) -> bool:
    """Return whether the packages that the spec needs are installed, in any version."""
    return all(version(Requirement(line).name) for line in spec.requires)


def check_versions(spec: Spec, strict: bool) -> None:
    """Raise VersionError if the spec's `requires` excludes an installed package; without `strict`, only warn."""
    for line in spec.requires:
        requirement = Requirement(line)
        found = version(requirement.name)
        if found is None:
            problem, remedy = f"{line}, which is not installed: pip install '{line}'", ""
        else:
            if requirement.specifier.contains(found, prereleases=True):
                continue
            problem, remedy = f"{line}; {found} is installed.", " Pass strict=False to try anyway."
        if strict:
            raise VersionError(f"{spec.name} needs {problem}{remedy}")
        warn(Finding(FindingKind.OTHER_VERSION, spec.name, problem), stacklevel=3)


def _pair_with_specs(models: dict[str, torch.nn.Module], registry: Registry) -> dict[str, tuple[torch.nn.Module, Spec]]:
    """Pair models with their specs; a model without one is looked into, and models inside it go by their paths."""
    paired: dict[str, tuple[torch.nn.Module, Spec]] = {}
    seen: set[torch.nn.Module] = set()

    def look(path: str, module: torch.nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        spec = registry.find(type(module))
        if spec is not None:
            paired[path] = module, spec
            return
        for name, child in module.named_children():
            look(f"{path}.{name}", unwrap(child))

    for name, model in models.items():
        look(name, model)
    return paired


def _why_none(models: dict[str, torch.nn.Module], paired: Chosen, registry: Registry) -> Iterator[str]:
    """Say of each model why it is not patched, where no spec was named."""
    unknown = [model for name, model in models.items() if not any(f"{path}.".startswith(f"{name}.") for path in paired)]
    if unknown or not models:
        what = [f"{type(model).__name__} ({type(model).__module__})" for model in unknown]
        yield (
            f"no spec for {', '.join(what) or 'a pipeline without modules'}.\n"
            f"    Known: {', '.join(registry.names()) or 'none'}. Write one: docs/specs.md."
        )
    for path, (_, spec) in paired.items():
        yield (
            f"{path}: {spec.name} is off by default: {spec.off_by_default}\n"
            f'    Ask for it by name: only=["{spec.name}"], or --patch-model {spec.name}.'
        )
