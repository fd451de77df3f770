"""The device and the dtype in which a spec wants the results of a site: `device: model` and `dtype:`."""

from __future__ import annotations

from typing import Any

import torch

from ..memo.results import map_tensors
from ..spec.model import Site
from .scope import Frame


class Output:
    """Puts results where the model runs, once, so that the caller's own `.to()` has nothing left to do."""

    __slots__ = ("dtype", "follows_model")

    def __init__(self, site: Site) -> None:
        #: Whether results are wanted where the model runs.
        self.follows_model = site.device is not None
        self.dtype: torch.dtype | None = getattr(torch, site.dtype) if site.dtype else None

    def __repr__(self) -> str:
        return f"<Output {'on the model, ' * self.follows_model}{self.dtype or 'as it is'}>"

    def device(self, frame: Frame | None) -> torch.device | None:
        """Return where results are wanted; None: wherever they are made."""
        return frame.device if frame is not None and self.follows_model else None

    def place(self, value: Any, frame: Frame | None) -> Any:
        """Return `value` where and as the spec wants it."""
        device = self.device(frame)
        if device is None and self.dtype is None:
            return value
        return map_tensors(lambda tensor: tensor.to(device=device, dtype=self.dtype), value)
