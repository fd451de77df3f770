"""The kernel of rotary/gpu.py gives the bits of the functions that it stands in for, in Triton's interpreter.

The interpreter has to be chosen before Triton is imported. So this file is a program as well, which makes all
comparisons and prints how many elements differ; the tests look up their own.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch

from dit_patch.sites.inner_functions import InnerFunctions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = {}


def case(*names, **options):
    """A comparison, by its name in words: yields pairs of tensors that should be the same."""

    def add(function):
        for values in itertools.product(*options.values()):
            name = " ".join([*names, function.__name__.replace("_", " "), *map(str, values)])
            CASES[name] = partial(function, **dict(zip(options, values)))
        return function

    return add


def noise(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES.get(dtype, dtype))


def rotated(x, cos, sin, pairs="interleaved", arithmetic="separate"):
    from dit_patch.rotary import gpu

    out = torch.full(x.shape, torch.nan, dtype=x.dtype)
    gpu.launch(x, out, None, None, cos, sin, interleaved=pairs == "interleaved", arithmetic=arithmetic)
    return out


def rotate_(q, k, cos, sin, pairs="interleaved", arithmetic="separate"):
    from dit_patch.rotary import gpu

    gpu.launch(q, q, k, k, cos, sin, interleaved=pairs == "interleaved", arithmetic=arithmetic)


def tables(length, width, dtype=torch.float32):
    """cos and sin (1, length, 1, width): any numbers, none twice, so that no entry can stand in for another."""
    return noise(2, 1, length, 1, width, dtype=dtype).unbind(0)


# diffusers.


def wan_closure():
    """The function inside of `WanAttnProcessor.__call__`."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    return InnerFunctions(WanAttnProcessor.__call__).apply_rotary_emb


@case("diffusers", dtype=DTYPES, width=[24, 64, 80, 96, 112, 128, 256])
def wan(dtype, width):
    x, (cos, sin) = noise(2, 33, 3, width, dtype=dtype), tables(33, width)
    yield rotated(x, cos[..., 0::2], sin[..., 1::2]), wan_closure()(x, cos, sin)


@case("diffusers", dtype=["bf16", "fp16"], width=[64, 128])
def wan_with_tables_as_small_as_x(dtype, width):
    x, (cos, sin) = noise(2, 33, 3, width, dtype=dtype), tables(33, width, dtype)
    yield rotated(x, cos[..., 0::2], sin[..., 1::2], arithmetic="rounded"), wan_closure()(x, cos, sin)


@case("diffusers", dtype=DTYPES, width=[24, 80, 128], table=["fp32", "bf16"])
def pairs_of_neighbours(dtype, width, table):
    from diffusers.models.embeddings import apply_rotary_emb

    x, (cos, sin) = noise(2, 33, 3, width, dtype=dtype), tables(33, width, table)
    eager = apply_rotary_emb(x, (cos[0, :, 0], sin[0, :, 0]), sequence_dim=1)
    yield rotated(x, cos, sin), eager


@case("diffusers", dtype=DTYPES, width=[24, 80, 128])
def pairs_of_halves(dtype, width):
    from diffusers.models.embeddings import apply_rotary_emb

    x, (cos, sin) = noise(2, 33, 3, width, dtype=dtype), tables(33, width)
    eager = apply_rotary_emb(x, (cos[0, :, 0], sin[0, :, 0]), use_real_unbind_dim=-2, sequence_dim=1)
    yield rotated(x, cos, sin, "half"), eager


