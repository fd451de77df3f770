"""From what the user names, a spec, a class or a folder, to the subject of an audit."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ...errors import DitPatchError, quote
from ...spec.model import Spec
from ...spec.recipe import Mini
from ...spec.registry import Registry
from ..check.cases import find_config, read_config, without_diffusers_own
from ..new.draft import guessed_mini, model_class
from .subject import Subject, from_mini, from_spec


def subject(registry: Registry, name: str, own: Mini | None = None, **options: Any) -> Subject:
    """Return the subject for the name of a spec, its file, or the dotted name of a class.

    Args:
        own: says how to build and call a class, in place of its spec.
        options: those of `from_spec`.

    Raises:
        DitPatchError: there is no such thing, or nothing is known of how to call it.
    """
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return from_spec(registry.read(name), **options)
    if "/" in name or name in registry.names():
        return from_spec(registry.get(name), **options)
    if own is not None and own.host is not None:
        import_module(own.host).prepare()
    return _of_class(registry, model_class(name), own, options)


def folder_subject(registry: Registry, folder: Path, own: Mini | None = None, **options: Any) -> Subject:
    """Return the subject for the folder of a saved model or pipeline of diffusers, of which no weights are read.

    Raises:
        DitPatchError: the folder has no model of diffusers.
    """
    file = find_config(folder)
    content = read_config(file, "--model")
    name = content.get("_class_name")
    if not isinstance(name, str):
        raise DitPatchError(f"--model: {quote(file)} names no class (`_class_name`)")
    cls = model_class(f"diffusers.{name}")
    config = without_diffusers_own(content)
    return _of_class(registry, cls, own, {**options, "whole_config": config, "name": f"{folder.name} ({name})"})


def _of_class(registry: Registry, cls: type[torch.nn.Module], own: Mini | None, options: Mapping[str, Any]) -> Subject:
    name = f"{cls.__module__}.{cls.__qualname__}"
    found: Spec | None = registry.find(cls)
    if found is not None and found.mini is not None and own is None and name in found.classes:
        return from_spec(found, **options)
    return from_mini(name, own or guessed_mini(cls), **options)
