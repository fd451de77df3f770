"""FastVideo's own pipelines, patched: the latents of the unpatched ones, with the hits that their structure promises.

Every pipeline has a twin of the same weights that is never patched. What is expected of the sites is worked out from
how often a pipeline calls its transformers, and how much of what it calls them with is new.
"""

import logging
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from unittest import mock

import fastvideo_pipelines as pipelines
import pytest
import torch
import toys
from conftest import skip_unless_installed
from fastvideo_hits import (
    ACTION_KV,
    EMBEDDER,
    EXPECTED,
    KV,
    MODULATION,
    ROPE,
    ROTARY,
    SEEDS,
    SINUSOID,
    TEXT,
    matrixgame2,
    matrixgame3,
)
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode

import dit_patch
from dit_patch import DitPatchError
from dit_patch.memo.context import transparent_modes
from dit_patch.memo.keys import same_bits
from dit_patch.memo.model_guards import HOOKED_BETWEEN
from dit_patch.sites.scope import current
from dit_patch.spec.registry import Registry

pytestmark = [
    pytest.mark.usefixtures("first_checks_only"),
    pytest.mark.spread("name"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="these pipelines are put together for the CPU"),
]

# Each with what it changes in the transformer's configuration, and the size of its latents. Of the three blocks of a
# short Matrix-Game 2 two fill the window, and the third evicts from it.
SHORT = (9, 4, 8)
VARIANTS = {
    "causal_wan, relativistic": ("causal_wan", {"rope_cache_policy": "relativistic", "sink_size": 1}, None),
    "matrixgame2, short": ("matrixgame2", {}, SHORT),
    "matrixgame2, relativistic": ("matrixgame2", {"rope_cache_policy": "relativistic", "sink_size": 1}, SHORT),
    "matrixgame2, no actions": ("matrixgame2", {"action_config": {}}, SHORT),
    "hunyuan15, mean flow": ("hunyuan15", {"use_meanflow": True}, None),
}
QUICK = ["matrixgame2, short" if name == "matrixgame2" else name for name in pipelines.CASES]
CAUSAL = ["matrixgame2, short", "causal_wan", "causal_wan22", "causal_wan_steps"]


@pytest.fixture(scope="module", autouse=True)
def fastvideo():
    skip_unless_installed(Registry(plugins=False).get("fastvideo/wan"))
    logger = logging.getLogger("fastvideo")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a line for every mask would hide what a failing test says
    yield
    logger.setLevel(level)
    twin.cache_clear()
    plain.cache_clear()
    streamed.cache_clear()


@pytest.fixture
def patch():
    """`apply`, with the handles removed after the test."""
    with ExitStack() as handles:
        yield lambda target, **options: handles.enter_context(dit_patch.apply(target, **options))


def make(name, seed=0):
    case, arch, size = VARIANTS.get(name, (name, {}, None))
    tiny = pipelines.make(case, seed, **arch)
    return resized(tiny, size) if size else tiny


def resized(tiny, size):
    tiny.case = replace(tiny.case, size=size)
    return tiny


@cache
def twin(name):
    """A pipeline that is never patched."""
    return make(name)


@cache
def plain(name, seed):
    return pipelines.run(twin(name), seed)


@cache
def streamed(name, seed):
    return pipelines.stream(twin(name), seed)


def agrees(tiny, name, seed=0):
    """Whether the pipeline generates the twin's latents."""
    return same_bits(pipelines.run(tiny, seed), plain(name, seed))


def transformers(tiny):
    return {name: module for name, module in tiny.pipeline.modules.items() if name.startswith("transformer")}


def blocks(tiny):
    model = tiny.transformer
    return model.double_blocks if hasattr(model, "double_blocks") else model.blocks


@contextmanager
def watching(tiny, see):
    """`see(kwargs)` before each forward of the transformers."""
    hooks = [
        module.register_forward_pre_hook(lambda _, args, kwargs: see(kwargs), with_kwargs=True)
        for module in transformers(tiny).values()
    ]
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def at_call(module, number, act):
    """`act()` before that call of the module."""
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1
        if calls == number:
            act()

    hook = module.register_forward_pre_hook(count)
    yield
    hook.remove()
    assert calls >= number


