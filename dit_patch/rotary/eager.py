"""The rotation of pairs as models write it: a torch operation for each product and sum, over the whole tensor.

The reference for `gpu` and `cpu`, and the fallback where neither works.
"""

from __future__ import annotations

import torch


def rotate(
    x: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, arithmetic: str
) -> None:
    """Rotate all of `x` into `out`, which may be `x` itself.

    Args:
        x, out: (..., S, H, R) of one dtype.
        cos, sin: what broadcasts to that, real and of one dtype; with R / 2 entries, or R, for the two of each pair.
        interleaved: pairs are (2i, 2i + 1) rather than (i, i + R / 2).
        arithmetic: "separate", "rounded" or "complex", see `dit_patch.rotary.rotary`.
    """
    compute = x.dtype if arithmetic == "rounded" else compute_dtype(cos)
    first, second = (each.to(compute) for each in pairs(x, interleaved))
    cosines, sines = ([each.to(compute) for each in entries(table, x, interleaved)] for table in (cos, sin))
    if arithmetic == "complex":
        product = torch.complex(first, second) * torch.complex(cosines[0], sines[0])
        rotated = product.real, product.imag
    else:
        rotated = first * cosines[0] - second * sines[0], second * cosines[1] + first * sines[1]
    for each, place in zip(rotated, pairs(out, interleaved)):
        place.copy_(each)


def compute_dtype(table: torch.Tensor) -> torch.dtype:
    """Return the dtype that a product with the table is computed in: float64 if the table is, else float32."""
    return torch.float64 if table.dtype == torch.float64 else torch.float32


def pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first and the second members of the pairs, as views of R / 2 columns."""
    half = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def entries(table: torch.Tensor, x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the table's entries for the first and for the second members of the pairs."""
    return pairs(table, interleaved) if table.shape[-1] == x.shape[-1] else (table, table)
