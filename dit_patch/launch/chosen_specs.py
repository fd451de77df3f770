"""What a choice of flags comes to, before there is anything to patch: mistakes in it are found without a model."""

from __future__ import annotations

from ..spec.model import Spec
from ..spec.registry import Registry
from ..step_cache import StepCache
from .flags import Choice


def chosen_specs(choice: Choice, *, hint: str = "", strict: bool = False) -> dict[str, Spec]:
    """Return the spec of each class that is to be patched, by the class's dotted name.

    Args:
        choice: of the command line and the environment.
        hint: the end of the message about a word after `--patch-model` that is neither kind nor spec.
        strict: whether a fault in the specs of an installed package is an error, rather than a warning.

    Raises:
        DitPatchError: a chosen spec, kind or preset does not exist, or a spec cannot be read.
    """
    registry = Registry(choice.spec_dir, trust=choice.trust_specs, strict=strict)
    _, names = registry.selection(choice.options["only"] or (), "--patch-model", hint)
    StepCache.of(choice.options["step_cache"])
    return {name: spec for name, spec in registry.classes().items() if spec.is_wanted(names)}