def raising(reason):
    def act():
        raise reason

    return act


def counts(handle):
    """Calls and misses of every site that was called, by model."""
    found = {}
    for row in handle.stats():
        if row.hits or row.misses:
            found.setdefault(row.model, {})[row.at] = row.hits + row.misses, row.misses
    return found


def hits(handle):
    return sum(row.hits for row in handle.stats())


def bypassed(handle):
    return {(row.model, row.at): set(row.bypassed) for row in handle.stats() if row.bypassed}


def contents(tiny):
    """What is in the pipeline, its stages and its models, and in every Python module that specs may patch."""
    owners = {"pipeline": tiny.pipeline}
    owners |= {f"stage {number}": stage for number, stage in enumerate(tiny.pipeline.stages)}
    for name, module in tiny.pipeline.modules.items():
        if isinstance(module, torch.nn.Module) and name != "vae":  # which keeps frames and counts calls
            owners |= {f"{name}.{path}": each for path, each in module.named_modules()}
    found = {
        name: {key: value.copy() if isinstance(value, dict) else value for key, value in vars(owner).items()}
        for name, owner in owners.items()
    }
    for name, module in list(sys.modules.items()):
        if _is_code(name):
            # Dynamo's own, which come and go with what it has compiled, begin with two underscores.
            found[name] = {key: each for key, each in vars(module).items() if callable(each) and key[:2] != "__"}
    return found


def _is_code(owner):
    return owner.startswith(("fastvideo.", "dit_patch.functions"))


def changed(before, tiny):
    """The owners that have anything else in them than before."""
    after = contents(tiny)
    return {name for name in before if not toys.same_snapshot([(name, before[name])], [(name, after[name])])}


def names(tiny):
    """The names of what is in the pipeline, its stages and its models."""
    return {owner: set(values) for owner, values in contents(tiny).items() if not _is_code(owner)}


@contextmanager
def generating(tiny, name):
    """What is expected of the generations in here, once they are over."""
    expected = {}
    yield expected
    if name.startswith("matrixgame3"):
        each = [matrixgame3(clips=3, steps=3, layers=3, base=name.endswith("base"))]
    else:
        each = EXPECTED[name]
    expected |= zip(transformers(tiny), each, strict=True)


EVERY = [*pipelines.CASES, *(name for name in VARIANTS if name not in QUICK)]


@pytest.mark.parametrize("name", EVERY)
def test_generations_are_the_unpatched_pipelines_with_the_hits_that_are_due(name, patch):
    assert not same_bits(plain(name, 0), plain(name, 1))
    tiny = make(name)
    with generating(tiny, name) as expected, patch(tiny.pipeline) as handle:
        for seed in SEEDS:
            assert agrees(tiny, name, seed), seed
        counted = counts(handle)
    assert counted == expected
    assert not bypassed(handle)
    assert all(row.notes for row in handle.stats() if not row.hits and not row.misses)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_left_of_a_patch_that_was_taken_back(name, patch):
    tiny = make(name)
    before = contents(tiny)
    with patch(tiny.pipeline):
        assert changed(before, tiny)
        assert agrees(tiny, name)
    assert names(tiny) == names(twin(name))
    after = contents(tiny)
    with patch(tiny.pipeline):
        assert agrees(tiny, name)
    assert not changed(after, tiny)
    assert agrees(tiny, name)


@pytest.mark.parametrize(
    "name", ["wan_i2v", "causal_wan_steps", "matrixgame2, short", "hunyuan", "hunyuan15", "matrixgame3"]
)
def test_every_hit_computed_again_is_what_was_kept(name, patch):
    tiny = make(name)
    handle = patch(tiny.pipeline, check="always")
    assert agrees(tiny, name, 1) and agrees(tiny, name, 0)
    assert not bypassed(handle) and hits(handle) > 10


