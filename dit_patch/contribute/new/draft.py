"""From the name of a class to a draft of its spec: a mini is guessed (or given), built, called and looked at."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ...errors import DitPatchError, quote, suggest
from ...spec import mini
from ...spec.model import Spec
from ...spec.recipe import Mini
from .. import verify
from ..check import probe
from . import guess, observe, rotary
from .write import Draft

STEPS = 3


def draft(name: str, own: Mini | None = None) -> Draft:
    """What `dit-patch new NAME` writes; with `own`, on that mini instead of a guessed one.

    Raises:
        DitPatchError: there is no such class, or it is no model.
    """
    cls = model_class(name)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if own is not None:
        recipe: Mapping[str, Any] = own.model_dump(exclude_unset=True)
        unknown: list[str] = []
    else:
        try:
            recipe, unknown = _guessed(cls)
        except Exception as error:  # of the class's own
            return Draft(name, _empty(cls), problem=_words(error))
    made = Draft(name, recipe, unknown=unknown, own_mini=own is not None)
    if unknown:
        made.problem = f"nothing could be guessed for the forward's {', '.join(unknown)}"
        return made
    try:
        _look(made, name, Mini.model_validate(recipe))
    except (ValidationError, DitPatchError) as error:
        made.problem = str(error)
    except Exception as error:  # of the model's own
        made.problem = _words(error)
    return made


def model_class(name: str) -> type[torch.nn.Module]:
    """The class of that dotted name, wherever it is defined.

    Raises:
        DitPatchError: there is none, or it is not a `torch.nn.Module`.
    """
    place, _, qualname = name.rpartition(".")
    try:
        module = import_module(place) if place else None
    except ImportError as error:
        raise DitPatchError(f"{quote(name)}: cannot import {quote(place)}: {error}") from error
    found = getattr(module, qualname, None)
    if found is None:
        near = suggest(qualname, dir(module)) if module else ""
        raise DitPatchError(f"{quote(name)}: expected the dotted name of a class, package.module.Class{near}")
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise DitPatchError(f"{quote(name)} is a {type(found).__name__}, not a class of models (torch.nn.Module)")
    return found


def _guessed(cls: type[torch.nn.Module]) -> tuple[dict[str, Any], list[str]]:
    config = guess.config(cls)
    with torch.device("meta"):
        model = cls(**config)
    inputs, unknown = guess.inputs(model, config)
    return {"config": config, "sizes": guess.sizes(inputs, guess.patch(model)), "inputs": inputs}, unknown


def _look(made: Draft, name: str, own: Mini) -> None:
    spec = Spec(model=name, blocks=({"at": "blocks", "pattern": 3},), mini=own)
    case = own.case()
    model = mini.build(spec, case)
    forwards, moments = probe.generations(case, STEPS)
    verify.run(model, mini.repeat(forwards))
    made.forwards = len(forwards)
    made.blocks = observe.patterns(model, mini.repeat(forwards))
    made.sites = observe.sites(model, mini.repeat(forwards), moments) + rotary.sites(model, mini.repeat(forwards)[0])


def _empty(cls: type[torch.nn.Module]) -> dict[str, Any]:
    return {"config": guess.config(cls), "sizes": [{"f": 1}], "inputs": {"hidden_states": {"shape": [1, "f"]}}}


def _words(error: Exception) -> str:
    """What it says, and where: some say nothing."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno}: {last.line})"
