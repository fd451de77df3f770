"""What only a CUDA device can show: no synchronisation in a warm forward, streams, graphs, moved models, kernels."""

import pytest
import torch
from conftest import asked_for, skip_unless_installed

import dit_patch
from dit_patch.contribute import verify
from dit_patch.functions.kv_cache import integer_indices
from dit_patch.memo.keys import same_bits
from dit_patch.rotary import eager, rotary, rotary_qk_
from dit_patch.sites.inner_functions import InnerFunctions
from dit_patch.spec import mini
from dit_patch.spec.registry import Registry

pytestmark = pytest.mark.gpu
NAMES = Registry(plugins=False).names()


def build(name, dtype=torch.bfloat16):
    spec = Registry(plugins=False).get(name)
    skip_unless_installed(spec)
    case = spec.mini.case()
    return mini.build(spec, case, dtype=dtype).cuda(), case


def generation(case, dtype=torch.bfloat16, number=0):
    return list(mini.forwards(case, case.sizes[0], dtype=dtype, device="cuda", generation=number))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_patched_and_unpatched_are_equal_on_the_gpu(name, dtype):
    model, case = build(name, dtype)
    forwards = generation(case, dtype) + generation(case, dtype, 1)
    # FastVideo's stages keep some of what they pass on in float32, Kandinsky some weights; autocast sees to the rest.
    autocast = name.startswith(("fastvideo/", "diffusers/kandinsky5"))
    with torch.autocast("cuda", dtype, enabled=autocast and dtype is torch.bfloat16):
        verdict = verify.compare(model, forwards, only=asked_for(Registry(plugins=False).get(name)))
    assert verdict.equal and sum(row.hits for row in verdict.stats) > 0


@pytest.mark.parametrize("name", NAMES)
def test_sites_do_not_make_a_warm_forward_synchronise(name):
    autocast = name in ("fastvideo/matrixgame2", "diffusers/kandinsky5")  # which bfloat16 needs besides
    dtype = torch.float32 if autocast else torch.bfloat16
    model, case = build(name, dtype)
    forwards = generation(case, dtype)

    def synchronises():
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**forwards[-1])
        except RuntimeError as error:
            return str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with torch.no_grad():
        verify.run(model, forwards)
        plain = synchronises()
        with dit_patch.apply(model, only=asked_for(Registry(plugins=False).get(name))):
            verify.run(model, forwards)
            assert plain is not None or synchronises() is None


def test_a_model_that_moves_between_host_and_gpu_gives_what_it_gives_unpatched():
    model, case = build("diffusers/wan")
    plain, _ = build("diffusers/wan")
    with dit_patch.apply(model):
        for device in ("cuda", "cpu", "cuda"):
            for each in (model, plain):
                each.to(device)
            forwards = list(mini.forwards(case, case.sizes[0], dtype=torch.bfloat16, device=device))
            assert verify.first_difference(verify.run(plain, forwards), verify.run(model, forwards)) is None


def test_a_result_of_one_stream_is_not_handed_out_on_another():
    model, case = build("diffusers/wan")
    forwards = generation(case)
    plain = verify.run(model, forwards)
    with dit_patch.apply(model, only=["rope"]) as handle:
        verify.run(model, forwards)
        [row] = handle.stats()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            outputs = verify.run(model, forwards)
            torch.cuda.current_stream().synchronize()
        [after] = handle.stats()
        assert after.misses == row.misses + 1
        assert verify.first_difference(plain, outputs) is None


