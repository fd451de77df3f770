"""Rotary position embeddings applied in one pass, equal in every bit to what models do in many operations.

    q = rotary(q, cos, sin)                 # a new tensor
    rotary_qk_(q, k, cos, sin)              # both in place, in one launch

Both are operations of `torch.ops.dit_patch`, opaque to compilers. They run as a Triton kernel on a GPU (`gpu`), in runs
of tokens on a CPU (`cpu`), and as plain torch (`eager`) elsewhere. The room knows nothing about models, specs or
patches.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from ..errors import DitPatchError, quote, suggest
from ..upstream.torch_internals import count_dispatch_modes, count_function_modes, is_functorch_active, storage_id
from . import cpu, eager

__all__ = ["Arithmetic", "NotExact", "Pairs", "RotaryError", "has_triton", "rotary", "rotary_qk_"]

Pairs = Literal["interleaved", "half"]
Arithmetic = Literal["separate", "rounded", "complex"]
_PAIRS = {"interleaved": True, "half": False}
_ARITHMETIC = ("separate", "rounded", "complex")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TABLES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_DIM = 256


class RotaryError(DitPatchError, ValueError):
    """Tensors that cannot be rotated, or an option that does not exist."""


class NotExact(RotaryError):
    """No form of the kernel has the bits of torch's own complex product on this device."""


def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    pairs: Pairs = "interleaved",
    arithmetic: Arithmetic = "separate",
    rotary_dim: int | None = None,
) -> torch.Tensor:
    """Rotate each pair (a, b) of `x` to (a cos - b sin, b cos + a sin), in a new tensor with the strides of `x`.

    Args:
        x: (B, S, H, D) queries or keys, bfloat16, float16 or float32.
        cos: (S', W), (B or 1, S', W) or (B or 1, S', H or 1, W), float32, float64, bfloat16 or float16, with any
            strides. W is `rotary_dim`, an entry for each member of a pair, or half of it, an entry for each pair.
            Tokens from S' <= S on are copied as they are.
        sin: as `cos`.
        pairs: "interleaved", (2i, 2i + 1), or "half", (i, i + rotary_dim / 2).
        arithmetic: "separate" rounds each product and each sum once, in float64 where the tables are, else in float32;
            "rounded" rounds each product to the dtype of `x`, which the tables must have, as operations on such tensors
            do; "complex" is a product of complex tensors, as torch computes it on that device.
        rotary_dim: how many of the D elements of a head rotate, an even number up to 256; all by default. The others
            are copied.

    Raises:
        RotaryError: where that does not fit together, or autograd is recording, for which there is no backward.
        NotExact: with "complex", where torch's product on that device is none that the kernel knows.
    """
    cos, sin, width = _check((x,), cos, sin, pairs, arithmetic, rotary_dim)
    if x.stride(-1) != 1:
        x = x.contiguous()
    run = torch.ops.dit_patch.rotary if _is_seen_by_others() else _rotary
    return run(x, cos, sin, width, _PAIRS[pairs], arithmetic)


def rotary_qk_(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    pairs: Pairs = "interleaved",
    arithmetic: Arithmetic = "separate",
    rotary_dim: int | None = None,
) -> None:
    """Rotate `q` (B, S, Hq, D) and `k` (B, S, Hk, D) in place, as `rotary` does; `k` may have fewer heads, or be None.

    Raises:
        RotaryError: as `rotary`; and where the last dimension of `q` or `k` is strided.
        NotExact: as `rotary`.
    """
    given = (q,) if k is None else (q, k)
    cos, sin, width = _check(given, cos, sin, pairs, arithmetic, rotary_dim)
    for each in given:
        if each.stride(-1) != 1:
            raise RotaryError(f"to be rotated where it is, a tensor needs a last stride of 1, not {each.stride(-1)}")
    if k is not None and _share_memory(q, k):
        raise RotaryError("q and k share memory, which would be rotated twice")
    run = torch.ops.dit_patch.rotary_qk_ if _is_seen_by_others() else _rotary_qk_
    run(q, k, cos, sin, width, _PAIRS[pairs], arithmetic)


def _is_seen_by_others() -> bool:
    """Return whether a compiler, a mode or a transform looks on: for them it is one operation, which takes its time."""
    is_traced = torch.compiler.is_compiling() or is_functorch_active()
    return is_traced or bool(count_dispatch_modes() or count_function_modes())


