"""The libraries' functions that apply rotary embeddings, in terms of `dit_patch.rotary`.

Each function here replaces one of theirs, and knows its layout and its arithmetic. Tensors that `dit_patch.rotary` does
not take, and training, are left to the original; the report then says why.

`ready` of a function says what answers further calls with tensors of the same shapes, layouts and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..memo.keys import Uncacheable, refuse_autograd
from ..rotary import RotaryError, has_triton, rotary
from ..rotary.ready import ready

_HALF_PRECISION = (torch.bfloat16, torch.float16)


def wan(original, instance, args, kwargs) -> torch.Tensor:
    """Replace the `apply_rotary_emb` in Wan's attention processors: x (B, S, H, D); cos, sin (1, S, 1, D).

    It reads the even entries of cos and the odd ones of sin, and computes in the dtype that x and the table promote to.
    """
    x, cos, sin = _of_wan(*args, **kwargs)
    return turn(x, *_of_pairs(cos, sin), arithmetic=_arithmetic_of_wan(x, cos))


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
    return turn(x, cos, sin, pairs="interleaved" if _is_interleaved(x, cos, neox) else "half")


def _ready_of_wan(args: tuple, kwargs: dict) -> Callable[[tuple, dict], torch.Tensor] | None:
    x, cos, sin = _of_wan(*args, **kwargs)
    arithmetic = _arithmetic_of_wan(x, cos)
    rotation = _ready(x, cos, sin, _of_pairs, arithmetic=arithmetic, is_apart=True)
    return None if rotation is None else lambda args, kwargs: rotation(*_of_wan(*args, **kwargs))


def _ready_of_diffusers(args: tuple, kwargs: dict) -> Callable[[tuple, dict], torch.Tensor] | None:
    x, (cos, sin), _, unbind, sequence = _of_diffusers(*args, **kwargs)
    if sequence == 1:
        rotation = _ready(x, cos, sin, _of_tokens, interleaved=unbind == -1)
    else:  # (B, H, S, D): tokens and heads have changed places, in the tables too
        rotation = _ready(x, cos, sin, _of_tokens_last, interleaved=unbind == -1)

    def call(args: tuple, kwargs: dict) -> torch.Tensor:
        x, (cos, sin), *_ = _of_diffusers(*args, **kwargs)
        return rotation(x, cos, sin)

    return None if rotation is None else call


def _ready_of_fastvideo(args: tuple, kwargs: dict) -> Callable[[tuple, dict], torch.Tensor] | None:
    x, cos, sin, neox = _of_fastvideo(*args, **kwargs)
    rotation = _ready(x, cos, sin, _of_tokens, interleaved=_is_interleaved(x, cos, neox))
    return None if rotation is None else lambda args, kwargs: rotation(*_of_fastvideo(*args, **kwargs)[:3])


wan.ready = _ready_of_wan
diffusers.ready = _ready_of_diffusers
fastvideo.ready = _ready_of_fastvideo


def _of_wan(hidden_states, freqs_cos, freqs_sin):
    return hidden_states, freqs_cos, freqs_sin


def _of_diffusers(x, freqs_cis, use_real=True, use_real_unbind_dim=-1, sequence_dim=2):
    return x, freqs_cis, use_real, use_real_unbind_dim, sequence_dim


def _of_fastvideo(x, cos, sin, is_neox_style):
    return x, cos, sin, is_neox_style


def _arithmetic_of_wan(x: torch.Tensor, cos: torch.Tensor) -> str:
    return "rounded" if x.dtype == cos.dtype and x.dtype in _HALF_PRECISION else "separate"


def _is_interleaved(x: torch.Tensor, cos: torch.Tensor, neox: bool) -> bool:
    return not neox or cos.shape[-1] == x.shape[-1]


def _of_pairs(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the entries that Wan reads, (1, S, 1, D / 2) each."""
    return cos[..., 0::2], sin[..., 1::2]


def _of_tokens(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tables (S, W) as (1, S, 1, W)."""
    return tuple(each[None, :, None] if each.dim() == 2 else each for each in (cos, sin))


def _of_tokens_last(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tables (S, W) as (1, 1, S, W), for heads that come before tokens."""
    return tuple(each[None, None] for each in (cos, sin))


def _ready(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, tables: Callable, **how: Any) -> Any:
    """Return what rotates more tensors of the kind of `x` on a CPU; None where there is nothing sooner than `turn`."""
    rotation = ready(x, cos, sin, tables, **how)
    if rotation is None:
        return None

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        refuse_autograd(x)
        return rotation(x, cos, sin)

    return rotate


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
