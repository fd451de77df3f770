"""Models of transformers, which are built from a configuration object that fills in defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def prepare() -> None:
    """Do nothing: there is nothing to prepare."""


def defaults(cls: type[torch.nn.Module]) -> dict[str, Any]:
    """Return what the class's configuration holds where nothing is said."""
    return cls.config_class().to_dict()


def build(cls: type[torch.nn.Module], config: Mapping[str, Any]) -> torch.nn.Module:
    """Build the model of a configuration as config.json has it."""
    return cls(cls.config_class(**config))
