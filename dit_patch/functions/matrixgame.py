"""Matrix-Game's rotary embeddings, with the expansion of their tables apart from their application.

For each tensor that it rotates, FastVideo expands the tables by axis to every token. Here `expansion` does that, which
a spec names as a site of its own; what remains is the rotation.
"""

from __future__ import annotations

import torch

from ..memo.keys import Uncacheable
from .rotary import turn


def causal_rope(original, instance, args, kwargs) -> torch.Tensor:
    """Replace Matrix-Game 2's `causal_rope_apply(x, grid_sizes, freqs, start_frame)`: x (B, L, H, D) -> the same.

    A product of complex128; tokens past the grid are left as they are.
    """
    x, grid, freqs, start = _of_causal(*args, **kwargs)
    if any(type(each) is not int for each in (*grid, start)):
        raise Uncacheable("a grid on the device")
    frames, height, width = grid
    _check(x, freqs)
    angles = expansion(freqs, (start, start + frames), height, width, torch.complex128)
    return turn(x, angles.real, angles.imag, tail=True, arithmetic="complex")


def frame_rope(original, instance, args, kwargs) -> torch.Tensor:
    """Replace Matrix-Game 3's `_apply_rope_with_frame_indices(x, freqs, *, height, width, frame_indices)`.

    x (B, L, H, D) -> the same, by a product of complex64.
    """
    x, freqs, height, width, frames = _of_frames(*args, **kwargs)
    if not isinstance(frames, torch.Tensor):
        raise Uncacheable("numbers of frames on the host")
    _check(x, freqs)
    angles = expansion(freqs, frames, height, width, torch.complex64)
    return turn(x, angles.real, angles.imag, arithmetic="complex")


def expansion(
    freqs: torch.Tensor, frames: torch.Tensor | tuple[int, int], height: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return each token's rotation: (1, F * height * width, H or 1, D / 2) of the complex `dtype`.

    Args:
        freqs: complex128 table by position, (S, D / 2), or by head and position, (H, S, D / 2); its last dimension is
            shared out among time, height and width.
        frames: (F,) positions in time, or the first and the one after the last.
    """
    table = freqs.movedim(0, 1) if freqs.dim() == 3 else freqs.unsqueeze(1)
    third = table.shape[-1] // 3
    times, rows, columns = table.split([table.shape[-1] - 2 * third, third, third], dim=-1)
    if isinstance(frames, tuple):
        times = times[slice(*frames)]
    else:
        times = times[frames.to(device=freqs.device, dtype=torch.long)]
    grid = (len(times), height, width, table.shape[1])
    parts = (
        times[:, None, None].expand(*grid, -1),
        rows[None, :height, None].expand(*grid, -1),
        columns[None, None, :width].expand(*grid, -1),
    )
    return torch.cat(parts, dim=-1).reshape(1, -1, *table.shape[1:]).to(dtype)


def _check(x: torch.Tensor, freqs: torch.Tensor) -> None:
    if freqs.shape[-1] != x.shape[-1] // 2:
        raise Uncacheable(f"a table {tuple(freqs.shape)} for {tuple(x.shape)}")


def _of_causal(x, grid_sizes, freqs, start_frame=0):
    return x, grid_sizes, freqs, start_frame


def _of_frames(x, freqs, *, height, width, frame_indices):
    return x, freqs, height, width, frame_indices
