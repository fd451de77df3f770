"""Rotation of pairs on a CPU, a run of tokens at a time, so that what lies between two operations stays in its cache.

Where that gives the same bits, a run is one complex product; elsewhere it is `eager` on that run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import eager

RUN = 1 << 18  # elements, per thread
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# In what is left over of its vectors of 8 pairs, torch's complex product fuses multiplication and addition.
WHOLE_VECTORS = 16


def rotate(
    x: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, arithmetic: str
) -> None:
    """As `eager.rotate`: x and out (B, S, H, R), cos and sin (B or 1, S, H or 1, R or R / 2)."""
    vectors = x.shape[-1] % WHOLE_VECTORS == 0
    if arithmetic == "complex" and not vectors:
        # Which elements are left over depends on the shape of the whole.
        return eager.rotate(x, out, cos, sin, interleaved=interleaved, arithmetic=arithmetic)
    table = complex_table(x, cos, sin) if vectors and interleaved and arithmetic != "rounded" else None
    if table is None:
        for run in _runs(x, out, cos, sin):
            eager.rotate(*run, interleaved=interleaved, arithmetic=arithmetic)
    elif x.dtype == table.real.dtype and x.is_contiguous() and out.is_contiguous():
        torch.mul(_as_pairs(x), table, out=_as_pairs(out))  # nothing lies in between
    else:
        for run in _runs(x, out, table):
            _multiply(*run)


def _runs(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Split the tensors into runs of tokens, as views; a run is a part of one row of the batch, or several rows.

    The first tensor has the whole batch; the others may have one row for all.
    """
    batch, length, heads, width = tensors[0].shape
    tokens = max(1, RUN * torch.get_num_threads() // (heads * width))
    if batch * length <= tokens:
        yield tensors
        return
    rows = max(1, tokens // length)
    for row in range(0, batch, rows):
        of_rows = [each[row : row + rows] if each.shape[0] > 1 else each for each in tensors]
        for start in range(0, length, tokens):
            yield tuple(each[:, start : start + tokens] for each in of_rows)


def complex_table(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
    """Return the table as complex numbers, one for each pair; None if its entries for the two of a pair differ."""
    (c, c_of_second), (s, s_of_second) = (eager.entries(table, x, True) for table in (cos, sin))
    if c is not c_of_second and not (_same(c, c_of_second) and _same(s, s_of_second)):
        return None
    compute = eager.compute_dtype(cos)
    return torch.complex(c.to(compute), s.to(compute))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = _BITS[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))  # 0.0 is not -0.0


def _multiply(x: torch.Tensor, out: torch.Tensor, table: torch.Tensor) -> None:
    pairs = x.to(table.real.dtype, memory_format=torch.contiguous_format, copy=True)
    _as_pairs(pairs).mul_(table)
    out.copy_(pairs)


def _as_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
