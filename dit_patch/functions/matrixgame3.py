"""MatrixGame 3's rotary embedding, with the expansion of its table apart from its application.

FastVideo expands the table to every token and head anew for each tensor it rotates. Here `expansion` does that, for a
spec to name as a site of its own; what is left is the multiplication.
"""

from __future__ import annotations

import torch


def apply_rope(original, instance, args, kwargs) -> torch.Tensor:
    """For `_apply_rope_with_frame_indices(x, freqs, *, height, width, frame_indices)`: x (B, L, H, D) -> the same."""
    x, freqs, height, width, frames = _arguments(*args, **kwargs)
    if not isinstance(frames, torch.Tensor) or freqs.shape[-1] != x.shape[-1] // 2:
        return original(*args, **kwargs)
    angles = expansion(freqs, frames, height, width)
    pairs = torch.view_as_complex(x.to(torch.float32).reshape(*x.shape[:3], -1, 2))
    return torch.view_as_real(pairs * angles).flatten(3).to(x.dtype)


@torch.amp.autocast("cuda", enabled=False)
def expansion(freqs: torch.Tensor, frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Each token's rotation: (1, F * height * width, H or 1, D / 2) complex64.

    Args:
        freqs: complex128 table by position, (S, D / 2), or by head and position, (H, S, D / 2); its last dimension is
            shared out among time, height and width.
        frames: (F,) positions in time.
    """
    table = freqs.movedim(0, 1) if freqs.dim() == 3 else freqs.unsqueeze(1)
    third = table.shape[-1] // 3
    times, rows, columns = table.split([table.shape[-1] - 2 * third, third, third], dim=-1)
    times = times[frames.to(device=freqs.device, dtype=torch.long)]
    grid = (len(times), height, width, table.shape[1])
    parts = (
        times[:, None, None].expand(*grid, -1),
        rows[None, :height, None].expand(*grid, -1),
        columns[None, None, :width].expand(*grid, -1),
    )
    return torch.cat(parts, dim=-1).reshape(1, -1, *table.shape[1:]).to(torch.complex64)


def _arguments(x, freqs, *, height, width, frame_indices):
    return x, freqs, height, width, frame_indices
