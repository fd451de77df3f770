"""The kernel of rotary/gpu.py as GPUs would run it: compiled here without one, and read.

Bits depend on there being no contraction, and speed on 128-bit accesses and no spills. That the results are right is
for test_rotary_interpreter.py, which can never see a contraction.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dit_patch.rotary import gpu  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
if not (TOOLS / "nvdisasm").exists():
    pytest.skip("this Triton brings no NVIDIA tools", allow_module_level=True)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
H200 = 132


class Launched:
    """In place of the kernel: keeps what it would be launched with."""

    def __getitem__(self, grid):
        self.grid = grid
        return self.keep

    def keep(self, *args, **options):
        self.args, self.options = args, options


def launch(
    x="bf16",
    table="fp32",
    width=128,
    *,
    pairs="interleaved",
    arithmetic="separate",
    contraction=None,
    tokens=32760,
    heads=12,
    each=True,
    step=1,
):
    """What `launch` does on an H200 to q and k like these, in place; `each` member of a pair has its table entry."""
    q = torch.empty(1, tokens, heads, width, dtype=DTYPES[x], device="meta")
    entries = width if each else width // 2
    cos = torch.empty(1, tokens, 1, entries * step, dtype=DTYPES[table], device="meta")[..., ::step]
    launched = Launched()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_rotary_kernel", launched)
        patch.setattr(gpu, "_processors", lambda device: H200)
        patch.setattr(gpu, "_contraction", lambda device, dtype: contraction)
        gpu.launch(q, q, q, q, cos, cos, interleaved=pairs == "interleaved", arithmetic=arithmetic)
    return launched


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles what was launched, as Triton would then: the PTX, the count of each instruction, and what it takes."""

    @functools.cache
    def compiled(capability=90, *, fusion=False, **given):
        launched = launch(**given)
        assert launched.options["enable_fp_fusion"] is False
        code = compile(launched.args, launched.options | {"enable_fp_fusion": fusion}, capability)
        cubin = tmp_path_factory.mktemp("code") / "kernel.cubin"
        cubin.write_bytes(code.asm["cubin"])
        instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
        uses = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", tool("cuobjdump", "-res-usage", cubin)))
        return SimpleNamespace(
            ptx=code.asm["ptx"],
            sass=Counter(instruction.findall(tool("nvdisasm", "-c", cubin))),
            uses={name: int(count) for name, count in uses.items()},
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield compiled


def compile(args, options, capability):
    kernel = gpu._rotary_kernel
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, args)):
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
            attributes[index,] = [["tt.divisibility", 16]]
        elif name not in gpu._PLAIN and value == 1:
            signature[name], constants[index,] = "constexpr", 1
        else:
            signature[name] = "i32"
    for name in set(options) & set(kernel.arg_names):
        signature[name], constants[kernel.arg_names.index(name),] = "constexpr", options[name]
    source = ASTSource(kernel, signature, constants, attributes)
    others = {name: value for name, value in options.items() if name not in signature}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=others)


def tool(name, *args):
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def contracted(code):
    """The FMAs that do more than a product or a sum: those are what sm_80 has for bf16, by way of -0 and 1."""
    fused = re.findall(r"fma\.rn[.\w]*\s+(.+);", code.ptx)
    values = dict(re.findall(r"mov\.b\d+\s+(%\w+), (0x\w+);", code.ptx))
    operands = ([values.get(each, each) for each in every.split(", ")] for every in fused)
    return [each for each in operands if each[3] != "0x8000" and not {"0x3F80", "0xBF80"} & set(each[1:3])]


LAYOUTS = ["interleaved", "half"]
RECIPES = [
    *((x, "fp32", "separate") for x in ("bf16", "fp16", "fp32")),
    *((x, "fp64", "separate") for x in ("bf16", "fp32")),
    *((x, x, arithmetic) for x in ("bf16", "fp16") for arithmetic in ("separate", "rounded")),
]
SOME = [("bf16", "fp32", "separate"), ("fp32", "fp64", "separate"), ("bf16", "bf16", "rounded")]
ON_SM_90 = [("interleaved", *recipe) for recipe in RECIPES] + [("half", *recipe) for recipe in SOME]
MOST = [
    *((90, *each) for each in ON_SM_90),
    *((capability, "interleaved", *recipe) for capability in (80, 120) for recipe in SOME),
]


