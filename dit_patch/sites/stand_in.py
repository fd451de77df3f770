"""What to hand out in place of a result that is computed for nobody: small, and useless to whoever reads it."""

from __future__ import annotations

from typing import Any

import torch

from ..memo.store import map_tensors


def stand_in(result: Any, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """Like `result`, with NaN (0, where there is none) in its tensors and a flex BlockMask that fits no sequence.

    Tensors have their shapes, but only one element of memory; they are on `device` and of `dtype` if given.
    """
    if type(result).__name__ == "BlockMask":
        return _fits_nothing(result, device)
    if isinstance(result, (tuple, list)) and not hasattr(result, "_fields"):
        return type(result)(stand_in(item, device, dtype) for item in result)
    return map_tensors(lambda tensor: _unreadable(tensor, device or tensor.device, dtype or tensor.dtype), result)


def _unreadable(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    special = dtype.is_floating_point or dtype.is_complex
    return torch.full((), float("nan") if special else 0, dtype=dtype, device=device).expand(tensor.shape)


def _fits_nothing(mask: Any, device: torch.device | None) -> Any:
    """A mask of one query and one key: flex_attention refuses it for any others."""
    blocks = torch.zeros((1, 1, 1), dtype=torch.int32, device=device or mask.kv_num_blocks.device)
    indices = blocks.unsqueeze(-1)
    return type(mask).from_kv_blocks(blocks, indices, BLOCK_SIZE=mask.BLOCK_SIZE, seq_lengths=(1, 1))