def test_a_graph_replays_with_the_inputs_of_the_replay_and_not_with_what_was_cached():
    model, case = build("diffusers/wan")
    first, last = generation(case)[0], generation(case)[-1]
    static = {name: value.clone() for name, value in first.items()}
    plain = verify.run(model, [first, last])
    with torch.no_grad(), dit_patch.apply(model) as handle:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                model(**static, return_dict=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (output,) = model(**static, return_dict=False)
        for number, arguments in enumerate((first, last)):
            for name, value in arguments.items():
                static[name].copy_(value)
            graph.replay()
            assert verify.first_difference([plain[number]], [[output]]) is None
        assert any("CUDA graph" in reason for row in handle.stats() for reason in row.bypassed)


@pytest.mark.parametrize("name", ["fastvideo/matrixgame2", "fastvideo/matrixgame3"])
def test_a_graph_of_a_world_model_s_warm_forward_replays_to_equal_bits(name):
    """Unpatched it cannot be captured: it copies from the host, and reads the device."""
    (model, case), (plain, _) = build(name, torch.float32), build(name, torch.float32)
    forwards = generation(case, torch.float32)
    passes = len(mini.PASSES)
    # The last forwards of the first block of frames, with KV caches whose indices are Python integers.
    warm, last = forwards[: 3 * passes : passes], forwards[3 * passes]
    for arguments in (*warm, last):
        for cache in {id(each): each for each in arguments.values() if isinstance(each, mini.KVCaches)}.values():
            integer_indices(cache)
    ours, theirs = mini.repeat([*warm, last]), mini.repeat([*warm, last])
    with torch.no_grad(), dit_patch.apply(model):
        for one, other in zip(ours[:-1], theirs[:-1]):
            model(**one), plain(**other)
        expected = plain(**theirs[-1])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(**ours[-1])
        graph.replay()
        assert verify.first_difference([[expected]], [[output]]) is None


@pytest.mark.parametrize("name", ["diffusers/wan", "diffusers/hunyuan_video"])
def test_step_caching_has_the_skips_and_bits_of_cache_dit_alone(name):
    pytest.importorskip("cache_dit", reason="needs cache-dit")
    import stepping

    spec = Registry(plugins=False).get(name)
    case = stepping.deep(spec)
    ours, theirs, plain = (mini.build(spec, case, dtype=torch.bfloat16).cuda() for _ in range(3))
    calls = stepping.steps(spec, case, dtype=torch.bfloat16, device="cuda")
    knobs = {"fn": 1, "bn": 0, "threshold": 1.0, "warmup": 2}
    read = stepping.cache_dit_alone(theirs, spec, **knobs)
    with dit_patch.apply(ours, step_cache={**knobs, "min_steps": 0}) as handle:
        made = verify.run(ours, calls)
        assert verify.first_difference(made, verify.run(theirs, calls)) is None
        assert sorted(stepping.cached(handle).values()) == sorted(map(tuple, read()))
    with dit_patch.apply(ours, step_cache={**knobs, "threshold": 0.0}):
        assert verify.first_difference(verify.run(ours, calls), verify.run(plain, calls)) is None


def test_step_caching_lets_a_graph_be_captured():
    pytest.importorskip("cache_dit", reason="needs cache-dit")
    import stepping

    spec = Registry(plugins=False).get("diffusers/wan")
    case = stepping.deep(spec)
    model = mini.build(spec, case, dtype=torch.bfloat16).cuda()
    [arguments, *_] = stepping.steps(spec, case, dtype=torch.bfloat16, device="cuda")
    [expected] = verify.run(model, [arguments])
    with torch.no_grad(), dit_patch.apply(model, only=(), step_cache={"fn": 1}) as handle:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                model(**arguments, return_dict=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (output,) = model(**arguments, return_dict=False)
        graph.replay()
        assert verify.first_difference([expected], [[output]]) is None
        assert "CUDA graph is captured" in str(handle)


# Rotary embeddings. On a CPU the same is compared in Triton's interpreter: test_rotary_interpreter.py.


def turning(shape, dtype, table=torch.float32):
    """x, and tables as models have them: an entry for each member of a pair."""
    x = torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)
    angles = torch.rand(shape[1], shape[3] // 2, dtype=torch.float64, device="cuda") * 100
    cos, sin = (each.repeat_interleave(2, dim=1).to(table) for each in (angles.cos(), angles.sin()))
    return x, cos, sin


REAL = [(1, 32760, 12, 128), (1, 118800, 24, 128), (1, 4680, 12, 128), (880, 3, 16, 64), (1, 1, 12, 128), (2, 4, 3, 80)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_the_kernel_gives_the_bits_of_the_libraries_functions(shape, dtype):
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    wan = InnerFunctions(WanAttnProcessor.__call__).apply_rotary_emb
    for table in (torch.float32, torch.float64):
        x, cos, sin = turning(shape, dtype, table)
        assert same_bits(rotary(x, cos, sin), apply_rotary_emb(x, (cos, sin), sequence_dim=1))
        wide = [each[None, :, None] for each in (cos, sin)]
        assert same_bits(rotary(x, cos[:, 0::2], sin[:, 1::2]), wan(x, *wide))
    if dtype is not torch.float32:
        own = [each[None, :, None].to(dtype) for each in (cos, sin)]
        assert same_bits(rotary(x, own[0][..., 0::2], own[1][..., 1::2], arithmetic="rounded"), wan(x, *own))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("table", [torch.complex64, torch.complex128], ids=str)
def test_a_product_of_complex_tensors_is_contracted_as_this_build_of_torch_does(table, dtype):
    x, cos, sin = turning((2, 2640, 12, 128), dtype, table.to_real())
    angles = torch.complex(cos[:, ::2].contiguous(), sin[:, ::2].contiguous())[None, :, None]
    pairs = torch.view_as_complex(x.to(table.to_real()).unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * angles).flatten(-2).to(dtype)
    assert same_bits(rotary(x, angles.real, angles.imag, arithmetic="complex"), expected)


def test_the_kernel_turns_more_elements_than_32_bits_can_count():
    shape = (1, 700_001, 24, 128)  # 2.15e9 elements
    x, cos, sin = turning((1, 1, *shape[2:]), torch.bfloat16)
    x, cos, sin = x.expand(shape).clone(), *(torch.rand(shape[1], 128, device="cuda") for _ in range(2))
    out = rotary(x, cos, sin)
    for start in (0, 349_000, shape[1] - 2000):
        some = slice(start, start + 2000)
        expected = torch.empty_like(x[:, some])
        tables = [each[some, None] for each in (cos, sin)]
        eager.rotate(x[:, some], expected, *tables, interleaved=True, arithmetic="separate")
        assert same_bits(out[:, some], expected)


def test_the_kernel_is_captured_in_a_cuda_graph():
    x, cos, sin = turning((1, 2640, 12, 128), torch.bfloat16)
    k = torch.randn_like(x)
    expected, expected_k = rotary(x, cos, sin), rotary(k, cos, sin)  # compiles it
    q, key = x.clone(), k.clone()
    rotary_qk_(q, key, cos, sin)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rotary(x, cos, sin)
        rotary_qk_(q, key, cos, sin)
    q.copy_(x), key.copy_(k)
    graph.replay()
    assert same_bits(out, expected) and same_bits(q, expected) and same_bits(key, expected_k)