@pytest.mark.parametrize("name", ["causal_wan", "hunyuan15", "matrixgame3"])
def test_with_room_for_some_results_only(name, patch):
    tiny = make(name)
    handle = patch(tiny.pipeline, max_bytes=30_000)
    for seed in SEEDS:
        assert agrees(tiny, name, seed)
        assert handle.nbytes <= 30_000
    assert hits(handle) and (bypassed(handle) or any(row.evictions for row in handle.stats()))


@contextmanager
def in_float32(*tinies):
    """The stages name bfloat16 for autocast and for what they hand to the models; with float32 there is no autocast."""
    for tiny in tinies:
        for module in transformers(tiny).values():
            module.float()
        tiny.args.disable_autocast = True
        config = tiny.args.pipeline_config
        config.text_encoder_precisions = ("fp32",) * len(config.text_encoder_precisions)
    with mock.patch.object(torch, "bfloat16", torch.float32):
        yield


@pytest.mark.parametrize("name", ["matrixgame2, short", "causal_wan", "wan22", "hunyuan15", "matrixgame3_base"])
def test_float32_without_autocast(name, patch):
    in_bfloat16 = plain(name, 0)
    tiny, other = make(name), make(name)
    with in_float32(tiny, other):
        wanted = [pipelines.run(other, seed) for seed in (0, 1)]
        assert not same_bits(wanted[0], in_bfloat16)
        with generating(tiny, name) as expected:
            handle = patch(tiny.pipeline)
            for seed in SEEDS:
                assert same_bits(pipelines.run(tiny, seed), wanted[seed])
            counted = counts(handle)
    assert counted == expected
    assert not bypassed(handle)


@pytest.mark.parametrize("name", ["hunyuan15", "matrixgame3_base"])
def test_bfloat16_without_autocast(name, patch):
    """The others mix dtypes, and need autocast."""
    tiny, other = make(name), make(name)
    tiny.args.disable_autocast = other.args.disable_autocast = True
    wanted = pipelines.run(other)
    handle = patch(tiny.pipeline)
    for _ in range(2):
        assert same_bits(pipelines.run(tiny), wanted)
    assert not bypassed(handle) and hits(handle) > 10


def test_under_inference_mode_inputs_without_a_version_are_not_keyed_on(patch):
    tiny = make("wan")
    handle = patch(tiny.pipeline)
    with torch.inference_mode():
        assert agrees(tiny, "wan", 1) and agrees(tiny, "wan", 0)
    unseen = {"an inference tensor has no version: changes in place would go unseen"}
    assert bypassed(handle) == {("transformer", at): unseen for at in (EMBEDDER, MODULATION, TEXT)}
    assert counts(handle) == {"transformer": {ROPE: (16, 1), SINUSOID: (16, 0), ROTARY: (32, 0)}}
    assert agrees(tiny, "wan")


def filled(tiny):
    """The latents, and the KV caches that the transformers were called with: of frames, and of actions if any."""
    seen = []

    def see(kwargs):
        caches = [value for name, value in kwargs.items() if name.startswith("kv_cache") and value is not None]
        if not any(caches[0] is known[0] for known in seen):
            seen.append(caches)

    with watching(tiny, see):
        return pipelines.run(tiny), seen


def indices(caches):
    layers = [layer for each in caches for layer in each]
    return [layer[name] for layer in layers for name in ("global_end_index", "local_end_index")]


def caching(handle):
    """Hits and notes of the sites that make KV caches."""
    return {row.at: (row.hits, row.notes) for row in handle.stats() if row.kind == "kv_cache"}


