"""What diffusers itself does to a model's calls: caches, context parallelism, fused projections, attention backends."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import HookRegistry, ModelHook

from dit_patch.contribute import verify
from dit_patch.sites.layers import Wrapped


def generate(model, calls) -> list[list[torch.Tensor]]:
    """Each pass in its `cache_context`, as pipelines call it."""
    outputs = []
    for number, call in enumerate(calls):
        with model.cache_context("cond" if number % 2 == 0 else "uncond"):
            outputs += verify.run(model, [call])
    return outputs


def first_block_cache(model):
    model.enable_cache(FirstBlockCacheConfig(threshold=10.0))


def pyramid_attention_broadcast(model):
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=("blocks", "transformer_blocks", "single_transformer_blocks"),
            current_timestep_callback=lambda: 500,
        )
    )


class TestItsCaches:
    @pytest.mark.parametrize("cache", [first_block_cache, pyramid_attention_broadcast])
    @pytest.mark.parametrize("first", ["apply", "cache"])
    def test_they_skip_the_same_and_what_is_left_hits(self, each, cache, first):
        calls = each.calls(steps=4)
        exact = generate(each.plain, calls)
        if first == "apply":
            each.apply()
        for model in each.both:
            cache(model)
        if first == "cache":
            each.apply()
        theirs = generate(each.plain, calls)
        assert verify.first_difference(exact, theirs) is not None, "the cache is at work"
        assert verify.first_difference(generate(each.model, calls), theirs) is None
        assert each.hits()["rope.forward"] == len(calls) - 1
        for model in each.both:
            model.disable_cache()
        assert verify.first_difference(generate(each.model, calls), exact) is None
        assert each.hits()["rope.forward"] == 2 * len(calls) - 1
        each.handle.remove()
        assert verify.first_difference(generate(each.model, calls), exact) is None


class Shard(ModelHook):
    """One rank's half of some outputs or inputs, as diffusers' ContextParallelSplitHook gives it."""

    def __init__(self, rank: int, *, dim: int, output: bool) -> None:
        super().__init__()
        self.rank, self.dim, self.output = rank, dim, output

    def half(self, tensor):
        return tensor.chunk(2, self.dim)[self.rank]

    def pre_forward(self, module, *args, **kwargs):
        return (args, kwargs) if self.output else ((self.half(args[0]), *args[1:]), kwargs)

    def post_forward(self, module, output):
        return tuple(map(self.half, output)) if self.output else output


class Gather(ModelHook):
    def post_forward(self, module, output):
        return torch.cat([output, output], 1)


def shard(model, rank):
    """Splits the rope's tables and the first block's tokens, and joins what the last layer gives."""
    hooks = {
        "rope": Shard(rank, dim=1, output=True),
        "blocks.0": Shard(rank, dim=1, output=False),
        "proj_out": Gather(),
    }
    for path, hook in hooks.items():
        HookRegistry.check_if_exists_or_initialize(model.get_submodule(path)).register_hook(hook, "parallel")


def unshard(model):
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("parallel", recurse=True)


class TestContextParallelism:
    @pytest.mark.parametrize("first", ["apply", "shard"])
    def test_the_whole_table_is_cached_and_each_rank_takes_its_part(self, wan, first):
        calls = wan.calls()
        whole = verify.run(wan.plain, calls)
        if first == "apply":
            wan.apply()
            wan.agree(calls)
        for rank in (0, 1):
            for model in wan.both:
                shard(model, rank)
            if wan.handle is None:
                wan.apply()
            wan.agree(calls)
            assert wan.agree(calls)["rope.forward"] == len(calls), "another rank hits the same table"
            assert verify.first_difference(verify.run(wan.model, calls), whole) == 0, "the halves are not the whole"
            for model in wan.both:
                unshard(model)
        wan.agree(calls)
        assert wan.agree(calls)["rope.forward"] == len(calls)
        assert verify.first_difference(verify.run(wan.model, calls), whole) is None

    @pytest.mark.parametrize("last", ["remove", "unshard"])
    @pytest.mark.parametrize("first", ["apply", "shard"])
    def test_everything_goes_in_whatever_order(self, wan, first, last):
        calls = wan.calls()
        if first == "apply":
            wan.apply()
        for model in wan.both:
            shard(model, 1)
        if first == "shard":
            wan.apply()
        if last == "unshard":
            wan.handle.remove()
            assert wan.agree(calls) == {}
        for model in wan.both:
            unshard(model)
        if last == "remove":
            assert wan.agree(calls)["rope.forward"]
            wan.handle.remove()
        assert wan.agree(calls) == {}
        for ours, theirs in zip(wan.model.modules(), wan.plain.modules()):
            assert set(vars(ours)) <= set(vars(theirs))
            assert not any(type(value) is Wrapped for value in vars(ours).values())

    def test_two_hooks_of_which_the_lower_goes_first(self, wan):
        calls = wan.calls()

        class Double(ModelHook):
            def post_forward(self, module, output):
                return tuple(2 * table for table in output)

        for model in wan.both:
            registry = HookRegistry.check_if_exists_or_initialize(model.rope)
            registry.register_hook(Double(), "one")
            registry.register_hook(Double(), "two")
        wan.apply()
        wan.agree(calls)
        for name in ("one", "two"):
            for model in wan.both:
                model.rope._diffusers_hook.remove_hook(name)
            wan.agree(calls)
            assert wan.agree(calls)["rope.forward"] == len(calls)
        wan.handle.remove()
        assert wan.agree(calls) == {}


class TestAttention:
    def test_another_backend_is_the_others_business(self, each):
        calls = each.calls()
        each.apply()
        each.agree(calls)
        for model in each.both:
            model.set_attention_backend("_native_math")
        assert each.agree(calls)["rope.forward"] == len(calls)
        for model in each.both:
            model.reset_attention_backend()
        assert each.agree(calls)["rope.forward"] == len(calls)

    def test_processors_are_the_models_own(self, each):
        before = {name: type(processor) for name, processor in each.model.attn_processors.items()}
        each.apply()
        assert {name: type(processor) for name, processor in each.model.attn_processors.items()} == before

    def test_fused_projections_there_and_back(self, wan):
        calls = wan.calls()
        wan.apply()
        wan.agree(calls)
        for step in ("fuse_qkv_projections", "unfuse_qkv_projections"):
            for model in wan.both:
                getattr(model, step)()
            assert wan.agree(calls)["rope.forward"] == len(calls)
