"""A rotation on a CPU of which everything is decided but the numbers: for tensors of one shape, layout and dtype.

Models rotate the queries and keys of every block by the same tables. What is made of these is kept for the next call,
so that a call is one product, or four operations where torch's complex product would not have the same bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..upstream.torch_internals import tensor_version
from . import eager
from .cpu import RUN, WHOLE_VECTORS, complex_table

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class ReadyRotation:
    """Rotates whole heads of tensors of one shape, (B, S, H, D), by tables of one shape, as `rotary` does.

    Args:
        shape: that of the tensors.
        tables: makes of the tables that calls are given those that broadcast to x, with D or D / 2 entries.
        interleaved, arithmetic: as `dit_patch.rotary.rotary` has them.
        is_apart: the two members of each pair are rounded to the dtype of x apart from each other. The bits of a NaN
            depend on that.
    """

    def __init__(
        self, shape: torch.Size, tables: Callable[..., tuple], *, interleaved: bool, arithmetic: str, is_apart: bool
    ) -> None:
        half = shape[-1] // 2
        self._shape, self._in_pairs = shape, (*shape[:-1], *((half, 2) if interleaved else (2, half)))
        self._tables, self._interleaved, self._arithmetic = tables, interleaved, arithmetic
        self._is_apart = is_apart
        #: The tables of the last call, weakly, with their versions, and what was made of them; one object, as another
        #: thread may come with other tables at any time.
        self._known: tuple[Any, ...] = (lambda: None, lambda: None, 0, 0, ())

    def __repr__(self) -> str:
        return f"<ReadyRotation: {'one product' if len(self._known[-1]) == 1 else 'four operations'}>"

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return the rotated tensor."""
        of_cos, of_sin, cos_version, sin_version, made = self._known
        is_known = of_cos() is cos and of_sin() is sin
        if not (is_known and tensor_version(cos) == cos_version and tensor_version(sin) == sin_version):
            versions = tensor_version(cos), tensor_version(sin)
            made = self._make(x, cos, sin)
            self._known = weakref.ref(cos), weakref.ref(sin), *versions, made
        rotated = self._multiply(x, *made) if len(made) == 1 else self._turn(x, *made)
        if rotated.dtype is x.dtype:
            return rotated
        if not self._is_apart:
            return rotated.to(x.dtype)
        out = torch.empty_like(x)
        for place, value in zip(eager.pairs(out, self._interleaved), eager.pairs(rotated, self._interleaved)):
            place.copy_(value)
        return out

    def _make(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return one complex table, where a product has the bits that are wanted; else cosines and signed sines."""
        tables = self._tables(cos, sin)
        if self._interleaved and self._arithmetic == "separate" and x.shape[-1] % WHOLE_VECTORS == 0:
            product = complex_table(x, *tables)
            if product is not None:
                return (product,)
        (c, c_of_second), (s, s_of_second) = (eager.entries(table, x, self._interleaved) for table in tables)
        compute = x.dtype if self._arithmetic == "rounded" else eager.compute_dtype(cos)
        at = -1 if self._interleaved else -2
        cosines, sines = torch.stack((c, c_of_second), dim=at), torch.stack((-s, s_of_second), dim=at)
        return cosines.to(compute), sines.to(compute)

    def _multiply(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        pairs = x.view(self._in_pairs)
        if x.dtype is not torch.float32 or table.dtype is not torch.complex64:
            pairs = pairs.to(table.real.dtype)
        return torch.view_as_real(torch.view_as_complex(pairs) * table).view(self._shape)

    def _turn(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        pairs = x.view(self._in_pairs).to(cosines.dtype)
        others = pairs.flip(-1 if self._interleaved else -2)
        # (a cos - b sin, b cos + a sin): a sum with the negated product has the bits of the difference.
        return (pairs * cosines).add_(others.mul_(sines)).view(self._shape)


def ready(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    tables: Callable[..., tuple],
    *,
    interleaved: bool = True,
    arithmetic: str = "separate",
    is_apart: bool = False,
) -> ReadyRotation | None:
    """Return what rotates further tensors like these; None where `rotary` is to decide at each call."""
    given = (x, cos, sin)
    if any(type(each) is not torch.Tensor or each.device.type != "cpu" or each.is_inference() for each in given):
        return None
    is_taken = x.dtype in _DTYPES and x.is_contiguous() and 0 < x.numel() <= RUN * torch.get_num_threads()
    if not is_taken or arithmetic == "complex" or cos.requires_grad or sin.requires_grad:
        return None
    return ReadyRotation(x.shape, tables, interleaved=interleaved, arithmetic=arithmetic, is_apart=is_apart)
