"""Which of several attention kernels computes: a guard for results that have attention in them."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from ..upstream import diffusers_internals


def backends() -> Hashable:
    """Return diffusers' attention backend, and the kernels that torch may choose from. For `reads:`.

    `model.set_attention_backend()` sets diffusers' own for all models besides the model's.
    """
    cuda = torch.backends.cuda
    return (
        diffusers_internals.attention_backend(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