@pytest.mark.parametrize("name", CAUSAL)
def test_kv_caches_count_in_integers(name, patch):
    tiny = make(name)
    wanted, theirs = filled(twin(name))
    handle = patch(tiny.pipeline, only="kv_cache")
    latents, ours = filled(tiny)
    assert same_bits(latents, wanted)
    assert len(ours) == len(theirs) == len(transformers(tiny))
    for integers, tensors in zip(ours, theirs):
        assert len(integers) == len(tensors) == (3 if "matrixgame2" in name else 1)
        assert {type(index) for index in indices(integers)} == {int}
        assert {type(index) for index in indices(tensors)} == {torch.Tensor}
        assert indices(integers) == [int(index) for index in indices(tensors)]
        assert any(indices(integers))
    assert all(found and not notes for found, notes in caching(handle).values())
    handle.remove()
    latents, after = filled(tiny)
    assert same_bits(latents, wanted)
    assert {type(index) for tensors in after for index in indices(tensors)} == {torch.Tensor}


@pytest.mark.parametrize("name", ["matrixgame2, short", "causal_wan", "causal_wan_steps"])
def test_a_transformer_patched_alone_gets_the_caches_with_its_pipeline(name, patch):
    tiny = make(name)
    sites = [KV, ACTION_KV] if "matrixgame2" in name else [KV]
    handle = patch(tiny.transformer)
    assert caching(handle) == dict.fromkeys(sites, (0, ("not in this pipeline",)))
    latents, [caches] = filled(tiny)
    assert same_bits(latents, plain(name, 0))
    assert {type(index) for index in indices(caches)} == {torch.Tensor}

    assert dit_patch.apply(tiny.pipeline) is handle
    assert caching(handle) == dict.fromkeys(sites, (0, ("not called so far",)))
    latents, [caches] = filled(tiny)
    assert same_bits(latents, plain(name, 0))
    assert {type(index) for index in indices(caches)} == {int}
    assert caching(handle) == dict.fromkeys(sites, (1, ()))

    assert dit_patch.apply(tiny.transformer) is dit_patch.apply(tiny.pipeline) is handle
    assert agrees(tiny, name, 1)
    assert caching(handle) == dict.fromkeys(sites, (2, ())), "patched once, however often it was asked for"
    handle.remove()
    assert names(tiny) == names(twin(name))
    assert agrees(tiny, name)


def test_an_expert_patched_alone_is_in_the_way_of_its_pipeline_and_apply_says_so(patch):
    tiny = make("causal_wan22")
    handle = patch(tiny.transformer)
    with pytest.raises(DitPatchError, match="some of these models are patched by another handle already"):
        dit_patch.apply(tiny.pipeline)
    assert agrees(tiny, "causal_wan22")
    handle.remove()
    patch(tiny.pipeline)
    assert agrees(tiny, "causal_wan22")


def test_matrixgame2_played_live_with_gradients_enabled(patch):
    name = "matrixgame2, short"
    tiny = make(name)
    enabled = set()
    with watching(tiny, lambda _: enabled.add(torch.is_grad_enabled())):
        handle = patch(tiny.pipeline)
        for seed in SEEDS:
            assert same_bits(pipelines.stream(tiny, seed), streamed(name, seed))
    assert enabled == {True}
    assert counts(handle) == {"transformer": matrixgame2(blocks=3)}
    assert not bypassed(handle)
    assert agrees(tiny, name), "as a whole after that"
    handle.remove()
    assert same_bits(pipelines.stream(tiny, 0), streamed(name, 0))
    assert names(tiny) == names(twin(name))


def test_a_window_that_changes_between_generations(patch):
    tiny, other = make("matrixgame2, short"), make("matrixgame2, short")
    handle = patch(tiny.pipeline)
    latents = []
    for frames, sink in [(6, 0), (3, 1), (6, 0)]:
        for each in (tiny, other):
            each.transformer.set_causal_attention_window(local_attn_size=frames, sink_size=sink)
        latents.append(pipelines.run(other))
        assert same_bits(pipelines.run(tiny), latents[-1]), (frames, sink)
    assert not same_bits(latents[0], latents[1]) and same_bits(latents[0], latents[2])
    assert not bypassed(handle)