@pytest.mark.parametrize("capability, pairs, x, table, arithmetic", MOST)
def test_nothing_is_contracted(compiled, capability, pairs, x, table, arithmetic):
    code = compiled(capability, x=x, table=table, arithmetic=arithmetic, pairs=pairs)
    assert not contracted(code)
    assert not {name for name in code.sass if name.startswith(("FFMA", "DFMA"))}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("x, table, arithmetic", SOME)
def test_a_contraction_would_be_seen(compiled, x, table, arithmetic, capability):
    code = compiled(capability, fusion=True, x=x, table=table, arithmetic=arithmetic)
    assert contracted(code)
    assert arithmetic == "rounded" or code.sass["FFMA"] + code.sass["DFMA"] > 0


@pytest.mark.parametrize(
    "table, contraction, sums",
    [
        ("fp32", ("first", "none"), 1),
        ("fp32", ("none", "second"), 1),
        ("fp32", ("second", "first"), 2),
        ("fp64", ("first", "second"), 2),
    ],
)
def test_what_torch_contracts_is_contracted_and_no_more(compiled, table, contraction, sums):
    code = compiled(table=table, arithmetic="complex", contraction=contraction, each=False)
    pairs = 2 * 4  # eight elements of q and eight of k for each thread
    assert len(contracted(code)) == code.sass["FFMA"] + code.sass["DFMA"] == sums * pairs


@pytest.mark.parametrize("pairs, x, table, arithmetic", ON_SM_90)
def test_results_in_fp64_go_through_fp32_as_torch_s_do(compiled, x, table, arithmetic, pairs):
    code = compiled(90, x=x, table=table, arithmetic=arithmetic, pairs=pairs)
    assert ("cvt.rn.f32.f64" in code.ptx) == (table == "fp64")
    assert not re.search(r"cvt\.rn\.b?f16(x2)?\.f64", code.ptx)


@pytest.mark.parametrize("x, table, arithmetic", SOME)
def test_numbers_too_small_to_be_normal_are_kept(compiled, x, table, arithmetic):
    assert ".ftz" not in compiled(90, x=x, table=table, arithmetic=arithmetic, pairs="interleaved").ptx


# Wide accesses, and no spills.


def loads(code):
    return {name for name in code.sass if name.startswith("LDG")}


def stores(code):
    return {name for name in code.sass if name.startswith("STG")}


def assert_wide_and_lean(code):
    assert loads(code) == {"LDG.E.128"} and stores(code) == {"STG.E.128"}
    assert code.uses["SHARED"] == 0  # no thread waits for another
    assert_no_spills(code)


def assert_no_spills(code):
    assert code.uses["LOCAL"] == code.uses["STACK"] == code.sass["LDL"] == code.sass["STL"] == 0


@pytest.mark.parametrize("capability, pairs, x, table, arithmetic", MOST)
def test_all_accesses_are_128_bits_wide(compiled, capability, pairs, x, table, arithmetic):
    code = compiled(capability, x=x, table=table, arithmetic=arithmetic, pairs=pairs)
    assert_wide_and_lean(code)
    registers = {("interleaved", "fp32"): 56, ("interleaved", "fp64"): 80, ("half", "fp64"): 128}
    assert code.uses["REG"] <= registers.get((pairs, table), 88)


@pytest.mark.parametrize("width", [64, 80, 96, 112, 256])
@pytest.mark.parametrize("pairs", LAYOUTS)
def test_so_they_are_with_other_heads(compiled, pairs, width):
    assert_wide_and_lean(compiled(width=width, pairs=pairs))


