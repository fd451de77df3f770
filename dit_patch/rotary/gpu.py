"""The rotation of q and k as one Triton kernel, with the bits of torch's own sequence of kernels.

`launch` takes views of what rotates, the tables, and which of three ways of rounding the eager formula has; it knows
nothing about models, nor about when a fused rotation may stand in for an eager one. Importing this needs Triton.

For whoever is new to Triton: a *program* is what CUDA calls a block. It is written as if it were one thread that
computes with whole arrays, *tiles*, whose sizes are powers of two; what lies outside the tensors is masked. The *grid*
says how many programs are started, and `tl.program_id(axis)` which of them this one is. Here:

- The work is a box: tokens (of all rows of the batch, one after the other), heads, and the columns of a head. A tile is
  TOKENS x HEADS x all columns that rotate.
- Axis 0 of the grid counts tiles along the tokens. Axis 1 shares the heads out: with n programs along it, number j
  takes every n-th tile of heads, beginning with tile j; first those of q, then those of k.
- A program reads the table entries of its tokens once, and keeps them in registers for all heads that it rotates: that
  is what one kernel saves beside the eager formula's many, together with reading and writing q and k once. Where each
  head has entries of its own, a program has one tile of heads.
- `tiling` chooses the sizes: eight elements a thread, few programs enough that entries are reused, many enough that the
  device is busy.

What keeps the bits: all is computed in the dtype that torch would promote to, rounded wherever torch stores a result,
and contracted into an FMA only where torch's own kernel is. The last rests on the launch's `enable_fp_fusion=False`,
which is lost where a kernel is inlined into a compiled graph: whoever calls `launch` has to be an opaque operator.
"""

from __future__ import annotations

import functools
from math import gcd

import torch
import triton
import triton.language as tl

from . import NotExact

_CONTRACTIONS = ("none", "first", "second")


def launch(
    q: torch.Tensor,
    q_out: torch.Tensor,
    k: torch.Tensor | None,
    k_out: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool,
    arithmetic: str,
) -> None:
    """Rotate the pairs of q, and of k, by the tables: `first * cos - second * sin`, `second * cos + first * sin`.

    Args:
        q: (B, S, heads, R) in bf16, fp16 or fp32, R even and at most 256, its last stride 1.
        q_out: Where the result goes, of q's shape and dtype; q itself to rotate in place.
        k: As q, with its own number of heads; or None.
        k_out: As q_out, for k.
        cos: (B or 1, S, heads or 1, W) in fp64, fp32, bf16 or fp16, any strides. W is R, an entry for each member of a
            pair, or R / 2, one for both. In fp64, all is computed in fp64, else in fp32.
        sin: Of the shape and the dtype of cos.
        interleaved: Whether columns 2i and 2i + 1 are a pair; otherwise i and i + R / 2 are.
        arithmetic: "separate", each product and sum rounded once, in the dtype they are computed in; "rounded", the
            products also to q's dtype; "complex", as torch's complex product on this device, which is found out on the
            first call: not one to be captured in a graph.

    Raises:
        NotExact: where torch's complex product is none that the kernel knows.
    """
    contraction = ("none", "none")
    if arithmetic == "complex":
        contraction = _contraction(q.device, cos.dtype)
        if contraction is None:
            raise NotExact(
                f"torch's product of complex numbers on {q.device} is rounded in a way that no kernel here has"
            )
    _launch(q, q_out, k, k_out, cos, sin, interleaved, arithmetic == "rounded", contraction)


