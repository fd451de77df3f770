"""Models of transformers, which are built from a configuration object, in whose constructor defaults are filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def prepare() -> None:
    """Nothing to prepare."""


def build(cls: type[torch.nn.Module], config: Mapping[str, Any]) -> torch.nn.Module:
    """The model of a configuration as config.json has it."""
    return cls(cls.config_class(**config))
