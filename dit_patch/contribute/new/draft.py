"""Draft a spec for a class: guess a mini or take a given one, build it, call it, and observe what repeats."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ...errors import DitPatchError, quote, suggest
from ...hosts import HOSTS
from ...spec import mini
from ...spec.recipe import Mini
from .. import verify
from ..check import probe
from . import guess, observe
from .prune import prune
from .rotary import propose_rotary_sites
from .write import Draft

STEPS = 3


def draft(name: str, given: Mini | None = None) -> Draft:
    """Return what `dit-patch new NAME` writes.

    Args:
        name: the dotted name of the class.
        given: the mini to use instead of a guessed one.

    Raises:
        DitPatchError: there is no such class, or it is no model.
    """
    cls = model_class(name)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if given is not None:
        recipe: Mapping[str, Any] = given.model_dump(exclude_unset=True)
        unknown: list[str] = []
    else:
        try:
            recipe, unknown = _guess_mini(cls)
        except Exception as error:  # of the class's own
            return Draft(name, _empty_mini(cls), problem=_error_text(error))
    made = _try(Draft(name, recipe, unknown=unknown, own_mini=given is not None))
    others = guess.other_latents(recipe) if made.problem and not made.own_mini and not unknown else ()
    return next((tried for each in others if not (tried := _try(Draft(name, each))).problem), made)


def _try(made: Draft) -> Draft:
    """Run the draft's mini, and complete the draft with what was seen, or with why it did not run."""
    if made.unknown:
        made.problem = f"nothing could be guessed for the forward's {', '.join(made.unknown)}"
        return made
    try:
        _observe(made, made.name, Mini.model_validate(made.mini))
        if made.sites:
            prune(made)
    except (ValidationError, DitPatchError) as error:
        made.problem = str(error)
    except Exception as error:  # of the model's own
        made.problem = _error_text(error)
    return made


def model_class(name: str) -> type[torch.nn.Module]:
    """Import the class with that dotted name.

    Raises:
        DitPatchError: there is none, or it is not a `torch.nn.Module`.
    """
    module_name, _, qualname = name.rpartition(".")
    try:
        module = import_module(module_name) if module_name else None
    except ImportError as error:
        raise DitPatchError(f"{quote(name)}: cannot import {quote(module_name)}: {error}") from error
    cls = getattr(module, qualname, None)
    if cls is None:
        near = suggest(qualname, dir(module)) if module else ""
        raise DitPatchError(f"{quote(name)}: expected the dotted name of a class, package.module.Class{near}")
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise DitPatchError(f"{quote(name)} is a {type(cls).__name__}, not a class of models (torch.nn.Module)")
    return cls


def guessed_mini(cls: type[torch.nn.Module]) -> Mini:
    """Return a mini for a class of models that was guessed from names, and runs.

    Raises:
        DitPatchError: what was guessed cannot be built or called; it says how to go on.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"
    problem = ""
    try:
        recipe, unknown = _guess_mini(cls)
        if unknown:
            problem = f"nothing could be guessed for the forward's {', '.join(unknown)}"
        for each in () if unknown else (recipe, *guess.other_latents(recipe)):
            try:
                own = Mini.model_validate(each)
                case = own.case()
                spec = mini.spec_without_sites(name, own)
                verify.run(mini.build(spec, case), list(mini.forwards(case, case.sizes[0], steps=1)))
                return own
            except Exception as error:  # of the model's own
                problem = problem or _error_text(error)
    except Exception as error:
        problem = _error_text(error)
    raise DitPatchError(
        f"{quote(name)}: a small model was guessed, and does not run: {problem}\n"
        f"    Say how to build and call it: dit-patch new {name} --out FILE begins a `mini`; mend it, then --mini FILE"
    )


def _guess_mini(cls: type[torch.nn.Module]) -> tuple[dict[str, Any], list[str]]:
    """Return a mini, and the forward's parameters that no input was guessed for."""
    host = _host(cls)
    defaults = mini.class_defaults(cls, host)
    config = guess.config(defaults)
    name = f"{cls.__module__}.{cls.__qualname__}"
    empty = {"config": config, "sizes": [{"f": 1}], "inputs": {"x": {"shape": ["f"]}}}
    own = Mini.model_validate(empty if host is None else {"host": host, **empty})
    with torch.device("meta" if host is None else "cpu"):
        model = mini.make_model(mini.spec_without_sites(name, own), own.case())
    inputs, unknown = guess.inputs(model, config, defaults)
    recipe = {"config": config, "sizes": guess.sizes(inputs, guess.latents_per_token(model)), "inputs": inputs}
    return recipe if host is None else {"host": host, **recipe}, unknown


def _host(cls: type[torch.nn.Module]) -> str | None:
    """Return the host that the class's library needs, made ready."""
    host = HOSTS.get(cls.__module__.partition(".")[0])
    if host is not None:
        import_module(host).prepare()
    return host


def _observe(made: Draft, name: str, own: Mini) -> None:
    """Run the mini, and put its blocks and the proposed sites into the draft."""
    spec = mini.spec_without_sites(name, own)
    case = own.case()
    model = mini.build(spec, case)
    forwards, moments = probe.generations(case, STEPS)
    verify.run(model, mini.repeat(forwards))
    made.forwards = len(forwards)
    made.blocks = observe.find_block_lists(model, mini.repeat(forwards))
    made.sites = [
        *observe.propose_sites(model, mini.repeat(forwards), moments),
        *propose_rotary_sites(model, mini.repeat(forwards)[0]),
    ]


def _empty_mini(cls: type[torch.nn.Module]) -> dict[str, Any]:
    inputs = {"hidden_states": {"shape": [1, "f"], "new": "step"}}
    host = _host(cls)
    recipe = {"config": guess.config(mini.class_defaults(cls, host)), "sizes": [{"f": 1}], "inputs": inputs}
    return recipe if host is None else {"host": host, **recipe}


def _error_text(error: Exception) -> str:
    """Return the error's message with its class and the line that raised it: some messages are empty."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno}: {last.line})"
