"""Models whose modulation begins at zero, with random weights in its place: else no block would change anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def prepare() -> None:
    """Do nothing: there is nothing to prepare."""


def build(cls: type[torch.nn.Module], config: Mapping[str, Any]) -> torch.nn.Module:
    """Build the model, with small random numbers in each parameter that is all zeros."""
    model = cls(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_meta and not parameter.any():
                parameter.normal_(std=0.1)
    return model