@pytest.mark.parametrize("name", ["wan", "causal_wan", "hunyuan15"])
def test_a_prompt_that_the_user_keeps_is_projected_once_a_generation_and_one_written_into_is_new(name, patch):
    def told(tiny):
        kept = tiny.request().prompt_embeds
        latents = [asked(tiny, kept), asked(tiny, kept, seed=1)]
        kept[0].mul_(2)
        return [*latents, asked(tiny, kept)]

    tiny = make(name)
    wanted = told(twin(name))
    assert not same_bits(wanted[0], wanted[2])
    handle = patch(tiny.pipeline)
    assert all(map(same_bits, told(tiny), wanted))
    at = "txt_in.input_embedder.forward" if name == "hunyuan15" else TEXT
    (misses,) = [row.misses for row in handle.stats() if row.at == at]
    # Of what is said and of what is not, one in each generation.
    assert misses == (3 if name == "causal_wan" else 3 + 3)


def asked(tiny, prompts, seed=0):
    batch = tiny.request(seed)
    batch.prompt_embeds = list(prompts)
    with pipelines._generating():
        return tiny.pipeline.forward(batch, tiny.args).output


def with_lora_on_the_prompt():
    """A pipeline that adapts the prompt's projection, which FastVideo leaves out of all adapters, as it is set up."""
    tiny = make("wan")
    tiny.pipeline.trainable_transformer_modules = transformers(tiny)  # all pipelines share one dict
    tiny.pipeline.exclude_lora_layers = {"transformer": []}
    tiny.args.pipeline_config.text_encoder_precisions = ("bf16",)  # its LoRA layers return what they are given
    return tiny