@functools.lru_cache
def tiling(tokens: int, heads: int, width: int, processors: int) -> tuple[int, int, int, int]:
    """Return how to cut up the work: a tile's tokens and heads, how many programs share the heads, and their warps.

    Args:
        tokens: Over the whole batch.
        heads: Of each token.
        width: Columns that a load spans, a power of two.
        processors: Of the device: its number of SMs.
    """
    warps = 4 if tokens > 4 * processors else 1
    rows = max(1, 8 * 32 * warps // width)  # eight elements for each thread: 128 bits of bf16
    tile_heads = min(4, rows, _next_power_of_2(heads))
    tile_tokens = rows // tile_heads
    # A program keeps its table entries for all heads that it rotates: no more programs than keep the device busy.
    tiles, wanted = _ceil_div(heads, tile_heads), 64 * processors
    tiles_each = max(1, tiles * _ceil_div(tokens, tile_tokens) * warps // wanted)
    return tile_tokens, tile_heads, _ceil_div(tiles, tiles_each), warps


def _ceil_div(size: int, part: int) -> int:
    return -(-size // part)


def _next_power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _launch(q, q_out, k, k_out, cos, sin, interleaved: bool, rounded: bool, contraction: tuple[str, str]) -> None:
    batch, length, heads, rotary_dim = q.shape
    if k is None:
        k, k_out, k_heads = q, q_out, 0
    else:
        k_heads = k.shape[2]
    tokens, most_heads = batch * length, max(heads, k_heads)
    if tokens * most_heads == 0:
        return
    half = _next_power_of_2(rotary_dim // 2)
    width = 2 * half if interleaved else half
    tile_tokens, tile_heads, programs, warps = tiling(tokens, most_heads, width, _processors(q.device))
    if cos.shape[2] > 1:  # a program has the table entries of one tile of heads
        programs = _ceil_div(most_heads, tile_heads)
    strides = (*q.stride()[:3], *q_out.stride()[:3], *k.stride()[:3], *k_out.stride()[:3])
    table_strides = [table.stride(axis) if table.shape[axis] > 1 else 0 for table in (cos, sin) for axis in (0, 1, 2)]
    # Passed in units as large as possible, which tell the compiler how wide loads may be; 16 elements are enough.
    unit, table_unit = gcd(16, *strides), gcd(16, *table_strides)
    with torch.cuda.device_of(q):
        _rotary_kernel[_ceil_div(tokens, tile_tokens), programs](
            q,
            q_out,
            k,
            k_out,
            cos,
            sin,
            tokens,
            length,
            heads,
            k_heads,
            *(stride // unit for stride in strides),
            *(stride // table_unit for stride in table_strides),
            cos.stride(3),
            sin.stride(3),
            ROTARY_DIM=rotary_dim,
            HALF=half,
            INTERLEAVED=interleaved,
            ENTRY_EACH=cos.shape[3] == rotary_dim,
            ROUNDED=rounded,
            REAL=contraction[0],
            IMAGINARY=contraction[1],
            TOKENS=tile_tokens,
            HEADS=tile_heads,
            UNIT=unit,
            TABLE_UNIT=table_unit,
            INTERPRETED=_INTERPRETED,
            num_warps=warps,
            enable_fp_fusion=False,
        )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _contraction(device: torch.device, dtype: torch.dtype) -> tuple[str, str] | None:
    """Return which product torch contracts into the sum, of the real and of the imaginary part; its builds differ.

    None if no form has torch's bits.
    """
    x, cos, sin = (each.to(device) for each in _probe(dtype))
    expected = _complex_product(x, cos, sin)
    exact: list[list[str]] = [[], []]
    for form in _CONTRACTIONS:
        rotated = torch.empty_like(x)
        _launch(x, rotated, None, None, cos, sin, True, False, (form, form))
        for part, forms in enumerate(exact):
            if torch.equal(rotated[..., part::2].view(torch.int32), expected[..., part::2].view(torch.int32)):
                forms.append(form)
    real, imaginary = exact
    return (real[0], imaginary[0]) if real and imaginary else None


def _complex_product(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    product = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    return torch.view_as_real(product).flatten(-2).to(x.dtype)


def _probe(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, cos and sin whose products cancel in the real part of 32 tokens, in the imaginary part of 32 others.

    What is left there are the roundings alone, and those tell all forms apart, even when rounded from fp64 to fp32.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 96, 2, 64, generator=generator, dtype=torch.float32, device="cpu")
    cos, sin = torch.randn(2, 1, 96, 1, 32, generator=generator, dtype=dtype, device="cpu")
    sin[:, :64] = cos[:, :64]
    x[:, :32, :, 1::2] = x[:, :32, :, 0::2]
    x[:, 32:64, :, 1::2] = -x[:, 32:64, :, 0::2]
    return x, cos, sin


# Only pointers and the tables' columns are specialised on what they are divisible by, or on being 1.
_PLAIN = [
    *("tokens", "length", "q_heads", "k_heads"),
    *(f"{x}_{axis}" for x in ("q", "q_out", "k", "k_out", "cos", "sin") for axis in ("batch", "token", "head")),
]


@triton.jit(do_not_specialize=_PLAIN)
def _rotary_kernel(
    # Pointers to the first element of each tensor.
    q, q_out, k, k_out, cos, sin,
    # Sizes: tokens in the whole batch and in one of its rows, heads.
    tokens, length, q_heads, k_heads,
    # Strides, of q and k and where they go in UNITs, of the tables in TABLE_UNITs; of columns in elements.
    q_batch, q_token, q_head,
    q_out_batch, q_out_token, q_out_head,
    k_batch, k_token, k_head,
    k_out_batch, k_out_token, k_out_head,
    cos_batch, cos_token, cos_head,
    sin_batch, sin_token, sin_head,
    cos_column, sin_column,
    # What follows is known when the kernel is compiled. Layout of pairs and tables:
    ROTARY_DIM: tl.constexpr,
    HALF: tl.constexpr,  # the pairs, up to a power of two
    INTERLEAVED: tl.constexpr,
    ENTRY_EACH: tl.constexpr,  # whether the tables have an entry for each member of a pair
    # Arithmetic:
    ROUNDED: tl.constexpr,
    REAL: tl.constexpr,  # whose product is contracted into the sum: "none", the "first" or the "second" member's
    IMAGINARY: tl.constexpr,
    # Tiles and units:
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    TABLE_UNIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    # 1. Which tokens are this program's, and where their heads begin. int64: a tensor may have over 2^31 elements.
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    row = token < tokens
    batch = (token // length).to(tl.int64)
    token = (token % length).to(tl.int64)
    q += (batch * q_batch + token * q_token) * UNIT
    q_out += (batch * q_out_batch + token * q_out_token) * UNIT
    k += (batch * k_batch + token * k_token) * UNIT
    k_out += (batch * k_out_batch + token * k_out_token) * UNIT

    # 2. Their table entries, read once.
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[None, :, None]
    # Of a tile's full shape even where heads share the entries: each thread then loads its own, at full width.
    here = row & (head < tl.maximum(q_heads, k_heads))
    head = head.to(tl.int64)
    cos += (batch * cos_batch + token * cos_token + head * cos_head) * TABLE_UNIT
    sin += (batch * sin_batch + token * sin_token + head * sin_head) * TABLE_UNIT
    c1, c2 = _entries(cos, cos_column, here, ROTARY_DIM, HALF, INTERLEAVED, ENTRY_EACH)
    s1, s2 = _entries(sin, sin_column, here, ROTARY_DIM, HALF, INTERLEAVED, ENTRY_EACH)

    # 3. q's heads, then k's, which has none if there is no k.
    _rotate(
        q, q_out, q_head, q_out_head, q_heads, row, c1, c2, s1, s2,
        ROTARY_DIM, HALF, INTERLEAVED, ROUNDED, REAL, IMAGINARY, HEADS, UNIT, INTERPRETED,
    )  # fmt: skip
    _rotate(
        k, k_out, k_head, k_out_head, k_heads, row, c1, c2, s1, s2,
        ROTARY_DIM, HALF, INTERLEAVED, ROUNDED, REAL, IMAGINARY, HEADS, UNIT, INTERPRETED,
    )  # fmt: skip


@triton.jit
def _rotate(
    x, out, x_head, out_head, heads, row, c1, c2, s1, s2,
    ROTARY_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROUNDED: tl.constexpr, REAL: tl.constexpr, IMAGINARY: tl.constexpr,
    HEADS: tl.constexpr, UNIT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Rotate this program's tiles of heads by the entries that they share: c1, s1 of firsts, c2, s2 of seconds."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    for start in range(tl.program_id(1) * HEADS, heads, tl.num_programs(1) * HEADS):
        head = (start + tl.arange(0, HEADS))[None, :, None]
        here = row & (head < heads)
        head = head.to(tl.int64)
        a, b = _load(x + head * x_head * UNIT, 1, here, ROTARY_DIM, HALF, INTERLEAVED)
        a, b = a.to(tl.float32).to(c1.dtype), b.to(tl.float32).to(c1.dtype)
        if REAL == "first":
            first = tl.fma(a, c1, -(b * s1))
        elif REAL == "second":
            first = tl.fma(-b, s1, a * c1)
        else:
            first = _times(a, c1, DTYPE, ROUNDED, INTERPRETED) - _times(b, s1, DTYPE, ROUNDED, INTERPRETED)
        if IMAGINARY == "first":
            second = tl.fma(a, s2, b * c2)
        elif IMAGINARY == "second":
            second = tl.fma(b, c2, a * s2)
        else:
            second = _times(b, c2, DTYPE, ROUNDED, INTERPRETED) + _times(a, s2, DTYPE, ROUNDED, INTERPRETED)
        # torch, too, goes from fp64 to the smaller dtypes by way of fp32.
        first = _round(first.to(tl.float32), DTYPE, INTERPRETED)
        second = _round(second.to(tl.float32), DTYPE, INTERPRETED)
        _store(out + head * out_head * UNIT, first, second, here, ROTARY_DIM, HALF, INTERLEAVED)


@triton.jit
def _entries(
    table, column, here,
    ROTARY_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ENTRY_EACH: tl.constexpr,
):  # fmt: skip
    """Load a table's entries for the first and for the second members of the pairs, in the dtype to compute in."""
    if ENTRY_EACH:
        first, second = _load(table, column, here, ROTARY_DIM, HALF, INTERLEAVED)
    else:
        pair = tl.arange(0, HALF)[None, None, :].to(tl.int64)
        first = tl.load(table + pair * column, mask=here & (pair < ROTARY_DIM // 2), other=0.0)
        second = first
    if table.dtype.element_ty != tl.float64:
        first, second = first.to(tl.float32), second.to(tl.float32)
    return first, second


@triton.jit
def _load(x, column, here, ROTARY_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load the first and the second members of all pairs of some heads, whose columns are `column` elements apart."""
    if INTERLEAVED:
        place = tl.arange(0, 2 * HALF)[None, None, :].to(tl.int64)
        both = tl.load(x + place * column, mask=here & (place < ROTARY_DIM), other=0.0)
        first, second = tl.split(tl.reshape(both, [both.shape[0], both.shape[1], HALF, 2]))
    else:
        place = tl.arange(0, HALF)[None, None, :].to(tl.int64)
        here = here & (place < ROTARY_DIM // 2)
        first = tl.load(x + place * column, mask=here, other=0.0)
        second = tl.load(x + (place + ROTARY_DIM // 2) * column, mask=here, other=0.0)
    return first, second


@triton.jit
def _store(out, first, second, here, ROTARY_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Store the members where `_load` finds them."""
    if INTERLEAVED:
        place = tl.arange(0, 2 * HALF)[None, None, :]
        both = tl.reshape(tl.join(first, second), [first.shape[0], first.shape[1], 2 * HALF])
        tl.store(out + place, both, mask=here & (place < ROTARY_DIM))
    else:
        place = tl.arange(0, HALF)[None, None, :]
        here = here & (place < ROTARY_DIM // 2)
        tl.store(out + place, first, mask=here)
        tl.store(out + place + ROTARY_DIM // 2, second, mask=here)


@triton.jit
def _times(x, entry, dtype: tl.constexpr, ROUNDED: tl.constexpr, INTERPRETED: tl.constexpr):
    """Multiply, and round the product as the eager formula does that stores it as a smaller dtype."""
    product = x * entry
    if ROUNDED:
        product = _round(product, dtype, INTERPRETED).to(tl.float32)
    return product


@triton.jit
def _round(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round fp32 values to the nearest ones of a dtype, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's cast truncates
        bits = value.to(tl.int32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(finite, nearest, bits).to(tl.float32, bitcast=True)
    return value.to(dtype)


_INTERPRETED = not isinstance(_rotary_kernel, triton.JITFunction)
