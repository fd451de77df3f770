"""Rotations of which all is decided but the numbers have the bits of the libraries' own functions."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from dit_patch.functions import rotary as functions
from dit_patch.memo.keys import Uncacheable, same_bits
from dit_patch.rotary import RotaryError, rotary_qk_

SHAPES = [(1, 8, 1, 12), (2, 5, 3, 16), (1, 32, 12, 128), (1, 7, 2, 6)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def of_wan(hidden_states, freqs_cos, freqs_sin):
    x1, x2 = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs_cos[..., 0::2], freqs_sin[..., 1::2]
    out = torch.empty_like(hidden_states)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(hidden_states)


def of_diffusers(*args, **kwargs):
    return pytest.importorskip("diffusers.models.embeddings").apply_rotary_emb(*args, **kwargs)


def of_fastvideo(*args):
    return pytest.importorskip("fastvideo.layers.rotary_embedding")._apply_rotary_emb(*args)


def tables(tokens, width, dtype, expand):
    cos, sin = (torch.randn(tokens, width // 2).to(dtype) for _ in range(2))
    cos[0, 0], sin[0, 1] = 0.0, -0.0
    return tuple(expand(each) for each in (cos, sin))


def twice(table):
    return table.repeat_interleave(2, -1)


def odd(shape, dtype):
    """Numbers with zeros of both signs, infinities and a NaN among them; no pair with two NaNs, as either may win."""
    x = torch.randn(shape).to(dtype)
    x.view(-1)[:6] = torch.tensor([float("inf"), 1.0, float("nan"), 0.0, -0.0, -float("inf")]).to(dtype)
    return x


def wan(shape, dtype, table):
    cos, sin = tables(shape[1], shape[3], table, twice)
    return functions.wan, of_wan, (odd(shape, dtype), cos[None, :, None], sin[None, :, None]), {}


def diffusers_heads_first(shape, dtype, table):
    x = odd(shape, dtype).transpose(1, 2).contiguous()
    return functions.diffusers, of_diffusers, (x, tables(shape[1], shape[3], table, twice)), {}


def diffusers_tokens_first(shape, dtype, table):
    given = odd(shape, dtype), tables(shape[1], shape[3], table, twice)
    return functions.diffusers, of_diffusers, given, {"sequence_dim": 1}


def diffusers_halves(shape, dtype, table):
    x = odd(shape, dtype).transpose(1, 2).contiguous()
    given = x, tables(shape[1], shape[3], table, lambda each: torch.cat((each, each), -1))
    return functions.diffusers, of_diffusers, given, {"use_real_unbind_dim": -2}


def fastvideo(shape, dtype, table):
    given = odd(shape, dtype), *tables(shape[1], shape[3], table, lambda each: each), False
    return functions.fastvideo, of_fastvideo, given, {}


def fastvideo_neox(shape, dtype, table):
    given = odd(shape, dtype), *tables(shape[1], shape[3], table, lambda each: each), True
    return functions.fastvideo, of_fastvideo, given, {}


CONVENTIONS = [wan, diffusers_heads_first, diffusers_tokens_first, diffusers_halves, fastvideo, fastvideo_neox]


@pytest.mark.parametrize("table", [torch.float32, torch.float64, None], ids=["float32", "float64", "own"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_bits_are_the_library_s(convention, dtype, table):
    torch.manual_seed(0)
    for shape in SHAPES:
        replacement, original, args, kwargs = convention(shape, dtype, table or dtype)
        rotate = replacement.ready(args, kwargs)
        with torch.no_grad():
            for _ in range(2):  # the second with the tables that are known
                expected = original(*args, **kwargs)
                rotated = rotate(args, kwargs)
                assert same_bits(rotated, expected) and rotated.stride() == expected.stride(), shape


def test_tables_that_were_written_into_or_are_others_are_made_anew():
    replacement, original, (x, cos, sin), kwargs = wan((1, 8, 2, 16), torch.float32, torch.float32)
    rotate = replacement.ready((x, cos, sin), kwargs)
    rotate((x, cos, sin), kwargs)
    cos.mul_(2)
    assert same_bits(rotate((x, cos, sin), kwargs), original(x, cos, sin))
    other = cos.clone() * 3
    assert same_bits(rotate((x, other, sin), kwargs), original(x, other, sin))


def test_no_table_is_kept_alive():
    replacement, _, (x, cos, sin), kwargs = wan((1, 8, 2, 16), torch.float32, torch.float32)
    rotate = replacement.ready((x, cos, sin), kwargs)
    rotate((x, cos, sin), kwargs)
    gone = weakref.ref(cos), weakref.ref(sin)
    del cos, sin
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_tensors_with_a_history_are_left_to_the_original():
    replacement, _, (x, cos, sin), kwargs = wan((1, 8, 2, 16), torch.float32, torch.float32)
    rotate = replacement.ready((x, cos, sin), kwargs)
    with pytest.raises(Uncacheable, match="autograd is recording"):
        rotate((x.requires_grad_(), cos, sin), kwargs)
    assert replacement.ready((x.detach(), cos.requires_grad_(), sin), kwargs) is None


def test_of_strided_or_large_tensors_each_call_decides():
    replacement, _, (x, cos, sin), kwargs = wan((1, 8, 2, 16), torch.float32, torch.float32)
    assert replacement.ready((x.transpose(1, 2).contiguous().transpose(1, 2), cos, sin), kwargs) is None
    with torch.inference_mode():
        assert replacement.ready((x.clone(), cos, sin), kwargs) is None


@pytest.mark.parametrize("part", ["the same", "shifted by a token", "shifted by an element"])
def test_queries_and_keys_that_share_memory_are_an_error(part):
    memory = torch.randn(1, 9, 2, 16)
    q = memory[:, :8]
    k = {"the same": q, "shifted by a token": memory[:, 1:]}.get(part)
    if k is None:
        k = memory.view(-1)[1 : 1 + q.numel()].view(q.shape)
    cos, sin = tables(8, 16, torch.float32, lambda each: each)
    before = memory.clone()
    with pytest.raises(RotaryError, match="q and k share memory"):
        rotary_qk_(q, k, cos, sin)
    assert torch.equal(memory, before)


def test_queries_and_keys_that_were_projected_together_are_none():
    together = torch.randn(2, 8, 6, 16)
    q, k = together[:, :, :2], together[:, :, 2:4]
    cos, sin = tables(8, 16, torch.float32, lambda each: each)
    expected = [each.clone() for each in (q, k)]
    rotary_qk_(expected[0], None, cos, sin), rotary_qk_(expected[1], None, cos, sin)
    rotary_qk_(q, k, cos, sin)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