def _share_memory(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Return whether an element of one may be one of the other: not if they lie token by token side by side."""
    if torch.compiler.is_compiling() or not (q.numel() and k.numel()) or storage_id(q) != storage_id(k):
        return False
    first, second = sorted((q, k), key=torch.Tensor.data_ptr)
    gap = (second.data_ptr() - first.data_ptr()) // first.element_size()
    if gap >= _extent(first):
        return False
    token = first.stride(1)
    if first.stride()[:2] != second.stride()[:2] or not token or first.stride(0) % token:
        return True
    return not _extent(first[:1, :1]) <= gap % token <= token - _extent(second[:1, :1])


def _extent(x: torch.Tensor) -> int:
    """Return the number of elements from a tensor's first to its last, with all that lie in between."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))


@cache
def has_triton() -> bool:
    """Return whether Triton is there; without it, all works on a GPU too, but is no faster than the original."""
    return find_spec("triton") is not None


def _check(given, cos, sin, pairs, arithmetic, rotary_dim) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the tables as (B or 1, S', H or 1, W), and how many elements of a head rotate.

    Raises:
        RotaryError: something is wrong with the tensors or with an option.
    """
    for name, word, known in (("pairs", pairs, _PAIRS), ("arithmetic", arithmetic, _ARITHMETIC)):
        if word not in known:
            hint = suggest(str(word), known) or "."
            raise RotaryError(f"no {name} {quote(word)}{hint} Known: {', '.join(known)}.")
    for x in given:
        if x.dim() != 4 or x.dtype not in _DTYPES:
            raise RotaryError(f"expected (B, S, H, D) in bfloat16, float16 or float32, got {_describe(x)}")
    x = given[0]
    width = x.shape[-1] if rotary_dim is None else rotary_dim
    if width % 2 or not 0 < width <= min(MAX_DIM, x.shape[-1]):
        raise RotaryError(f"rotary_dim={width}: an even number up to {min(MAX_DIM, x.shape[-1])} is needed")
    if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.dtype not in _TABLES:
        raise RotaryError(f"cos and sin are real and alike; got {_describe(cos)} and {_describe(sin)}")
    if arithmetic == "rounded" and cos.dtype != x.dtype:
        raise RotaryError(f'"rounded" needs tables of the dtype of x, {x.dtype}; got {cos.dtype}')
    if arithmetic == "complex" and cos.dtype not in (torch.float32, torch.float64):
        raise RotaryError(f'"complex" needs tables in float32 or float64, got {cos.dtype}')
    if cos.dim() < 4:
        cos, sin = ((each[None] if each.dim() == 2 else each).unsqueeze(-2) for each in (cos, sin))
    for x in given:
        fits = cos.dim() == 4 and cos.shape[0] in (1, x.shape[0]) and cos.shape[2] in (1, x.shape[2])
        if not fits or cos.shape[1] > x.shape[1] or cos.shape[3] not in (width, width // 2):
            raise RotaryError(f"tables {tuple(cos.shape)} do not fit {_describe(x)} of which {width} elements rotate")
        if torch.is_grad_enabled() and (x.requires_grad or cos.requires_grad or sin.requires_grad):
            raise RotaryError("autograd is recording, and rotary has no backward; use it under torch.no_grad()")
        if x.device != cos.device or x.device != sin.device or x.dtype != given[0].dtype:
            raise RotaryError(f"tensors of one device and dtype are needed; got {_describe(x)} and {_describe(cos)}")
    return cos, sin, width


def _describe(x: torch.Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


_library = torch.library.Library("dit_patch", "FRAGMENT")
_library.define(
    "rotary(Tensor x, Tensor cos, Tensor sin, int rotary_dim, bool interleaved, str arithmetic) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "rotary_qk_(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, int rotary_dim, bool interleaved, str arithmetic)"
    " -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _rotary(x, cos, sin, rotary_dim: int, interleaved: bool, arithmetic: str) -> torch.Tensor:
    out = torch.empty_like(x)
    rows, place = cos.shape[1], out
    if rows < x.shape[1]:
        out[:, rows:].copy_(x[:, rows:])
        x, place = x[:, :rows], out[:, :rows]
    if rotary_dim < x.shape[3]:
        place[..., rotary_dim:].copy_(x[..., rotary_dim:])
        x, place = x[..., :rotary_dim], place[..., :rotary_dim]
    _rotate(x, place, None, None, cos, sin, interleaved, arithmetic)
    return out


def _rotary_qk_(q, k, cos, sin, rotary_dim: int, interleaved: bool, arithmetic: str) -> None:
    q, k = (each if each is None else each[:, : cos.shape[1], :, :rotary_dim] for each in (q, k))
    _rotate(q, q, k, k, cos, sin, interleaved, arithmetic)


def _rotate(q, q_out, k, k_out, cos, sin, interleaved: bool, arithmetic: str) -> None:
    if q.numel() == 0:
        return
    if q.is_cuda and has_triton():
        from . import gpu

        gpu.launch(q, q_out, k, k_out, cos, sin, interleaved=interleaved, arithmetic=arithmetic)
        return
    rotate = cpu.rotate if q.device.type == "cpu" else eager.rotate
    for x, out in ((q, q_out), (k, k_out)):
        if x is not None:
            rotate(x, out, cos, sin, interleaved=interleaved, arithmetic=arithmetic)


_library.impl("rotary", _rotary, "CompositeExplicitAutograd")
_library.impl("rotary_qk_", _rotary_qk_, "CompositeExplicitAutograd")
torch.library.register_fake("dit_patch::rotary", lambda x, *_: torch.empty_like(x), lib=_library)
torch.library.register_fake("dit_patch::rotary_qk_", lambda *_: None, lib=_library)