@pytest.mark.parametrize("first", ["pipeline", "transformer"])
@torch.compiler.set_stance("force_eager")  # the forwards of LoRA layers are compiled
def test_lora_merged_and_unmerged_by_a_pipeline_counts_even_with_the_same_prompt(first, patch, tmp_path):
    tensors = {}
    for layer in ("fc_in", "fc_out"):
        rows, columns = getattr(make("wan").transformer.condition_embedder.text_embedder, layer).weight.shape
        place = f"diffusion_model.condition_embedder.text_embedder.{layer}"
        tensors |= {f"{place}.lora_A.weight": 0.3 * torch.ones(2, columns)}
        tensors |= {f"{place}.lora_B.weight": 0.3 * torch.ones(rows, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")

    def merging(tiny):
        kept = tiny.request().prompt_embeds
        yield asked(tiny, kept)
        tiny.pipeline.set_lora_adapter("one", str(tmp_path / "lora.safetensors"))
        yield asked(tiny, kept)
        tiny.pipeline.unmerge_lora_weights()
        yield asked(tiny, kept)
        tiny.pipeline.merge_lora_weights()
        yield asked(tiny, kept)

    wanted = list(merging(with_lora_on_the_prompt()))
    assert not any(map(same_bits, wanted, wanted[1:]))
    tiny = with_lora_on_the_prompt()
    if first == "transformer":
        patch(tiny.transformer)
    patch(tiny.pipeline)
    assert list(map(same_bits, merging(tiny), wanted)) == [True] * 4


SIZES = {
    "wan": [(3, 8, 12), (2, 8, 8), (3, 12, 8), (3, 8, 12)],
    "causal_wan": [(12, 8, 12), (6, 8, 12), (9, 12, 8), (12, 8, 12)],
    "matrixgame2": [(9, 4, 8), (6, 8, 4), (9, 4, 8)],
    "hunyuan": [(3, 8, 12), (2, 12, 8), (3, 8, 12)],
    "hunyuan15": [(3, 4, 6), (2, 6, 4), (3, 4, 6)],
    "matrixgame3": [(35, 4, 6), (25, 6, 4), (15, 4, 6), (35, 4, 6)],
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_changes_between_generations(name, patch):
    tiny, other = make(name), make(name)
    handle = patch(tiny.pipeline)
    for size in SIZES[name]:
        wanted = pipelines.run(resized(other, size))
        assert same_bits(pipelines.run(resized(tiny, size)), wanted), size
    assert not bypassed(handle)
    kept = [row for row in handle.stats() if row.kind in ("rope", "mask") and not row.at.startswith("..")]
    tables = {row.at: row.misses for row in kept}
    assert same_bits(pipelines.run(tiny), wanted)
    assert {row.at: row.misses for row in handle.stats() if row.at in tables} == tables


@pytest.mark.parametrize(
    "pair, order",
    [(("wan", "matrixgame2, short"), (0, 1)), (("causal_wan", "causal_wan"), (1, 0))],
    ids=["first out first", "last out first"],
)
def test_two_pipelines_side_by_side(pair, order, patch):
    tinies, others = ([make(name, seed) for seed, name in enumerate(pair)] for _ in range(2))
    wanted = {(at, seed): pipelines.run(others[at], seed) for at in (0, 1) for seed in (0, 1)}
    before = [contents(tiny) for tiny in tinies]

    def agree(pipes, *seeds):
        return all(same_bits(pipelines.run(pipes[at], seed), wanted[at, seed]) for seed in seeds for at in (0, 1))

    handles = [patch(tiny.pipeline) for tiny in tinies]
    assert agree(tinies, 0, 1)
    calls = [counts(handle) for handle in handles]
    assert all(calls) and not any(map(bypassed, handles))
    assert agree(others, 0)
    assert calls == [counts(handle) for handle in handles], "pipelines that are not patched do not count"
    for at in order:
        handles[at].remove()
        assert agree(tinies, 0)
        assert names(tinies[at]) == names(others[at])
    assert not any(filter(_is_code, changed(before[0], tinies[0])))


@pytest.mark.parametrize(
    "outer, inner", [("matrixgame2, short", "wan"), ("hunyuan15", "hunyuan15"), ("wan", "matrixgame3")]
)
def test_a_generation_inside_anothers_forward(outer, inner, patch):
    def nested(around, within):
        latents = []
        for call in (1, 3):
            with at_call(blocks(around)[0], call, lambda: latents.append(pipelines.run(within))):
                latents.append(pipelines.run(around))
        return latents

    wanted = nested(make(outer), make(inner, seed=1))
    pair = make(outer), make(inner, seed=1)
    handles = [patch(each.pipeline) for each in pair]
    assert all(map(same_bits, nested(*pair), wanted))
    assert not any(map(bypassed, handles)) and all(map(hits, handles)) and current() is None


@pytest.mark.parametrize(
    "name, reason",
    [
        ("wan", RuntimeError),
        ("causal_wan", KeyboardInterrupt),
        ("matrixgame2, short", RuntimeError),
        ("hunyuan", KeyboardInterrupt),
        ("hunyuan15", RuntimeError),
        ("matrixgame3", KeyboardInterrupt),
    ],
)
def test_a_generation_that_was_stopped_leaves_later_ones_exact(name, reason, patch):
    tiny = make(name)
    handle = patch(tiny.pipeline)
    for call, seed in ((1, 0), (4, 1)):
        with at_call(blocks(tiny)[-1], call, raising(reason)), pytest.raises(reason):
            pipelines.run(tiny)
        assert agrees(tiny, name, seed)
    assert set().union(*bypassed(handle).values()) <= {HOOKED_BETWEEN}  # sites in the block whose hook raised
    assert hits(handle) > 10 and current() is None
    handle.remove()
    assert agrees(tiny, name)
    assert names(tiny) == names(twin(name))


class StopAt(TorchFunctionMode):
    """Raises at that call of a torch function from here on; counts them all."""

    def __init__(self, number=0):
        super().__init__()
        self.number, self.calls = number, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        if self.calls == self.number:
            raise ZeroDivisionError
        return function(*args, **(kwargs or {}))


transparent_modes.add(StopAt)


@pytest.mark.parametrize("name", ["wan", "matrixgame2, short", "hunyuan15", "matrixgame3"])
def test_a_generation_may_fail_anywhere(name, patch):
    tiny = make(name)
    patch(tiny.pipeline)
    assert agrees(tiny, name)
    with StopAt() as whole:
        assert agrees(tiny, name)
    for part in (0.6, 0.9):  # in some, the stages before take the first half
        with pytest.raises(ZeroDivisionError), StopAt(int(part * whole.calls)):
            pipelines.run(tiny)
        assert _get_current_function_mode() is None and current() is None
        assert agrees(tiny, name)
    assert agrees(tiny, name, 1)


def test_a_step_of_a_stream_that_failed_may_be_repeated(patch):
    name = "matrixgame2, short"

    def failed_and_repeated(tiny):
        # When the last layer fails, the others have written to their caches already.
        with at_call(blocks(tiny)[-1], 7, raising(RuntimeError)), pytest.raises(RuntimeError):
            pipelines.stream(tiny)
        with pipelines._generating():
            latents = tiny.stage.streaming_step().latents
        tiny.stage.streaming_clear()
        return latents

    wanted = failed_and_repeated(make(name))
    assert wanted.isfinite().all() and not same_bits(wanted, streamed(name, 0))
    tiny = make(name)
    handle = patch(tiny.pipeline)
    assert same_bits(failed_and_repeated(tiny), wanted)
    assert same_bits(pipelines.stream(tiny), streamed(name, 0))
    assert not bypassed(handle)


def test_after_an_interrupt_within_a_span_new_tensors_are_new(patch):
    """As in a notebook: Ctrl-C while the model looks for an image, and then other work in the same process."""
    tiny = make("hunyuan15")
    patch(tiny.pipeline)
    interrupt = at_call(tiny.transformer.cond_type_embed, 3, raising(KeyboardInterrupt))
    with interrupt, pytest.raises(KeyboardInterrupt):
        pipelines.run(tiny)
    one, other = torch.zeros(3), torch.zeros(3)
    one += 1
    assert agrees(tiny, "hunyuan15"), "which ends the span, for the tests after this one"
    assert other.tolist() == [0, 0, 0]


def test_after_an_interrupt_within_a_span_a_mode_around_the_generation_is_off_again(patch):
    """As `with torch.device(...)` is one: it would be the default device from then on."""
    tiny = make("hunyuan15")
    patch(tiny.pipeline)
    interrupt = at_call(tiny.transformer.cond_type_embed, 3, raising(KeyboardInterrupt))
    with interrupt, pytest.raises(KeyboardInterrupt), StopAt():
        pipelines.run(tiny)
    left = []
    while _get_current_function_mode() is not None:
        left.append(_pop_mode())
    assert not left
    assert agrees(tiny, "hunyuan15")


@pytest.mark.parametrize("name", ["wan", "matrixgame2, short", "hunyuan15", "matrixgame3"])
def test_a_handle_may_come_and_go_in_the_middle_of_a_generation(name, patch):
    tiny, handles = make(name), []
    before = contents(tiny)
    coming = at_call(tiny.transformer, 2, lambda: handles.append(patch(tiny.pipeline)))
    going = at_call(blocks(tiny)[0], 6, lambda: handles[0].remove())
    with coming, going:
        assert agrees(tiny, name)
    assert hits(handles[0]) and current() is None
    assert agrees(tiny, name, 1)
    assert names(tiny) == names(twin(name))
    assert not any(filter(_is_code, changed(before, tiny)))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handle_may_go_in_a_hook_on_its_own_model(when, patch):
    """Torch calls the hooks that were there when the forward began, those of the handle after the user's."""
    tiny, handles = make("wan"), []
    register = {"before": tiny.transformer.register_forward_pre_hook, "after": tiny.transformer.register_forward_hook}
    calls = []

    def leave(*_):
        calls.append(True)
        if len(calls) == 3:
            handles[0].remove()

    hook = register[when](leave)
    handles.append(patch(tiny.pipeline))
    assert agrees(tiny, "wan")
    hook.remove()
    assert current() is None
    assert agrees(tiny, "wan", 1)
    assert names(tiny) == names(twin("wan"))
