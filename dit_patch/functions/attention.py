"""Which of several attention kernels computes: what counts for a result that has attention in it."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from ..upstream import diffusers_internals


def backends() -> Hashable:
    """For `reads:` diffusers' attention backend, and those that torch may choose from.

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
