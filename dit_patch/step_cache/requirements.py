"""What step caching cannot be switched on with: each with its reason, and what to do instead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module, metadata
from typing import Any

import torch
from packaging.version import Version

from ..errors import StepCacheError
from ..sites.pipeline_models import is_compiled_in
from ..spec.model import Spec
from ..upstream import cache_dit_internals, diffusers_internals, fastvideo_internals

OLDEST, NEXT = "1.5.3", "1.6"
"""The first cache-dit that this was checked with (before, max_continuous counts otherwise), and the first not."""


def cache_dit() -> Any:
    """cache-dit's `caching` package, imported on first use.

    Raises:
        StepCacheError: it is not installed, or not one that this was checked with.
    """
    try:
        # Of the distribution: cache_dit.__version__ is another in some wheels.
        version = metadata.version("cache-dit")
    except metadata.PackageNotFoundError:
        raise StepCacheError("step caching needs cache-dit: pip install 'dit-patch[cache]'") from None
    if not Version(OLDEST) <= Version(version) < Version(NEXT):
        raise StepCacheError(
            f"step caching needs cache-dit >={OLDEST},<{NEXT}, and {version} is installed: "
            "pip install 'dit-patch[cache]'"
        )
    chatty = os.environ.get("CACHE_DIT_LOG_LEVEL")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    try:
        return import_module("cache_dit.caching")
    except ImportError as error:
        raise StepCacheError(f"cache-dit {version} cannot be imported: {error}") from error
    finally:
        if chatty is None:
            del os.environ["CACHE_DIT_LOG_LEVEL"]


def check_spec(spec: Spec, what: str) -> None:
    """Whether the spec allows it.

    Raises:
        StepCacheError: with the spec's reason.
    """
    rule = spec.step_cache
    if rule is not None and not rule.supported:
        raise StepCacheError(f"no step caching for {what} ({spec.name}): {rule.reason}.\n    Leave out step_cache.")
    if rule is None or not spec.blocks:
        raise StepCacheError(
            f"no step caching for {what}: {spec.name} does not say what its blocks are.\n"
            "    A spec says it with `blocks:` and `step_cache:`; docs/specs.md."
        )


def check_model(model: torch.nn.Module, target: Any, blocks: list[torch.nn.ModuleList], what: str) -> None:
    """Whether the model's present state allows it; asked again at the start of each generation.

    Raises:
        StepCacheError: something else is on that would be broken by skipping blocks, or would undo it.
    """
    for reason, remedy in _problems(model, target, blocks):
        raise StepCacheError(f"no step caching for {what}: {reason}.\n    {remedy}")


def _problems(model: torch.nn.Module, target: Any, blocks: list[torch.nn.ModuleList]) -> Iterator[tuple[str, str]]:
    if is_compiled_in(target, model):
        yield (
            "it is compiled as a whole, and compiled code always runs all blocks",
            "Compile its blocks instead: model.compile_repeated_blocks().",
        )
    if getattr(model, "is_cache_enabled", False):
        config = diffusers_internals.cache_config_name(model)
        yield f"diffusers' own caching is on ({config})", "Call its disable_cache() first, or leave out step_cache."
    if cache_dit_internals.is_on(model):
        yield "cache-dit is on already", "Call cache_dit.disable_cache(...) first, or leave out step_cache."
    libraries = (diffusers_internals, fastvideo_internals)
    if any(library.prefetches(block) for library in libraries for each in blocks for block in each):
        yield (
            "its blocks are offloaded with prefetching, which counts on each block to bring in the next",
            "Use group offloading with use_stream=False, or enable_model_cpu_offload(); in FastVideo, "
            "dit_layerwise_offload=False.",
        )