@case("diffusers", dtype=DTYPES, width=[64, 128])
def complex_numbers(dtype, width):
    from diffusers.models.embeddings import apply_rotary_emb

    x, table = noise(2, 33, 3, width, dtype=dtype), torch.view_as_complex(noise(2, 33, width // 2, 2))
    cos, sin = torch.view_as_real(table)[:, :, None].unbind(-1)
    yield rotated(x, cos, sin, arithmetic="complex"), apply_rotary_emb(x, table, use_real=False)


# FastVideo.


@case("FastVideo", dtype=DTYPES, width=[64, 96, 128], table=[torch.float32, torch.float64])
def full_tables(dtype, width, table):
    x, (cos, sin) = noise(2, 33, 3, width, dtype=dtype), tables(33, width, table)
    yield rotated(x, cos, sin), fastvideo()(x, cos[0, :, 0], sin[0, :, 0], is_neox_style=False)


@case("FastVideo", pairs=["interleaved", "half"], dtype=DTYPES, width=[24, 80, 128])
def half_tables(pairs, dtype, width):
    x, (cos, sin) = noise(2, 33, 3, width, dtype=dtype), tables(33, width // 2)
    yield rotated(x, cos, sin, pairs), fastvideo()(x, cos[0, :, 0], sin[0, :, 0], is_neox_style=pairs == "half")


@case("FastVideo", dtype=["bf16"], pairs=["interleaved", "half"])
def half_tables_in_fp64(dtype, pairs):
    x, (cos, sin) = noise(2, 33, 3, 64, dtype=dtype), tables(33, 32, torch.float64)
    yield rotated(x, cos, sin, pairs), fastvideo()(x, cos[0, :, 0], sin[0, :, 0], is_neox_style=pairs == "half")


@case("FastVideo", dtype=DTYPES)
def action_module_s_strided_tables(dtype):
    x, (cos, sin) = noise(7, 3, 16, 64, dtype=dtype), tables(3, 64)
    cos, sin = cos[..., ::2], sin[..., ::2]
    yield rotated(x, cos, sin), fastvideo()(x, cos[0, :, 0], sin[0, :, 0], is_neox_style=False)


@case("FastVideo", dtype=DTYPES, width=[64, 128], start_frame=[0, 3])
def matrixgame2(dtype, width, start_frame):
    prepared()
    from fastvideo.models.dits.matrixgame2.causal_model import causal_rope_apply, rope_params

    x, grid, frequencies = noise(2, 2 * 3 * 4 + 5, 3, width, dtype=dtype), (2, 3, 4), rope_params(1024, width)
    cos, sin = found_table(lambda ones: causal_rope_apply(ones, grid, frequencies, start_frame), 24, 1, width, "fp64")
    ours = x.clone()
    rotate_(ours[:, :24], None, cos, sin, arithmetic="complex")
    yield ours, causal_rope_apply(x, grid, frequencies, start_frame)


@case("FastVideo", dtype=DTYPES, sigma_theta=[0.0, 0.8])
def matrixgame3(dtype, sigma_theta):
    prepared()
    from fastvideo.models.dits.matrixgame3 import model

    frequencies = model._build_rope_freqs(max_seq_len=32, head_dim=64, num_heads=3, sigma_theta=sigma_theta)
    eager = partial(
        model._apply_rope_with_frame_indices, freqs=frequencies, height=3, width=4, frame_indices=[7, 2, 30]
    )
    x = noise(2, 36, 3, 64, dtype=dtype)
    cos, sin = found_table(eager, 36, 3 if sigma_theta else 1, 64, "fp32")
    yield rotated(x, cos, sin, arithmetic="complex"), eager(x)
    several = x.clone(), x.flip(1).clone()
    rotate_(*several, cos, sin, arithmetic="complex")
    yield from zip(several, (eager(x), eager(x.flip(1))))


def prepared():
    from dit_patch.hosts import fastvideo

    fastvideo.prepare()


def fastvideo():
    prepared()
    from fastvideo.layers.rotary_embedding import _apply_rotary_emb

    return _apply_rotary_emb


def found_table(eager, length, heads, width, dtype):
    """What a function of complex numbers multiplies with: its result for ones."""
    ones = torch.tensor([1.0, 0.0]).repeat(1, length, heads, width // 2)
    return eager(ones.to({"fp64": torch.float64}.get(dtype, torch.float32))).unflatten(-1, (-1, 2)).unbind(-1)


# transformers.


@case("transformers", dtype=DTYPES, width=[64, 80, 128])
def qwen3(dtype, width):
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    q, k = noise(2, 33, 6, width, dtype=dtype), noise(2, 33, 2, width, dtype=dtype)
    cos, sin = noise(2, 2, 33, width, dtype=dtype).unbind(0)  # of its own for each sample
    eager = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    rotate_(q, k, cos[:, :, None], sin[:, :, None], "half", "rounded")
    yield from zip((q, k), eager)


# What tensors look like, whoever calls.


PLAIN = {"interleaved": lambda x: (x[..., 0::2], x[..., 1::2]), "half": lambda x: x.chunk(2, -1)}


def reference(x, cos, sin, pairs):
    """In the dtype of the tables; where it does not depend on what a library does."""
    (a, b), out = PLAIN[pairs](x.to(torch.promote_types(cos.dtype, torch.float32))), torch.empty_like(x)
    (c1, c2), (s1, s2) = (PLAIN[pairs](t) if t.shape[-1] == x.shape[-1] else (t, t) for t in (cos, sin))
    for part, rotated_part in zip(PLAIN[pairs](out), (a * c1 - b * s1, b * c2 + a * s2)):
        part.copy_(rotated_part)
    return out


@case(pairs=PLAIN, dtype=DTYPES)
def slices_of_one_projection_are_rotated_in_place_and_the_rest_is_left(pairs, dtype):
    qkv, (cos, sin) = noise(2, 33, 3, 4, 80, dtype=dtype), tables(33, 64)
    expected = qkv.clone()
    for part in (0, 1):  # q and k, 64 columns of 80
        expected[:, :, part, :, 8:72] = reference(qkv[:, :, part, :, 8:72], cos, sin, pairs)
    q, k, _ = qkv.unbind(2)
    rotate_(q[..., 8:72], k[..., 8:72], cos, sin, pairs)
    yield qkv, expected


@case(pairs=PLAIN, heads=[(6, 2), (8, 1), (2, 5)])
def fewer_heads_of_k_than_of_q(pairs, heads):
    (q, k), (cos, sin) = (noise(2, 33, each, 64) for each in heads), tables(33, 32)
    expected = reference(q, cos, sin, pairs), reference(k, cos, sin, pairs)
    rotate_(q, k, cos, sin, pairs)
    yield from zip((q, k), expected)


@case(pairs=PLAIN)
def what_is_read_and_written_has_strides_of_its_own(pairs):
    from dit_patch.rotary import gpu

    cos, sin = tables(33, 64)
    q, k = noise(2, 3, 33, 64).transpose(1, 2), noise(33, 2, 3, 80)[..., 7:71].transpose(0, 1)
    q_out, k_out = torch.zeros(3, 2, 33, 96)[..., :64].permute(1, 2, 0, 3), torch.zeros(33, 3, 2, 72)
    k_out = k_out[..., 8:].permute(2, 0, 1, 3)
    gpu.launch(q, q_out, k, k_out, cos, sin, interleaved=pairs == "interleaved", arithmetic="separate")
    yield q_out, reference(q, cos, sin, pairs)
    yield k_out, reference(k, cos, sin, pairs)


@case(pairs=PLAIN, each=[True, False])
def tables_with_any_strides(pairs, each):
    x, (cos, sin) = noise(3, 20, 5, 24), noise(2, 24 if each else 12, 5, 20, 3).permute(0, 4, 3, 2, 1)
    sin = sin.contiguous()  # unlike those of cos
    yield rotated(x, cos, sin, pairs), reference(x, cos, sin, pairs)
    expanded = cos[:1, :1, :, :].expand(1, 20, 5, -1)
    yield rotated(x, expanded, sin, pairs), reference(x, expanded, sin, pairs)


@case(pairs=PLAIN, width=[2, 6, 12, 120, 254, 256])
def any_width(pairs, width):
    x, (cos, sin) = noise(2, 17, 3, width), tables(17, width)
    yield rotated(x, cos, sin, pairs), reference(x, cos, sin, pairs)


@case(dtype=["fp32"])
def infinities_and_zeros(dtype):
    x, (cos, sin) = noise(1, 33, 3, 64, dtype=dtype), tables(33, 32)
    x[:, 0], x[:, 1], x[:, 2, :, ::2], sin[:, 3] = 0, -0.0, torch.inf, 0
    x[:, 4] *= 1e-42  # too small to be normal
    ours, eager = rotated(x, cos, sin), reference(x, cos, sin, "interleaved")
    yield ours.nan_to_num(7), eager.nan_to_num(7)


@case(axis=["tokens", "heads", "samples"])
def more_elements_than_32_bits_can_count(axis):
    far, shape = 2**31 + 64, (2, 2, 2, 16)
    strides = [32, 64, 128, 1]
    strides[["samples", "tokens", "heads"].index(axis)] = far
    x = torch.empty(far + 512, dtype=torch.bfloat16).as_strided(shape, strides)  # of which few pages are touched
    x.copy_(noise(*shape))
    cos, sin = tables(2, 16)
    expected = reference(x.contiguous(), cos, sin, "interleaved")
    rotate_(x, None, cos, sin)
    yield x.contiguous(), expected


@case("as cut up for a GPU,", pairs=PLAIN, tokens=[1, 37, 90], heads=[(5, 5), (6, 2), (1, 9)])
def many_programs(pairs, tokens, heads):
    (q, k), (cos, sin) = (noise(2, tokens, each, 48, dtype="bf16") for each in heads), tables(tokens, 48)
    expected = reference(q, cos, sin, pairs), reference(k, cos, sin, pairs)
    rotate_(q, k, cos, sin, pairs)
    yield from zip((q, k), expected)


@case("as cut up for a GPU,", tokens=[200])
def many_programs_with_tables_of_each_head(tokens):
    q, k, cos, sin = noise(4, 2, tokens, 7, 32).unbind(0)
    expected = reference(q, cos, sin, "half"), reference(k, cos, sin, "half")
    rotate_(q, k, cos, sin, "half")
    yield from zip((q, k), expected)


# Complex numbers, whose product CUDA builds of torch contract one way or another.


FORMS = list(itertools.product(["none", "first", "second"], repeat=2))


@case(dtype=[torch.float32, torch.float64], form=FORMS)
def the_probe_recognises(dtype, form):
    from dit_patch.rotary import gpu

    def pretended(x, cos, sin):
        out = torch.empty_like(x)
        gpu._launch(x, out, None, None, cos, sin, True, False, form)
        return out

    eager, gpu._complex_product = gpu._complex_product, pretended
    try:
        found = gpu._contraction.__wrapped__(torch.device("cpu"), dtype)
    finally:
        gpu._complex_product = eager
    yield torch.tensor([found == form]), torch.tensor([True])


@case(dtype=[torch.float32, torch.float64])
def an_unknown_product_is_refused(dtype):
    from dit_patch.rotary import gpu

    eager = gpu._complex_product
    gpu._complex_product = lambda *args: eager(*args) * (1 + 2**-23)
    gpu._contraction.cache_clear()
    try:
        rotated(noise(1, 4, 2, 16), *tables(4, 8, dtype), arithmetic="complex")
        refused = False
    except gpu.NotExact:
        refused = True
    finally:
        gpu._complex_product = eager
        gpu._contraction.cache_clear()
    yield torch.tensor([refused]), torch.tensor([True])


def differing(one, other):
    """Elements that differ in a bit."""
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    return int((bits(one) != bits(other)).sum())


def bits(x):
    return x.contiguous().view(torch.uint8).unflatten(-1, (-1, x.element_size())).to(torch.int64)


def compare():
    """All cases: elements that differ, the reason why a case could not be tried, or where it failed."""
    from dit_patch.rotary import gpu

    as_for_a_gpu, whole = gpu.tiling, lambda tokens, heads, width, processors: (power(tokens), power(heads), 1, 4)
    power = gpu.triton.next_power_of_2
    for name, pairs in CASES.items():
        # The interpreter takes as long for a small program as for a large one.
        gpu.tiling = as_for_a_gpu if "as cut up for a GPU" in name else whole
        try:
            yield name, [differing(*pair) for pair in pairs()]
        except ImportError as error:
            yield name, str(error)
        except Exception:
            yield name, {"failed": traceback.format_exc()}


@pytest.fixture(scope="module")
def results():
    pytest.importorskip("triton")
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_not_a_bit_differs(results, name):
    found = results[name]
    if isinstance(found, str):
        pytest.skip(found)
    assert isinstance(found, list), found["failed"]
    assert found and not any(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(dict(compare())))
