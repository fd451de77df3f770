"""From what the user names, a spec, a class or a folder, to the subject of an audit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ...errors import DitPatchError, quote
from ...spec.model import Spec
from ...spec.recipe import Mini
from ...spec.registry import Registry
from ..new.draft import guessed_mini, model_class
from .subject import Subject, from_mini, from_spec

_COMPONENTS = ("", "transformer", "transformer_2", "dit", "unet")


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
    place = next((each for each in map(folder.joinpath, _COMPONENTS) if (each / "config.json").is_file()), None)
    if place is None:
        raise DitPatchError(
            f"--model: {quote(folder)} has no config.json; give the folder of a saved model or pipeline"
        )
    try:
        content = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DitPatchError(f"--model: {quote(place / 'config.json')} cannot be read: {error}") from error
    name = content.get("_class_name") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise DitPatchError(f"--model: {quote(place / 'config.json')} names no class (`_class_name`)")
    cls = model_class(f"diffusers.{name}")
    config = {key: value for key, value in content.items() if not key.startswith("_")}
    return _of_class(registry, cls, own, {**options, "whole_config": config, "name": f"{folder.name} ({name})"})


def _of_class(registry: Registry, cls: type[torch.nn.Module], own: Mini | None, options: Mapping[str, Any]) -> Subject:
    name = f"{cls.__module__}.{cls.__qualname__}"
    found: Spec | None = registry.find(cls)
    if found is not None and found.mini is not None and own is None and name in found.classes:
        return from_spec(found, **options)
    return from_mini(name, own or guessed_mini(cls), **options)
