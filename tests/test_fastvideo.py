"""FastVideo's own classes, where they differ from all others: rollouts, masks, tables that stay behind, subclasses."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

import dit_patch
from dit_patch.contribute import verify
from dit_patch.hosts import fastvideo as host
from dit_patch.memo.keys import same_bits
from dit_patch.memo.results import map_tensors
from dit_patch.spec import mini
from dit_patch.spec.registry import Registry

pytest.importorskip("fastvideo")

pytestmark = pytest.mark.spread("name")

SPECS = [name for name in Registry(plugins=False).names() if name.startswith("fastvideo/")]


@pytest.fixture(autouse=True)
def no_tables_of_upstream_s():
    """FastVideo keeps its tables for the whole process, those of a broken call, too."""
    host.prepare()
    from fastvideo.layers.rotary_embedding import _ROTARY_POS_EMBED_CACHE

    _ROTARY_POS_EMBED_CACHE.clear()
    yield
    _ROTARY_POS_EMBED_CACHE.clear()


def row(handle, at):
    (found,) = [each for each in handle.stats() if each.at == at]
    return found


def counts(handle, at):
    return row(handle, at).hits, row(handle, at).misses


# The mode of the first call.


@pytest.mark.parametrize("name", SPECS)
def test_what_inference_mode_leaves_can_be_used_outside_and_in_training(tiny, name):
    each = tiny(name)
    calls = each.calls()
    handle = each.apply()
    with torch.inference_mode():
        ours = verify.run(each.model, calls)
        assert verify.first_difference(ours, verify.run(each.plain, calls)) is None
    hits = each.agree(calls)
    assert hits[handle.stats()[0].at] == len(calls) or name == "fastvideo/matrixgame3"
    ours, theirs = (train(model, calls[0]) for model in each.both)
    if theirs is None:  # upstream keeps an inference tensor in an attribute, which can be in nobody's backward pass
        assert name.startswith("fastvideo/matrixgame")
        return
    assert len(ours) > 10 and ours.keys() == theirs.keys()
    assert all(same_bits(ours[path], theirs[path]) for path in ours)
    for model in each.both:
        model.requires_grad_(False).eval()
    each.agree(calls)


@pytest.mark.parametrize("name", [name for name in SPECS if name.startswith("fastvideo/matrixgame")])
def test_training_after_inference(tiny, name):
    each = tiny(name)
    calls = each.calls()
    each.apply()
    each.agree(calls)
    ours, theirs = (train(model, calls[0]) for model in each.both)
    assert len(ours) > 10 and ours.keys() == theirs.keys()
    assert all(same_bits(ours[path], theirs[path]) for path in ours)


def train(model, arguments):
    """The gradients of one step, by name; None where an inference tensor is in the way."""
    model.requires_grad_(True).train()
    model.zero_grad()
    arguments = {
        name: map_tensors(torch.clone, value) if isinstance(value, mini.KVCaches) else value
        for name, value in arguments.items()
    }
    try:
        model(**arguments).square().mean().backward()
    except RuntimeError as error:
        if "Inference tensors cannot be saved for backward" not in str(error):
            raise
        return None
    return {path: each.grad for path, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize(
    "name",
    ["fastvideo/wan", "fastvideo/hunyuan_video", "fastvideo/hunyuan_video15", "fastvideo/matrixgame2_bidirectional"],
)
def test_a_first_call_under_a_meta_default_device_leaves_tables_that_hold_something(tiny, name):
    each = tiny(name)
    calls = each.calls()
    with torch.device("meta"), pytest.raises((NotImplementedError, RuntimeError)), torch.no_grad():
        each.plain(**calls[0])  # upstream's own table, and from now on its memo, are on the meta device
    from fastvideo.layers.rotary_embedding import _ROTARY_POS_EMBED_CACHE

    _ROTARY_POS_EMBED_CACHE.clear()
    handle = each.apply()
    with torch.device("meta"):
        ours = verify.run(each.model, calls)
    assert verify.first_difference(ours, verify.run(each.plain, calls)) is None
    each.agree(calls)
    assert all(not row.bypassed for row in handle.stats())


@pytest.mark.parametrize("name", SPECS)
def test_autocast_counts(tiny, name):
    each = tiny(name)
    calls = each.calls()
    each.apply()
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            if name in ("fastvideo/wan", "fastvideo/causal_wan") and enabled:
                continue  # upstream asserts that the projected prompt has the latents' dtype
            each.agree(calls)


# Rollouts.


@pytest.mark.parametrize("name", ["fastvideo/causal_wan", "fastvideo/matrixgame2"])
def test_a_long_rollout_stays_within_the_budget(tiny, name):
    each = tiny(name)
    size = {"blocks": 24, "f": 3, "h": 4, "w": 8, "per_call": 3}
    calls = list(mini.forwards(each.case, size, steps=2, passes=("cond",)))
    handle = each.apply(only="rope", max_bytes=8_000_000 if name == "fastvideo/matrixgame2" else 5 * 2 * 24 * 24 * 8)
    each.agree(calls)
    assert handle.nbytes <= handle.options.max_bytes
    table = row(handle, "forward:get_rotary_pos_embed")
    if name == "fastvideo/causal_wan":
        assert (table.hits, table.misses, table.evictions) == (48, 24, 19)
    else:
        assert (table.hits, table.misses, table.nbytes) == (71, 1, 0)


def test_the_window_and_the_resolution_may_change_under_one_handle(tiny):
    each = tiny("fastvideo/matrixgame2")
    handle = each.apply()
    for size, window in ((0, {}), (1, {"local_attn_size": 3}), (0, {"sink_size": 1}), (2, {"local_attn_size": 6})):
        for model in each.both:
            model.set_causal_attention_window(**window)
        each.agree(each.calls(size=size))
    assert all(not row.bypassed for row in handle.stats())


def test_masks_are_built_where_a_layer_has_no_cache(tiny):
    each = tiny("fastvideo/matrixgame2")
    calls = [
        {name: value for name, value in call.items() if name not in ("kv_cache_mouse", "kv_cache_keyboard")}
        for call in each.calls(size=0)[:6]  # the first block: later ones need the caches
    ]
    handle = each.apply()
    each.agree(calls)
    action = "_prepare_blockwise_causal_attn_mask_action"
    assert counts(handle, "_prepare_blockwise_causal_attn_mask") == (5, 1)
    assert counts(handle, action) == (11, 1) and row(handle, action).nbytes > 0
    some = [{**call, "kv_cache_mouse": mini.KVCaches([None] * 3)} for call in calls]
    each.agree(some)
    assert counts(handle, action) == (23, 1)


def test_upstream_s_block_size_is_kept_unless_fixes_are_asked_for(tiny):
    def first_block(each):
        return [
            {name: value for name, value in call.items() if name not in ("kv_cache_mouse", "kv_cache_keyboard")}
            for call in each.calls(size=0)[:6]
        ]

    exact = tiny("fastvideo/matrixgame2", "other_block_size")  # 1 frame in the model, 3 in the calls
    handle = exact.apply()
    exact.agree(first_block(exact))
    assert "lossless" in str(handle) and "fix" not in str(handle)
    fixed, right = tiny("fastvideo/matrixgame2", "other_block_size"), tiny("fastvideo/matrixgame2")
    calls = first_block(fixed)
    handle = fixed.apply(fixes=True)
    ours = verify.run(fixed.model, calls)
    assert verify.first_difference(ours, verify.run(right.plain, calls)) is None
    assert verify.first_difference(ours, verify.run(fixed.plain, calls)) is not None
    text = str(handle)
    assert "lossless" not in text and "fixes on (where they apply, results differ from upstream's)" in text
    assert "fix on: num_frame_per_block is the forward's num_frame_per_block" in text


# Masks that a model asks for once in its life.


@pytest.mark.parametrize("name", ["fastvideo/causal_wan", "fastvideo/matrixgame2"])
def test_a_mask_that_the_model_forgets_is_not_built_again(tiny, name):
    each = tiny(name, "no_cache")
    calls = each.calls(steps=1)
    handle = each.apply()
    each.agree(calls)
    at = "_prepare_blockwise_causal_attn_mask"
    assert counts(handle, at) == (0, 1)
    for _ in range(2):
        for model in each.both:
            for mask in {"block_mask", "block_mask_keyboard", "block_mask_mouse"} & set(vars(model)):
                setattr(model, mask, None)
        each.agree(calls)
    assert counts(handle, at) == (2, 1)
    assert row(handle, at).nbytes > 0


def test_a_mask_that_upstream_keeps_for_too_long_is_kept_as_long(tiny):
    each = tiny("fastvideo/matrixgame2", "no_cache")
    each.apply()
    small, large = (
        list(mini.forwards(each.case, {"f": f, "h": 8, "w": 12, "frames": 1 + 4 * (f - 1)}, steps=1)) for f in (6, 9)
    )
    each.agree(small)
    outcomes = []
    for model in each.both:
        try:
            outcomes.append(verify.run(model, large))
        except (RuntimeError, ValueError) as error:
            outcomes.append(str(error))
    if isinstance(outcomes[0], str):
        assert outcomes[0] == outcomes[1]
    else:
        assert verify.first_difference(*outcomes) is None


def test_teacher_forcing_masks_are_built_once_for_all_models_calls(tiny):
    each = tiny("fastvideo/causal_wan", "whole_window")
    arguments = dict(
        mini.forwards(Registry().get("fastvideo/causal_wan").mini.case("no_cache"), each.case.sizes[0]).__next__()
    )
    arguments["clean_x"] = torch.randn_like(arguments["hidden_states"])
    handle = each.apply()
    for _ in range(2):
        for model in each.both:
            model.teacher_forcing_block_mask = None
        each.agree([arguments])
    assert counts(handle, "_prepare_teacher_forcing_mask") == (1, 1)


def test_the_keyboard_s_own_mask_is_built_once(tiny):
    each = tiny("fastvideo/matrixgame2", "no_actions")
    for model in each.both:
        model.use_rope_keyboard = False
    handle = each.apply()
    each.agree(each.calls())
    assert counts(handle, "_prepare_blockwise_causal_attn_mask_keyboard") == (len(each.calls()) - 1, 1)


# What a model keeps in attributes of its own.


def test_action_tables_are_one_for_all_modules_and_given_back(tiny):
    each = tiny("fastvideo/matrixgame2")
    modules = [block.action_model for block in each.model.blocks if block.action_model is not None]
    modules[0]._freqs_cos = before = torch.ones(7500, 64)
    handle = each.apply()
    assert all(module._freqs_cos is None for module in modules)
    each.agree(each.calls())
    assert len({module._freqs_cos.untyped_storage()._cdata for module in modules}) == 1
    assert row(handle, TABLE).nbytes == 2 * 7500 * 128 * 4
    handle.remove()
    assert modules[0]._freqs_cos is before and modules[1]._freqs_cos is None


TABLE = "fastvideo.models.dits.matrixgame2.action_module:_get_nd_rotary_pos_embed_matrixgame2"


# Classes that inherit from those that have a spec.


def dreamx():
    from fastvideo.models.dits.dreamx_world import DreamXWorldTransformer3DModel as cls

    config = Registry().get("fastvideo/wan").mini.case().config
    return host.build(cls, {**config, "add_control_adapter": False}).eval()


def test_a_subclass_with_a_forward_of_its_own_is_covered_as_far_as_that_is_safe():
    host.prepare()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = dreamx()
    case = Registry().get("fastvideo/wan").mini.case()
    calls = list(mini.forwards(case, case.sizes[0]))
    plain = verify.run(model, calls)
    with dit_patch.apply(model) as handle:
        assert verify.first_difference(plain, verify.run(model, calls)) is None
        assert counts(handle, "forward:get_rotary_pos_embed") == (len(calls) - 1, 1)
        there = [row for row in handle.stats() if row.notes not in (("not in this model",), ("not called so far",))]
        assert len(there) > 4 and all(row.hits for row in there)


def test_what_counts_on_the_forward_of_the_class_is_left_alone_and_told():
    host.prepare()
    from fastvideo.models.dits.matrixgame3.model import MatrixGame3WanModel

    class Mine(MatrixGame3WanModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    case = Registry().get("fastvideo/matrixgame3").mini.case()
    model = host.build(Mine, case.config).eval()
    calls = list(mini.forwards(case, case.sizes[0], steps=2))
    plain = verify.run(model, calls)
    with pytest.warns(UserWarning, match="Mine has a forward of its own.*camera_patch_embedding.forward"):
        handle = dit_patch.apply(model)
    assert verify.first_difference(plain, verify.run(model, calls)) is None
    assert row(handle, "text_embedding.forward").notes == ("left alone: it counts on the forward that Mine replaces",)
    assert row(handle, "forward:_build_rope_freqs").notes == ("not in Mine, which has a forward of its own",)
    assert row(handle, "condition_embedder.time_modulation.forward").misses > 0
    handle.remove()


# Beside what FastVideo does to its models.


@pytest.mark.parametrize("name", ["fastvideo/wan", "fastvideo/matrixgame2", "fastvideo/matrixgame3"])
def test_blocks_compiled_as_fastvideo_compiles_them(tiny, name):
    each = tiny(name)
    each.apply()
    for model in each.both:
        for block in model.blocks:
            block.forward = torch.compile(block.forward, backend="eager")
    with contextlib.suppress(AttributeError):
        torch._dynamo.reset()
    hits = each.agree(each.calls(steps=1, size=2)[:4])
    assert len(hits) > 2
    notes = {row.at: row.notes for row in each.handle.stats() if row.notes}
    if name == "fastvideo/matrixgame3":
        assert notes["blocks.*.cam_scale_layer.forward"] == ("inside compiled code, which is left alone",)


def test_the_class_that_fsdp_makes_of_a_model_is_known(tiny):
    from torch.distributed.fsdp import fully_shard

    each = tiny("fastvideo/wan")
    sharded = fully_shard(each.model)
    assert type(sharded).__name__ == "FSDPWanTransformer3DModel"
    each.apply()
    hits = each.agree(each.calls())
    assert hits["forward:get_rotary_pos_embed"] == 3


def test_lora_weights_that_the_pipeline_merges_count(tiny):
    """FastVideo merges through `.data`, which leaves no version behind."""
    each = tiny("fastvideo/hunyuan_video")

    class Pipeline:
        def __init__(self, model):
            self.modules = {"transformer": model}

        def merge_lora_weights(self):
            self.modules["transformer"].guidance_in.mlp.fc_out.weight.data += 0.5

    pipelines = [Pipeline(model) for model in each.both]
    each.handle = dit_patch.apply(pipelines[0])
    calls = each.calls()
    each.agree(calls)
    for pipeline in pipelines:
        pipeline.merge_lora_weights()
    each.agree(calls)
    each.handle.remove()
    assert "merge_lora_weights" not in vars(pipelines[0])


def test_models_called_by_position_are_known_by_the_names_in_their_spec(tiny):
    each = tiny("fastvideo/causal_wan")
    handle = each.apply()
    names = ("hidden_states", "encoder_hidden_states", "timestep")
    calls = each.calls()

    def positionally(model):
        def call(**arguments):
            return model(*[arguments.pop(name) for name in names], **arguments)

        return call

    ours, theirs = (verify.run(positionally(model), calls) for model in each.both)
    assert verify.first_difference(ours, theirs) is None
    assert counts(handle, "condition_embedder.text_embedder.forward") == (len(calls) - 2, 2)


def test_more_positions_than_the_spec_names_are_not_guessed(tiny):
    each = tiny("fastvideo/causal_wan")
    handle = each.apply()
    arguments = mini.forwards(each.case, each.case.sizes[0]).__next__()
    order = ("hidden_states", "encoder_hidden_states", "timestep")
    with torch.no_grad(), pytest.raises(TypeError):  # upstream's own: `kv_cache` is given twice
        each.model(*[arguments.pop(name) for name in order], None, None, **arguments)
    reason = "the model was called with positional arguments that its spec does not name"
    assert reason in row(handle, "condition_embedder.text_embedder.forward").bypassed or not any(
        row.hits for row in handle.stats()
    )


def test_stages_that_run_the_model_are_found_by_what_they_hold(tiny):
    each = tiny("fastvideo/matrixgame2")

    class Denoising:
        def __init__(self, model):
            self.transformer = model

        def _initialize_kv_cache(self):
            return [{"k": torch.zeros(1), "global_end_index": torch.tensor([3]), "local_end_index": torch.tensor([1])}]

        def _initialize_action_kv_cache(self):
            return self._initialize_kv_cache(), self._initialize_kv_cache()

    mine, other = Denoising(each.model), Denoising(each.plain)
    pipeline = types.SimpleNamespace(modules={"transformer": each.model}, stages=[object(), mine, other])
    each.handle = dit_patch.apply(pipeline)
    assert mine._initialize_kv_cache()[0]["global_end_index"] == 3
    assert [cache["local_end_index"] for (cache,) in mine._initialize_action_kv_cache()] == [1, 1]
    assert isinstance(mine._initialize_kv_cache()[0]["k"], torch.Tensor)
    assert isinstance(other._initialize_kv_cache()[0]["global_end_index"], torch.Tensor)
    assert counts(each.handle, "pipeline:_initialize_kv_cache") == (4, 0)
    each.handle.remove()
    assert set(vars(mine)) == {"transformer"}


def test_in_half_precision_its_models_run_under_autocast_and_nothing_else_does():
    spec = Registry().get("fastvideo/matrixgame2")
    case = spec.mini.case("no_cache")
    model = mini.build(spec, case, dtype=torch.bfloat16)
    calls = list(mini.forwards(case, case.sizes[0], steps=1, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="dtype"):
        verify.run(model, calls)
    with mini.autocast(spec, torch.bfloat16, "cpu"):
        assert verify.run(model, calls)[0][0].isfinite().all()
    for name, dtype in (("fastvideo/matrixgame2", torch.float32), ("diffusers/wan", torch.bfloat16)):
        with mini.autocast(Registry().get(name), dtype, "cpu"):
            assert not torch.is_autocast_enabled("cpu")
