"""What the tests of step caching share: small real pipelines that generate latents, and cache-dit driven by itself."""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import dit_patch
from dit_patch.bench.step_cache.harness import enable_cache_dit
from dit_patch.pipelines import tiny_pipelines
from dit_patch.spec import mini
from dit_patch.step_cache import requirements

EAGER = {"fn": 1, "warmup": 2, "threshold": 0.5, "min_steps": 0}
"""Caches a good part of what an untrained model does."""
ALWAYS = EAGER | {"threshold": 1.0}
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 6}
COUNTS = re.compile(r"^(num|n)_(\w+_)?(layers|blocks)$")  # of blocks, whatever the model calls them
SMALL_HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "rope_axes_dim": (4, 10, 10),
    "num_layers": 3,
    "num_single_layers": 4,
}


def wan(seed: int = 0, **config: Any):
    return quiet(tiny_pipelines.wan_pipeline(seed, **(SMALL | config)))


def wan22(seed: int = 0, **config: Any):
    return quiet(tiny_pipelines.wan22_pipeline(seed, **(SMALL | config)))


def hunyuan(seed: int = 0, **config: Any):
    return quiet(tiny_pipelines.hunyuan_video_pipeline(seed, **(SMALL_HUNYUAN | config)))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline, steps: int = 10, seed: int = 0, prompt: str = "a cat and a dog", size=(32, 32, 5), **call: Any):
    """A generation, as latents: with a random VAE pixels say nothing."""
    height, width, frames = size
    call = {"guidance_scale": 6.0, "max_sequence_length": 16} | call
    return pipeline(
        prompt,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **call,
    ).frames


def falling(calls: list[dict], passes: int = 2) -> list[dict]:
    """The forwards of a mini with timesteps that fall all the way, and are one tensor for the passes of a step."""
    for number, arguments in enumerate(calls):
        step = number // passes
        time = torch.full_like(arguments["timestep"], 999 - 90 * step)
        arguments["timestep"] = time if number % passes == 0 else calls[number - 1]["timestep"]
    return calls


def deep(spec, blocks: int = 4, variant: str | None = None):
    """The spec's mini with that many blocks in each list."""
    case = spec.mini.case(variant)
    config = dict(case.config)
    config |= {name: blocks for name, value in config.items() if COUNTS.search(name) and type(value) is int and value}
    if "vace_layers" in config:
        config["vace_layers"] = [0, blocks - 2]
    return case.model_copy(update={"config": config})


def steps(spec, case, count: int = 7, generation: int = 0, **options: Any) -> list[dict]:
    """The forwards of a generation of a bare model."""
    return falling(list(mini.forwards(case, case.sizes[0], steps=count, generation=generation, **options)))


def cached(handle) -> dict[str, tuple[int, ...]]:
    return {f"{row.model} {row.blocks} {row.label}": row.cached for row in handle.step_stats()}


def cache_dit_alone(model, spec, *, fn: int, bn: int, threshold: float, warmup: int, calibrator=None, cfg: bool = True):
    """cache-dit's own switch on a model."""
    if type(model).__name__ == "ChromaTransformer2DModel":
        # Its forward cuts up the modulations by the number of blocks.
        from cache_dit.caching.patch_functors.functor_chroma import ChromaPatchFunctor

        ChromaPatchFunctor()._apply(model)
    decisions = [
        requirements.cache_dit().DBCacheConfig(
            Fn_compute_blocks=fn, Bn_compute_blocks=bn, residual_diff_threshold=threshold, max_warmup_steps=warmup
        )
        for _ in spec.blocks
    ]
    enable_cache_dit(model, spec, decisions, calibrator, cfg=cfg)
    contexts = [model._context_manager.get_context(name) for name in model._context_names]
    return lambda: [each for context in contexts for each in (context.cached_steps, context.cfg_cached_steps)]


def hints_inside(model):
    """cache-dit's copy of VACE's forward, which takes the hints into the blocks."""
    from cache_dit.caching.patch_functors.functor_wan_vace import WanVACEPatchFunctor

    WanVACEPatchFunctor()._apply(model)


class _FacesInside(torch.nn.Module):
    def __init__(self, block: torch.nn.Module, adapter: torch.nn.Module, faces: list[torch.Tensor]) -> None:
        super().__init__()
        self.block, self.adapter, self.faces = block, adapter, faces

    def forward(self, hidden_states, *args):
        hidden_states = self.block(hidden_states, *args)
        return self.adapter(hidden_states, self.faces[-1]) + hidden_states


def faces_inside(model):
    """WanAnimate's face adapters in the blocks that they come after, but for the last."""
    faces: list[torch.Tensor] = []

    def encoded(module, args, output):
        faces[:] = [torch.cat([torch.zeros_like(output[:, :1]), output], dim=1)]

    model.face_encoder.register_forward_hook(encoded)
    *pairs, (last, adapter) = zip(model.blocks, model.face_adapter)
    model.blocks = torch.nn.ModuleList([*(_FacesInside(*pair, faces) for pair in pairs), last])
    model.face_adapter = torch.nn.ModuleList([adapter])


class _AudioHandedOn(torch.nn.Module):
    def __init__(self, block: torch.nn.Module, before: _AudioHandedOn | None) -> None:
        super().__init__()
        self.block, self.audio = block, []
        self.given = before.audio if before else None

    def forward(self, hidden_states, audio_hidden_states, **kwargs):
        audio = audio_hidden_states if self.given is None else self.given[-1]
        hidden_states, audio = self.block(hidden_states, audio, **kwargs)
        self.audio[:] = [audio]
        return hidden_states, audio


def audio_handed_on(model):
    """LTX-2's blocks, each with the audio of the one before: cache-dit gives all of them what the first one got."""
    blocks: list[_AudioHandedOn] = []
    for block in model.transformer_blocks:
        blocks.append(_AudioHandedOn(block, blocks[-1] if blocks else None))
    model.transformer_blocks = torch.nn.ModuleList(blocks)


FOR_CACHE_DIT = {
    "diffusers/wan_vace": hints_inside,
    "diffusers/wan_animate": faces_inside,
    "diffusers/ltx2": audio_handed_on,
}
"""What cache-dit needs of a model whose loop does more than hand hidden states from block to block; not for the blocks
after the middle, which cache-dit calls in its own way."""


def euler(pipeline):
    """The same pipeline with another scheduler, swapped in."""
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipeline


def once(pipeline, config, **call):
    """A generation of a pipeline that was never used before, with its step cache."""
    with dit_patch.apply(pipeline, step_cache=config):
        return latents(pipeline, **call)
