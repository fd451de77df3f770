"""Step caching in other pipelines of diffusers: VACE, SkyReels V2, diffusion forcing of a long video, a guider's names.

Each generation is a fresh pipeline's, and with nothing cached nothing is changed.
"""

import pytest
import torch

pytest.importorskip("cache_dit", reason="needs cache-dit")

import diffusers
import stepping
from conftest import skip_unless_installed

import dit_patch
from dit_patch.spec import mini
from dit_patch.spec.registry import Registry

pytestmark = pytest.mark.filterwarnings("ignore:dit_patch. step cache of")


def wan_parts():
    parts = stepping.wan().components
    return {name: parts[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}


def vace():
    torch.manual_seed(0)
    transformer = diffusers.WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, ffn_dim=64, num_layers=5, freq_dim=64, text_dim=64,
        vace_layers=[0, 2], vace_in_channels=96,
    )  # fmt: skip
    return stepping.quiet(diffusers.WanVACEPipeline(transformer=transformer.eval(), **wan_parts()))


def skyreels(cls):
    torch.manual_seed(0)
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, ffn_dim=64, num_layers=4, freq_dim=64, text_dim=64,
        inject_sample_info=False,
    )  # fmt: skip
    return stepping.quiet(cls(transformer=transformer.eval(), **wan_parts()))


def call(pipeline, steps, seed=0, **options):
    torch.manual_seed(seed)  # the noise on the history of a long video is drawn from the global generator
    return pipeline(
        "a cat and a dog",
        height=32,
        width=32,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        max_sequence_length=16,
        **options,
    ).frames


CASES = {
    "vace": (vace, {"num_frames": 5}),
    "skyreels": (lambda: skyreels(diffusers.SkyReelsV2Pipeline), {"num_frames": 9}),
    "diffusion forcing": (lambda: skyreels(diffusers.SkyReelsV2DiffusionForcingPipeline), {"num_frames": 9}),
    "diffusion forcing, asynchronous": (
        lambda: skyreels(diffusers.SkyReelsV2DiffusionForcingPipeline),
        {"num_frames": 9, "ar_step": 2, "causal_block_size": 1},
    ),
    "diffusion forcing, long": (  # two loops of one call
        lambda: skyreels(diffusers.SkyReelsV2DiffusionForcingPipeline),
        {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5, "addnoise_condition": 20},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_generation_is_a_fresh_pipelines(name):
    make, options = CASES[name]
    pipeline, other = make(), make()
    skip_unless_installed(Registry(plugins=False).find(type(pipeline.transformer)))
    plain = call(pipeline, 7, **options)
    with dit_patch.apply(pipeline, step_cache={**stepping.EAGER, "threshold": 0}):
        assert torch.equal(call(pipeline, 7, **options), plain)
    with dit_patch.apply(pipeline, step_cache=stepping.ALWAYS) as handle:
        for steps, seed in ((7, 0), (5, 1), (7, 0)):
            made = call(pipeline, steps, seed, **options)
            rows = handle.step_stats()
            assert {row.label for row in rows} == {"cond", "uncond"} and all(row.cached for row in rows)
            assert all(row.cached[0] == 2 for row in rows)  # each loop has its own warm-up
            with dit_patch.apply(other, step_cache=stepping.ALWAYS):
                assert torch.equal(made, call(other, steps, seed, **options))
    assert torch.equal(call(pipeline, 7, **options), plain)


def test_passes_that_a_guider_names():
    """HunyuanVideo 1.5's guider calls them pred_cond and pred_uncond; here around a bare model."""
    spec = Registry(plugins=False).get("diffusers/hunyuan_video15")
    skip_unless_installed(spec)
    case = stepping.deep(spec, 4)
    model = mini.build(spec, case)
    calls = stepping.steps(spec, case)
    with dit_patch.apply(model, step_cache=stepping.ALWAYS) as handle, torch.no_grad():
        for number, arguments in enumerate(calls):
            with model.cache_context(("pred_cond", "pred_uncond")[number % 2]):
                model(**arguments)
        rows = handle.step_stats()
        assert {row.label for row in rows} == {"pred_cond", "pred_uncond"}
        assert all(row.steps == 7 and row.cached == (2, 3, 4, 5, 6) for row in rows)
