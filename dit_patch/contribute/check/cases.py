"""The models to try a spec on: its mini and variants, a given configuration made small, or given weights."""

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

_CONFIG = "config.json"


@dataclass(frozen=True)
class Subject:
    """One model to try a spec on.

    Attributes:
        name: for messages.
        case: its configuration and inputs.
        dtypes: to try it in.
        weights: the folder with its weights; None for random ones.
        is_own_mini: it is the mini of the spec, or one of its variants.
    """

    name: str
    case: Case
    dtypes: tuple[torch.dtype, ...]
    weights: Path | None = None
    is_own_mini: bool = False

    def build(self, spec: Spec, dtype: torch.dtype, device: torch.device | str) -> torch.nn.Module:
        """Build the model in that dtype, with its own weights or random ones."""
        if self.weights is None:
            return mini.build(spec, self.case, dtype=dtype).to(device)
        return _load(spec, self.weights, dtype).to(device).eval()


def minis(spec: Spec) -> list[Subject]:
    """Return the spec's mini and each of its variants.

    Raises:
        SpecError: the spec has no mini.
    """
    if spec.mini is None:
        raise SpecError(
            f"{spec.position('model')}: without a `mini` (a tiny configuration and its inputs) there is nothing to "
            "try it on; docs/specs.md has one"
        )
    names = (None, *spec.mini.variants)
    both = (torch.float32, torch.bfloat16)
    return [Subject(f"mini {name}" if name else "mini", spec.mini.case(name), both, is_own_mini=True) for name in names]


def from_config(spec: Spec, path: Path) -> Subject:
    """Return the model of a JSON file, such as a checkpoint's `config.json`, with the sizes of the spec's mini.

    Raises:
        SpecError: there is no mini to take sizes and inputs from.
        DitPatchError: the file cannot be read.
    """
    config = without_diffusers_own(read_config(path, "--config"))
    like, case = nearest_mini(spec, config)
    case = case.model_copy(update={"config": shrink(config, case.config)})
    return Subject(f"{path.name} made small like {like}", case, (torch.float32, torch.bfloat16))


def from_weights(spec: Spec, path: Path, dtype: torch.dtype) -> Subject:
    """Return the model in a folder, or in a pipeline's folder `transformer`, with the inputs of the nearest mini.

    Raises:
        SpecError: there is no mini to take inputs from.
        DitPatchError: the folder has no model.
    """
    file = find_config(path)
    config = without_diffusers_own(read_config(file, "--model"))
    like, case = nearest_mini(spec, config)
    case = case.model_copy(update={"config": {**case.config, **config}})
    return Subject(f"{path.name} with inputs like {like}", case, (dtype,), file.parent)


def nearest_mini(spec: Spec, config: Mapping[str, Any]) -> tuple[str, Case]:
    """Return the mini or variant whose modes (flags, words, what is None) are most like those of a configuration."""
    cases = {subject.name: subject.case for subject in minis(spec)}
    everything = {name for case in cases.values() for name in case.config}

    def count_differences(case: Case) -> int:
        return sum(_mode(config.get(name)) != _mode(case.config.get(name)) for name in everything if name in config)

    name = min(cases, key=lambda each: count_differences(cases[each]))
    return name, cases[name]


def shrink(config: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with the numbers of `small` wherever both have one: its modes stay, its sizes change."""
    return {
        **small,
        **{
            name: small[name] if name in small and _mode(value) == _mode(small[name]) == "size" else value
            for name, value in config.items()
        },
    }


def find_config(path: Path) -> Path:
    """Return the config.json of the model in a folder, or in a pipeline's folder `transformer`.

    Raises:
        DitPatchError: the folder has no model.
    """
    found = next((each for each in (path / _CONFIG, path / "transformer" / _CONFIG) if each.is_file()), None)
    if found is None:
        raise DitPatchError(f"--model: {quote(path)} has no config.json; give the folder of a saved model or pipeline")
    return found


def read_config(path: Path, flag: str) -> dict[str, Any]:
    """Return the content of a model's config.json; entries of diffusers itself begin with an underscore.

    Raises:
        DitPatchError: it cannot be read, or is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DitPatchError(f"{flag}: {quote(path)}: {error.strerror}") from error
    except ValueError as error:
        raise DitPatchError(f"{flag}: {quote(path)} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DitPatchError(f"{flag}: {quote(path)} holds a {type(content).__name__}; expected a model's config.json")
    return content


def without_diffusers_own(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the entries of diffusers itself."""
    return {name: value for name, value in content.items() if not name.startswith("_")}


def is_size(value: Any) -> bool:
    """Return whether a value of a configuration is a number, or numbers, rather than a mode."""
    return _mode(value) == "size"


def _mode(value: Any) -> Any:
    """Return a value of a configuration without its size: "size" for numbers, else the value."""
    if isinstance(value, (list, tuple)):
        return "size" if value and all(_mode(item) == "size" for item in value) else str(value)
    return "size" if isinstance(value, (int, float)) and not isinstance(value, bool) else value or None


def _load(spec: Spec, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    cls = mini.model_class(spec)
    if not callable(getattr(cls, "from_pretrained", None)):
        raise DitPatchError(
            f"--model: a {cls.__name__} has no `from_pretrained`, and cannot be loaded by itself. Use --config."
        )
    try:
        return cls.from_pretrained(str(folder), torch_dtype=dtype)
    except (OSError, ValueError, TypeError) as error:
        raise DitPatchError(f"--model: {quote(folder)} cannot be loaded as a {cls.__name__}: {error}") from error
