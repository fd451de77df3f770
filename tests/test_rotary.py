"""Rotary embeddings in one pass: each bit of what the libraries' own functions give, over layouts and dtypes."""

import shutil
import types
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from dit_patch.functions import matrixgame
from dit_patch.functions import rotary as functions
from dit_patch.hosts import fastvideo
from dit_patch.memo.keys import Uncacheable, same_bits
from dit_patch.memo.results import same
from dit_patch.rotary import RotaryError, cpu, eager, rotary, rotary_qk_
from dit_patch.sites.inner_functions import InnerFunctions

HALF_DTYPES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF_DTYPES]
WIDTHS = [12, 24, 64, 80, 96, 112, 128, 256]
TOKENS = 37


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def heads(width, dtype=torch.float32, batch=2, number=3, tokens=TOKENS):
    return torch.randn(batch, tokens, number, width).to(dtype)


def part_of_qkv(width, dtype, tokens=TOKENS):
    """Queries as a fused projection leaves them."""
    return torch.randn(2, tokens, 3 * 3 * width).to(dtype).chunk(3, dim=-1)[0].unflatten(-1, (3, width))


def tables(width, dtype=torch.float32, tokens=TOKENS, repeat="interleave"):
    """cos and sin, (S, width), an entry for each member of a pair; or (S, width / 2) with repeat=None."""
    angles = torch.rand(tokens, width // 2, dtype=torch.float64) * 100
    found = angles.cos().to(dtype), angles.sin().to(dtype)
    if repeat == "interleave":
        return [each.repeat_interleave(2, dim=1) for each in found]
    return [torch.cat([each, each], dim=1) for each in found] if repeat == "cat" else list(found)


def closure(module="transformer_wan", processor="WanAttnProcessor"):
    """The function that an attention processor of diffusers defines inside itself."""
    found = __import__(f"diffusers.models.transformers.{module}", fromlist=[processor])
    return InnerFunctions(getattr(found, processor).__call__).apply_rotary_emb


@pytest.fixture
def upstream():
    """FastVideo's functions."""
    pytest.importorskip("fastvideo")
    fastvideo.prepare()
    from fastvideo.layers.rotary_embedding import _apply_rotary_emb
    from fastvideo.models.dits.matrixgame2.causal_model import causal_rope_apply, rope_params
    from fastvideo.models.dits.matrixgame3.model import _apply_rope_with_frame_indices, _build_rope_freqs

    return types.SimpleNamespace(
        apply=_apply_rotary_emb,
        causal=causal_rope_apply,
        causal_params=rope_params,
        frames=_apply_rope_with_frame_indices,
        frame_freqs=_build_rope_freqs,
    )


def agree(ours, original, *args, **kwargs):
    return same(ours(original, None, args, kwargs), original(*args, **kwargs))


class TestWan:
    @pytest.mark.parametrize("table", ["float32", "float64", "own"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", WIDTHS)
    def test_equal_to_the_processor_s_function(self, width, dtype, table):
        given = dtype if table == "own" else getattr(torch, table)
        cos, sin = (each[None, :, None] for each in tables(width, given))
        for x in (heads(width, dtype), part_of_qkv(width, dtype), heads(width, dtype, batch=1, number=1)):
            assert agree(functions.wan, closure(), x, cos, sin)

    def test_it_reads_the_even_entries_of_cos_and_the_odd_ones_of_sin(self):
        cos, sin = torch.randn(2, 1, TOKENS, 1, 32)
        assert agree(functions.wan, closure(), heads(32), cos, sin)

    def test_tables_in_half_precision_round_every_product_only_with_x_of_that_dtype(self):
        x = heads(64, torch.bfloat16)
        cos, sin = (each[None, :, None] for each in tables(64, torch.bfloat16))
        of_products = closure()(x, cos, sin)
        assert not same_bits(of_products, closure()(x, cos.float(), sin.float()))
        assert agree(functions.wan, closure(), x, cos, sin)
        assert agree(functions.wan, closure(), x.half(), cos, sin)

    @pytest.mark.parametrize(
        "module, processor",
        [
            ("transformer_skyreels_v2", "SkyReelsV2AttnProcessor"),
            ("transformer_wan_animate", "WanAttnProcessor"),
            ("transformer_chronoedit", "WanAttnProcessor"),
        ],
    )
    def test_others_have_the_same_function(self, module, processor):
        found = pytest.importorskip(f"diffusers.models.transformers.{module}")
        if not hasattr(found, processor):
            pytest.skip(f"no {processor} in this version")
        cos, sin = (each[None, :, None] for each in tables(64))
        assert agree(functions.wan, closure(module, processor), heads(64, torch.bfloat16), cos, sin)


class TestDiffusers:
    @pytest.mark.parametrize("sequence", [1, 2])
    @pytest.mark.parametrize("unbind", [-1, -2])
    @pytest.mark.parametrize("table", DTYPES[:2] + [torch.float64], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", [12, 24, 64, 128])
    def test_equal_to_its_function(self, width, dtype, table, unbind, sequence):
        from diffusers.models.embeddings import apply_rotary_emb

        given = tables(width, table, repeat="interleave" if unbind == -1 else "cat")
        for x in (heads(width, dtype), part_of_qkv(width, dtype), heads(width, dtype, tokens=TOKENS + 5)[:, :-5]):
            views = [x] if sequence == 1 else [x.transpose(1, 2), x.transpose(1, 2).contiguous()]
            for view in views:
                options = {"use_real_unbind_dim": unbind, "sequence_dim": sequence}
                assert agree(functions.diffusers, apply_rotary_emb, view, given, **options)

    def test_a_complex_table_is_left_to_the_original(self):
        with pytest.raises(Uncacheable, match="a complex table"):
            functions.diffusers(None, None, (heads(8), torch.randn(1, TOKENS, 4, dtype=torch.complex64), False), {})

    def test_what_upstream_would_refuse_is_left_to_it(self):
        cos, sin = tables(8, repeat=None)
        for table in ((cos, sin), tables(8, tokens=3)):
            with pytest.raises(Uncacheable, match="tables"):
                functions.diffusers(None, None, (heads(8), table), {"sequence_dim": 1})
        with pytest.raises(Uncacheable, match="do not fit"):
            functions.fastvideo(None, None, (heads(8), cos[:, :2], sin[:, :2], False), {})
        with pytest.raises(Uncacheable, match="float64"):
            functions.fastvideo(None, None, (heads(8).double(), cos, sin, False), {})


class TestFastVideo:
    @pytest.mark.parametrize("table", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", WIDTHS)
    def test_equal_to_its_function_with_full_and_half_tables_of_both_styles(self, upstream, width, dtype, table):
        full, half = tables(width, table), tables(width, table, repeat=None)
        strided = [each[:, ::2] for each in tables(width, table)]
        for x in (heads(width, dtype), part_of_qkv(width, dtype)):
            for neox in (False, True):
                for cos, sin in (full, half, strided):
                    assert agree(functions.fastvideo, upstream.apply, x, cos, sin, is_neox_style=neox)

    def test_entries_that_differ_within_a_pair_count(self, upstream):
        cos, sin = torch.randn(2, TOKENS, 64)
        assert agree(functions.fastvideo, upstream.apply, heads(64), cos, sin, False)
        cos, sin = torch.zeros(2, TOKENS, 64)
        cos[:, 1::2] = -0.0
        assert agree(functions.fastvideo, upstream.apply, heads(64), cos, sin, False)


class TestMatrixGame:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width, number", [(24, 2), (64, 3), (128, 2), (80, 1), (96, 2)])
    def test_the_second_one_s_is_equal(self, upstream, width, number, dtype):
        sizes = (width - 4 * (width // 6), 2 * (width // 6), 2 * (width // 6))
        freqs = torch.cat([upstream.causal_params(64, each) for each in sizes], dim=1)
        for start, tail in ((0, 0), (5, 0), (2, 7)):
            x = heads(width, dtype, number=number, tokens=2 * 3 * 4 + tail)
            assert agree(matrixgame.causal_rope, upstream.causal, x, (2, 3, 4), freqs, start_frame=start)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("sigma, number, width", [(0.8, 3, 24), (0.0, 2, 24), (0.8, 2, 128), (0.0, 1, 80)])
    def test_the_third_one_s_is_equal(self, upstream, sigma, number, width, dtype):
        freqs = upstream.frame_freqs(max_seq_len=32, head_dim=width, num_heads=number, sigma_theta=sigma)
        x = heads(width, dtype, number=number, tokens=2 * 3 * 4)
        for frames in (torch.tensor([9, 3]), torch.arange(2, dtype=torch.int32)):
            given = {"height": 3, "width": 4, "frame_indices": frames}
            assert agree(matrixgame.frame_rope, upstream.frames, x, freqs, **given)

    def test_what_is_left_where_products_cancel_is_that_of_a_complex_product(self, upstream):
        """On most CPUs torch fuses a product and the sum in the last pairs of a head, where a rounding is left then."""
        x = heads(20, tokens=2 * 3 * 4)
        x[..., 1::2] = x[..., 0::2]
        freqs = torch.randn(64, 10, dtype=torch.float64) * (1 + 1j)
        assert agree(matrixgame.causal_rope, upstream.causal, x, (2, 3, 4), freqs)
        given = {"height": 3, "width": 4, "frame_indices": torch.tensor([9, 3])}
        assert agree(matrixgame.frame_rope, upstream.frames, x, freqs, **given)

    @pytest.mark.parametrize("name, args, kwargs", [
        ("causal_rope", (heads(24), (torch.tensor(1), 1, 1), torch.zeros(8, 12)), {}),
        ("causal_rope", (heads(24), (1, 1, 1), torch.zeros(8, 6)), {}),
        ("frame_rope", (heads(24), torch.zeros(8, 12)), {"height": 1, "width": 1, "frame_indices": [0]}),
    ])  # fmt: skip
    def test_what_it_does_not_know_is_left_to_the_original(self, name, args, kwargs):
        with pytest.raises(Uncacheable):
            getattr(matrixgame, name)(None, None, args, kwargs)


ROWS, WIDTH = TOKENS - 6, 48  # of the tables: fewer tokens than x has, and fewer elements of a head


def as_it_is(table):
    return table


def of_each_batch(table):
    return torch.stack([table, table.flip(0)])


def of_each_head(table):
    return table[None, :, None] * torch.tensor([1.0, 0.5, 2.0, 3.0])[:, None]


class RotaryCase(NamedTuple):
    dtype: torch.dtype | None = torch.float32  # None: that of x
    of_each: str = "element"  # of a head; or of each pair of them
    shaped: Callable[[torch.Tensor], torch.Tensor] = as_it_is
    arithmetic: str = "separate"

    def tables(self, pairs, dtype):
        repeat = {"interleaved": "interleave", "half": "cat"}[pairs] if self.of_each == "element" else None
        return [self.shaped(table) for table in tables(WIDTH, self.dtype or dtype, tokens=ROWS, repeat=repeat)]


ROTARY_CASES = {
    "full": RotaryCase(),
    "half": RotaryCase(of_each="pair"),
    "batch": RotaryCase(shaped=of_each_batch),
    "heads": RotaryCase(shaped=of_each_head),
    "float64": RotaryCase(dtype=torch.float64),
    "complex": RotaryCase(of_each="pair", arithmetic="complex"),
    "rounded": RotaryCase(dtype=None, arithmetic="rounded"),
}


def every_case(test):
    for names, values, ids in (
        ("case", ROTARY_CASES.values(), ROTARY_CASES),
        ("pairs", ["interleaved", "half"], None),
        ("dtype", DTYPES, str),
    ):
        test = pytest.mark.parametrize(names, values, ids=ids)(test)
    return test


def rotated(x, cos, sin, pairs, arithmetic):
    """What torch's own operations give: `x` with the tables' tokens and elements turned."""
    out = x.clone()
    turned = out[:, :ROWS, :, :WIDTH]
    heads_at = {2: 1, 3: 2, 4: None}[cos.dim()]  # tables of (S, W), (B, S, W), (1, S, H, W)
    cos, sin = (each if heads_at is None else each.unsqueeze(heads_at) for each in (cos, sin))
    eager.rotate(turned.clone(), turned, cos, sin, interleaved=pairs == "interleaved", arithmetic=arithmetic)
    return out


class TestTheOperation:
    @pytest.mark.parametrize("width", [32, 128])
    def test_half_pairs_with_rounded_products_are_qwen_s(self, width):
        modeling = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
        q, k = heads(width, torch.bfloat16, number=4), heads(width, torch.bfloat16, number=2)
        cos, sin = (each[None] for each in tables(width, torch.bfloat16, repeat="cat"))
        expected = modeling.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        rotary_qk_(q, k, cos, sin, pairs="half", arithmetic="rounded")
        assert same_bits(q, expected[0]) and same_bits(k, expected[1])

    @every_case
    def test_tokens_and_elements_that_the_tables_do_not_have_are_copied(self, case, pairs, dtype):
        x, (cos, sin) = heads(64, dtype, number=4), case.tables(pairs, dtype)
        out = rotary(x, cos, sin, rotary_dim=WIDTH, pairs=pairs, arithmetic=case.arithmetic)
        assert same_bits(out, rotated(x, cos, sin, pairs, case.arithmetic)) and out.data_ptr() != x.data_ptr()

    @every_case
    def test_in_place_is_the_same_for_queries_and_fewer_heads_of_keys(self, case, pairs, dtype):
        q, (cos, sin) = heads(64, dtype, number=4), case.tables(pairs, dtype)
        k = None if case.shaped is of_each_head else q[:, :, :2].clone()
        expected = rotated(q, cos, sin, pairs, case.arithmetic)
        rotary_qk_(q, k, cos, sin, rotary_dim=WIDTH, pairs=pairs, arithmetic=case.arithmetic)
        assert same_bits(q, expected)
        assert k is None or same_bits(k, expected[:, :, :2])

    @pytest.mark.parametrize("run", [1, 3 * 64, 10 * 3 * 64, 2 * TOKENS * 3 * 64, 1 << 20])
    def test_however_it_is_cut_into_runs(self, run, monkeypatch):
        cos, sin = (each[None, :, None] for each in tables(64))
        of_rows = [torch.cat([each, each.flip(1), each], dim=0) for each in (cos, sin)]
        x = heads(64, torch.bfloat16, batch=3)
        expected = [closure()(x, *given) for given in ((cos, sin), of_rows)]
        monkeypatch.setattr(cpu, "RUN", run)
        assert same_bits(rotary(x, cos, sin), expected[0]) and same_bits(rotary(x, *of_rows), expected[1])
        rotary_qk_(x, None, *of_rows)
        assert same_bits(x, expected[1])

    def test_a_complex_product_whose_vectors_are_not_whole_is_not_cut(self, monkeypatch):
        """torch fuses multiplication and addition in the elements that are left over, of one head of all tokens."""
        x, cos, sin = heads(24, number=1, tokens=1000), *tables(24, tokens=1000, repeat=None)
        product = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, None]
        monkeypatch.setattr(cpu, "RUN", 24 * 99)
        assert same_bits(rotary(x, cos, sin, arithmetic="complex"), torch.view_as_real(product).flatten(-2))

    def test_infinities_and_signs_of_zero_come_out_as_they_do_eagerly(self):
        values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, -1e-45, 3.0, 1e38])
        x = torch.cartesian_prod(values, values).reshape(1, -1, 1, 32)
        cos, sin = (values[torch.randint(0, 8, (1, x.shape[1], 1, 16))] for _ in range(2))
        expected = torch.empty_like(x)
        eager.rotate(x, expected, cos, sin, interleaved=True, arithmetic="separate")
        number = expected == expected
        assert torch.equal(rotary(x, cos, sin)[number].view(torch.int32), expected[number].view(torch.int32))
        assert rotary(x, cos, sin)[~number].isnan().all() and number.any() and not number.all()

    def test_the_result_has_the_strides_of_x_and_nothing_of_its_memory(self):
        x = heads(16).transpose(1, 2).contiguous().transpose(1, 2)
        out = rotary(x, *tables(16))
        assert out.stride() == x.stride() and out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert rotary(x[:, :0], *tables(16, tokens=0)).shape == (2, 0, 3, 16)

    def test_a_strided_last_dimension_is_rotated_but_not_in_place(self):
        cos, sin = tables(16)
        x = heads(16).transpose(2, 3).contiguous().transpose(2, 3)
        assert same_bits(rotary(x, cos, sin), rotary(x.contiguous(), cos, sin))
        with pytest.raises(RotaryError, match="needs a last stride of 1, not 3"):
            rotary_qk_(x, None, cos, sin)

    X = torch.zeros(1, 4, 2, 8)
    T = torch.zeros(4, 8)

    @pytest.mark.parametrize("change, message", [
        ({"pairs": "interleave"}, "no pairs `interleave`; did you mean `interleaved`"),
        ({"arithmetic": "exact"}, "no arithmetic `exact`. Known: separate, rounded, complex"),
        ({"x": X[0]}, r"expected \(B, S, H, D\) in bfloat16, float16 or float32, got \(4, 2, 8\) torch.float32 on cpu"),
        ({"x": X.double()}, r"got \(1, 4, 2, 8\) torch.float64"),
        ({"rotary_dim": 7}, "rotary_dim=7: an even number up to 8 is needed"),
        ({"rotary_dim": 10}, "rotary_dim=10"),
        ({"x": torch.zeros(1, 4, 2, 512), "cos": torch.zeros(4, 512)}, "rotary_dim=512: an even number up to 256"),
        ({"sin": T[:3]}, r"cos and sin are real and alike; got \(4, 8\) torch.float32 on cpu and \(3, 8\)"),
        ({"cos": T.to(torch.complex64), "sin": T.to(torch.complex64)}, "cos and sin are real"),
        ({"cos": T[:, :6], "sin": T[:, :6]}, r"tables \(1, 4, 1, 6\) do not fit \(1, 4, 2, 8\) .* of which 8 elements"),
        ({"cos": torch.zeros(5, 8), "sin": torch.zeros(5, 8)}, r"tables \(1, 5, 1, 8\) do not fit"),
        ({"cos": torch.zeros(1, 4, 3, 8), "sin": torch.zeros(1, 4, 3, 8)}, r"tables \(1, 4, 3, 8\) do not fit"),
        ({"arithmetic": "rounded", "x": X.bfloat16()}, '"rounded" needs tables of the dtype of x, torch.bfloat16; got'),
        ({"arithmetic": "complex", "cos": T.half(), "sin": T.half()}, '"complex" needs tables in float32 or float64'),
        ({"cos": T.to("meta"), "sin": T.to("meta")}, "tensors of one device and dtype are needed"),
        ({"x": X.clone().requires_grad_()}, "autograd is recording"),
    ])  # fmt: skip
    def test_what_cannot_be_rotated_is_one_clear_error(self, change, message):
        given = {"x": self.X, "cos": self.T, "sin": change.get("cos", self.T)} | change
        with pytest.raises(RotaryError, match=message):
            rotary(given.pop("x"), given.pop("cos"), given.pop("sin"), **given)


class TestUnderCompilers:
    ARGUMENTS = (heads(32), *tables(32, repeat=None))

    def test_torch_s_own_check_of_the_two_operations(self):
        x, cos, sin = self.ARGUMENTS
        cos, sin = cos[None, :, None], sin[None, :, None]
        for operation, tensors in (("rotary", (x,)), ("rotary_qk_", (x.clone(), x[:, :, :1].clone()))):
            function = getattr(torch.ops.dit_patch, operation).default
            torch.library.opcheck(function, (*tensors, cos, sin, 32, True, "separate"))

    def test_a_whole_graph_with_neither_break_nor_copy(self):
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            pytest.skip("inductor needs a C++ compiler")
        from torch._inductor.utils import run_and_get_code

        x, cos, sin = self.ARGUMENTS

        def attention(q, k):
            q, k = q * 2.0, k * 3.0
            rotary_qk_(q, k, cos, sin)
            return rotary(q, cos, sin), k

        torch._dynamo.reset()
        (q, k), [code] = run_and_get_code(torch.compile(attention, fullgraph=True), x, x[:, :, :1])
        torch._dynamo.reset()
        expected = attention(x, x[:, :, :1])
        assert same_bits(q, expected[0]) and same_bits(k, expected[1])
        # A buffer each for the two products; the operations get those as they are.
        assert code.count(" = empty_strided_cpu(") == 2
        assert "clone" not in code and "copy_(" not in code
        assert code.count("torch.ops.dit_patch.rotary_qk_.default(") == 1
        assert code.count("torch.ops.dit_patch.rotary.default(") == 1
