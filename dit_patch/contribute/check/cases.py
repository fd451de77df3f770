"""The models that a spec is tried on: its mini and variants, a given configuration made small, or given weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import DitPatchError, SpecError, quote
from ...spec import mini
from ...spec.model import Spec
from ...spec.recipe import Case


@dataclass(frozen=True)
class Subject:
    """One model to try a spec on: what it is called, its configuration and inputs, the dtypes to try it in.

    `weights` is the folder that holds them, where they are not random; `own`: this is one of the spec's own minis.
    """

    name: str
    case: Case
    dtypes: tuple[torch.dtype, ...]
    weights: Path | None = None
    own: bool = False

    def build(self, spec: Spec, dtype: torch.dtype, device: torch.device | str) -> torch.nn.Module:
        """The model in that dtype: with its own weights, or random ones."""
        if self.weights is None:
            return mini.build(spec, self.case, dtype=dtype).to(device)
        return _loaded(spec, self.weights, dtype).to(device).eval()


def minis(spec: Spec) -> list[Subject]:
    """The spec's mini and each of its variants.

    Raises:
        SpecError: it has none.
    """
    if spec.mini is None:
        raise SpecError(
            f"{spec.position('model')}: without a `mini` (a tiny configuration and its inputs) there is nothing to "
            'try it on; README, "A spec for your model", has one'
        )
    names = (None, *spec.mini.variants)
    both = (torch.float32, torch.bfloat16)
    return [Subject(f"mini {name}" if name else "mini", spec.mini.case(name), both, own=True) for name in names]


def configured(spec: Spec, path: Path) -> Subject:
    """The configuration in a JSON file, such as a checkpoint's `config.json`, with the mini's sizes instead of its own.

    Raises:
        SpecError: there is no mini to take sizes and inputs from.
        DitPatchError: the file cannot be read.
    """
    given = _settings(path, "--config")
    like, case = nearest(spec, given)
    case = case.model_copy(update={"config": shrunk(given, case.config)})
    return Subject(f"{path.name} made small like {like}", case, (torch.float32, torch.bfloat16))


def weighted(spec: Spec, path: Path, dtype: torch.dtype) -> Subject:
    """The model in a folder, or in the folder `transformer` of a pipeline, with the inputs of the mini most like it.

    Raises:
        SpecError: there is no mini to take inputs from.
        DitPatchError: there is no model there.
    """
    folder = next((each for each in (path, path / "transformer") if (each / "config.json").is_file()), None)
    if folder is None:
        raise DitPatchError(f"--model: {quote(path)} has no config.json; give the folder of a saved model or pipeline")
    given = _settings(folder / "config.json", "--model")
    like, case = nearest(spec, given)
    case = case.model_copy(update={"config": {**case.config, **given}})
    return Subject(f"{path.name} with inputs like {like}", case, (dtype,), folder)


def nearest(spec: Spec, config: Mapping[str, Any]) -> tuple[str, Case]:
    """The mini or variant whose modes (flags, words, what is None) are most like those of a configuration."""
    named = {subject.name: subject.case for subject in minis(spec)}
    everything = {name for case in named.values() for name in case.config}

    def unlike(case: Case) -> int:
        return sum(_mode(config.get(name)) != _mode(case.config.get(name)) for name in everything if name in config)

    name = min(named, key=lambda each: unlike(named[each]))
    return name, named[name]


def shrunk(config: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the numbers of `small` wherever both have one: its modes stay, its sizes go."""
    return {
        **small,
        **{
            name: small[name] if name in small and _mode(value) == _mode(small[name]) == "size" else value
            for name, value in config.items()
        },
    }


def _settings(path: Path, flag: str) -> dict[str, Any]:
    """What a model's config.json says of the model, without what diffusers says of itself there."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DitPatchError(f"{flag}: {quote(path)}: {error.strerror}") from error
    except ValueError as error:
        raise DitPatchError(f"{flag}: {quote(path)} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise DitPatchError(f"{flag}: {quote(path)} holds a {type(given).__name__}; expected a model's config.json")
    return {name: value for name, value in given.items() if not name.startswith("_")}


def _mode(value: Any) -> Any:
    """What a value in a configuration says besides how large something is."""
    if isinstance(value, (list, tuple)):
        return "size" if value and all(_mode(item) == "size" for item in value) else str(value)
    return "size" if isinstance(value, (int, float)) and not isinstance(value, bool) else value or None


def _loaded(spec: Spec, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    cls = mini.model_class(spec)
    if not callable(getattr(cls, "from_pretrained", None)):
        raise DitPatchError(
            f"--model: a {cls.__name__} has no `from_pretrained`, and cannot be loaded by itself. Use --config."
        )
    try:
        return cls.from_pretrained(str(folder), torch_dtype=dtype)
    except (OSError, ValueError, TypeError) as error:
        raise DitPatchError(f"--model: {quote(folder)} cannot be loaded as a {cls.__name__}: {error}") from error
