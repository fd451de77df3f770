"""The libraries' functions that apply rotary embeddings, in terms of `dit_patch.rotary`.

Each function here replaces one of theirs, and knows its layout and its arithmetic. Tensors that `dit_patch.rotary` does
not take, and training, are left to the original; the report then says why.
"""

from __future__ import annotations

import torch

from ..memo.keys import Uncacheable, refuse_autograd
from ..rotary import RotaryError, has_triton, rotary

_HALF_PRECISION = (torch.bfloat16, torch.float16)


def wan(original, instance, args, kwargs) -> torch.Tensor:
    """Replace the `apply_rotary_emb` in Wan's attention processors: x (B, S, H, D); cos, sin (1, S, 1, D).

    It reads the even entries of cos and the odd ones of sin, and computes in the dtype that x and the table promote to.
    """
    x, cos, sin = _of_wan(*args, **kwargs)
    products = x.dtype == cos.dtype and x.dtype in _HALF_PRECISION
    arithmetic = "rounded" if products else "separate"
    return turn(x, cos[..., 0::2], sin[..., 1::2], arithmetic=arithmetic)


def diffusers(original, instance, args, kwargs) -> torch.Tensor:
    """Replace `diffusers.models.embeddings.apply_rotary_emb`: x (B, H, S, D), or (B, S, H, D) with sequence_dim=1.

    Real tables only, (S, D) each. Whatever their dtype, it computes in float32 at the least.
    """
    x, tables, real, unbind, sequence = _of_diffusers(*args, **kwargs)
    if not real or sequence not in (1, 2) or unbind not in (-1, -2):
        raise Uncacheable("a complex table" if not real else "dimensions that are none")
    cos, sin = tables
    if cos.shape[-1] != x.shape[-1]:
        raise Uncacheable(f"tables {tuple(cos.shape)} for {tuple(x.shape)}")
    pairs = "interleaved" if unbind == -1 else "half"
    if sequence == 1:
        return turn(x, cos, sin, pairs=pairs)
    return turn(x.transpose(1, 2), cos, sin, pairs=pairs).transpose(1, 2)


def fastvideo(original, instance, args, kwargs) -> torch.Tensor:
    """Replace FastVideo's `_apply_rotary_emb(x, cos, sin, is_neox_style)`: x (B, S, H, D); tables (S, D or D / 2).

    Full tables are for interleaved pairs whatever the style. float64 tables make it compute in float64.
    """
    x, cos, sin, neox = _of_fastvideo(*args, **kwargs)
    full = cos.shape[-1] == x.shape[-1]
    return turn(x, cos, sin, pairs="half" if neox and not full else "interleaved")


def _of_wan(hidden_states, freqs_cos, freqs_sin):
    return hidden_states, freqs_cos, freqs_sin


def _of_diffusers(x, freqs_cis, use_real=True, use_real_unbind_dim=-1, sequence_dim=2):
    return x, freqs_cis, use_real, use_real_unbind_dim, sequence_dim


def _of_fastvideo(x, cos, sin, is_neox_style):
    return x, cos, sin, is_neox_style


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, tail: bool = False, **how: str) -> torch.Tensor:
    """Rotate whole heads, x (B, S, H, D), with table entries for each token.

    Args:
        tail: whether tokens after the last that has table entries are left as they are.
        how: the other options of `dit_patch.rotary.rotary`.

    Raises:
        Uncacheable: the original is to be called instead, for this reason.
    """
    refuse_autograd(x)
    if x.is_cuda and not has_triton():
        raise Uncacheable("triton is not installed")
    if not _has_entries(x, cos, tail):
        raise Uncacheable(f"tables {tuple(cos.shape)} for {tuple(x.shape)}")
    try:
        return rotary(x, cos, sin, **how)
    except RotaryError as error:
        raise Uncacheable(str(error)) from error


def _has_entries(x: torch.Tensor, table: torch.Tensor, tail: bool) -> bool:
    if x.dim() != 4 or table.dim() not in (2, 4):
        return False
    tokens = table.shape[0 if table.dim() == 2 else 1]
    return tokens == x.shape[1] or tail and tokens < x.shape[1]