def test_so_they_are_where_rows_are_a_multiple_of_8_only(compiled):
    assert_wide_and_lean(compiled(width=120))
    code = compiled(width=120, pairs="half")  # whose second half starts in the middle of 128 bits
    assert loads(code) <= {"LDG.E.128", "LDG.E.64"} and stores(code) <= {"STG.E.128", "STG.E.64"}
    assert_no_spills(code)


@pytest.mark.parametrize("tokens", [1, 2640])
def test_so_they_are_with_few_tokens(compiled, tokens):
    assert_wide_and_lean(compiled(tokens=tokens))


@pytest.mark.parametrize("pairs", LAYOUTS)
@pytest.mark.parametrize("x, table, arithmetic", SOME)
def test_so_they_are_with_half_tables_but_for_what_is_half_as_wide(compiled, x, table, arithmetic, pairs):
    code = compiled(x=x, table=table, arithmetic=arithmetic, pairs=pairs, each=False)
    narrow = {"LDG.E.64"} if (pairs, table) == ("interleaved", "bf16") else set()
    assert loads(code) == {"LDG.E.128"} | narrow and stores(code) == {"STG.E.128"}
    assert_no_spills(code)


@pytest.mark.parametrize("pairs", LAYOUTS)
def test_gaps_in_the_tables_make_only_their_loads_narrow(compiled, pairs):
    code = compiled(pairs=pairs, each=False, step=2)
    assert loads(code) == {"LDG.E.128", "LDG.E"} and stores(code) == {"STG.E.128"}
    assert_no_spills(code)


# How the work is cut up.


@pytest.mark.parametrize(
    "tokens, heads, width, expected",
    [
        (32760, 12, 128, (2, 4, 1, 4)),  # Wan 1.3B: each program has all heads of its tokens
        (75600, 40, 128, (2, 4, 1, 4)),
        (2640, 12, 128, (2, 4, 3, 4)),  # three frames of MatrixGame2: too few tokens to keep the GPU busy
        (2640, 16, 64, (4, 4, 4, 4)),
        (32760, 1, 128, (8, 1, 1, 4)),
        (32760, 24, 256, (1, 4, 1, 4)),
        (4, 12, 128, (1, 2, 6, 1)),
        (1, 1, 2, (128, 1, 1, 1)),
    ],
)
def test_tiling(tokens, heads, width, expected):
    assert gpu.tiling(tokens, heads, width, H200) == expected


@pytest.mark.parametrize("width", [2, 16, 64, 128, 256])
@pytest.mark.parametrize("heads", [1, 3, 12, 40, 100_000])
@pytest.mark.parametrize("tokens", [1, 527, 530, 2640, 500_000])
def test_tiles_keep_a_gpu_busy_and_within_its_limits(tokens, heads, width):
    tile_tokens, tile_heads, programs, warps = gpu.tiling(tokens, heads, width, H200)
    tiles = -(-heads // tile_heads)
    assert 1 <= programs <= min(tiles, 65_535)
    assert tile_tokens * tile_heads * width == 8 * 32 * warps
    assert programs == tiles or programs * -(-tokens // tile_tokens) * warps >= 64 * H200


def test_each_head_s_own_tables_are_for_a_program_of_its_own(monkeypatch):
    x = torch.empty(1, 32760, 12, 128, device="meta")
    launched = Launched()
    monkeypatch.setattr(gpu, "_rotary_kernel", launched)
    monkeypatch.setattr(gpu, "_processors", lambda device: H200)
    gpu.launch(x, x, x, x, x, x, interleaved=True, arithmetic="separate")
    assert launched.grid == (16380, 3)


def test_nothing_is_launched_for_nothing(monkeypatch):
    monkeypatch.setattr(gpu, "_rotary_kernel", None)
    for shape in [(0, 5, 3, 8), (2, 0, 3, 8), (2, 5, 0, 8)]:
        x, table = torch.empty(shape), torch.empty(1, shape[1], 1, 8)
        gpu.launch(x, x, None, None, table, table, interleaved=True, arithmetic="separate")
