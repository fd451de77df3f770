"""Hosts for models that there are no specs for: what they need before they can be built and called on a CPU."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dit_patch.hosts import fastvideo
from dit_patch.spec.mini import KVCaches, noise, seed_of

RUNS_UNDER_AUTOCAST = True
LINGBOT = "fastvideo.models.dits.lingbotworld2.causal_fast"
WAN = "wan.modules.model"


def prepare() -> None:
    """Have attention run where there is no FlashAttention; of Wan's package, import the model alone."""
    if find_spec("fastvideo") is not None:
        fastvideo.prepare()
        module = import_module(LINGBOT)
        module.attention = module.flash_attention = _attention
    if has_wan():
        _import_wan().flash_attention = _attention


def has_wan() -> bool:
    """Return whether Wan 2.2's own package is installed."""
    return WAN in sys.modules or find_spec("wan") is not None


def build(cls: type[torch.nn.Module], config: Mapping[str, Any]) -> torch.nn.Module:
    """Build the model with random weights, none of them zero as the constructors leave them."""
    if cls.__module__ == LINGBOT:
        return fastvideo.build(cls, config)
    model = cls(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05)
    return model


def defaults(cls: type[torch.nn.Module]) -> dict[str, Any]:
    """Return the defaults of the configuration; of Wan's, those of its 14B model."""
    if cls.__module__ == LINGBOT:
        return fastvideo.defaults(cls)
    return {"dim": 5120, "ffn_dim": 13824, "freq_dim": 256, "text_dim": 4096, "text_len": 512, "num_heads": 40} | {
        "num_layers": 40,
        "in_dim": 16,
        "out_dim": 16,
    }


def lingbotworld2(config: Mapping[str, Any], size: Mapping[str, int], **options: Any) -> Iterator[dict[str, Any]]:
    """Yield what `LingBotWorld2CausalFastPipeline` calls its model with: chunk after chunk, five forwards each."""
    f, h, w = size["f"], size["h"], size["w"]
    frame, layers, heads = h * w // 4, config["num_layers"], config["num_heads"]
    width, kv = config["dim"] // heads, config["local_attn_size"] * frame

    def caches(new: Any, length: int, *, cross: bool = False) -> KVCaches:
        made = fastvideo._caches(layers, new, 1, length, heads, width, cross=cross)
        return KVCaches({**each, "is_init": new.index()} for each in made) if cross else made

    def state(new: Any) -> dict[str, Any]:
        return {
            "context": [new(min(512, config["text_len"]), config["text_dim"])],
            "kv_cache": caches(new, kv),
            "crossattn_cache": caches(new, config["text_len"], cross=True),
            "cameras": [new(1, 384, f, h, w) for _ in range(size["blocks"])],
            "conditions": [new(20, f, h, w) for _ in range(size["blocks"])],
            "called": [],
        }

    made: dict[tuple, dict[str, Any]] = {}
    for call in fastvideo._rollout(size["blocks"], state, **{**options, "steps": options["steps"]}):
        own = dict(call.state)
        cameras, conditions, called = own.pop("cameras"), own.pop("conditions"), own.pop("called")
        chunk = made.setdefault(
            (id(cameras), call.block),
            {
                "y": [conditions[call.block]],
                "dit_cond_dict": {"c2ws_plucker_emb": cameras[call.block].chunk(1, dim=0)},
                "kept": own,
            },
        )
        yield {
            **own,
            "x": [call.step.new(16, f, h, w)],
            "t": call.step.time(1).float(),
            "seq_len": f * frame,
            "y": chunk["y"],
            "dit_cond_dict": chunk["dit_cond_dict"],
            "current_start": call.block * f * frame,
            "max_attention_size": kv,
            "frame_seqlen": frame,
            "cross_attn_first_call": not called,
        }
        called.append(True)


def wan22(
    config: Mapping[str, Any],
    size: Mapping[str, int],
    *,
    steps: int,
    passes: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    generation: int,
) -> Iterator[dict[str, Any]]:
    """Yield what Wan's `text2video` calls its model with."""
    f, h, w = size["f"], size["h"], size["w"]

    def new(*shape: int, name: tuple) -> torch.Tensor:
        return noise(shape, seed_of(*name)).to(device=device, dtype=dtype)

    prompts = {
        each: new(min(512, config["text_len"]), config["text_dim"], name=("prompt", generation, each))
        for each in passes
    }
    for step in range(steps):
        latents = new(config["in_dim"], f, h, w, name=("latents", generation, step))
        time = torch.full((1,), 999.0 - 137 * step, device=device)
        for each in passes:
            yield {"x": [latents], "t": time, "context": [prompts[each]], "seq_len": f * h * w // 4}


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_lens: Any = None, k_lens: Any = None, *args: Any, **kwargs: Any
) -> torch.Tensor:
    dtype = q.dtype
    q, k, v = (each.transpose(1, 2).to(v.dtype) for each in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().to(dtype)


def _import_wan() -> types.ModuleType:
    """Import the model without its package's pipelines, which import what is not needed for it."""
    if WAN not in sys.modules:
        folder = Path(find_spec("wan").origin).parent  # found without running it
        for name, path in (("wan", folder), ("wan.modules", folder / "modules")):
            module = sys.modules[name] = types.ModuleType(name)
            module.__path__ = [str(path)]
        # A default argument of the model asks for the current CUDA device when it is imported.
        current, torch.cuda.current_device = torch.cuda.current_device, lambda: "cpu"
        try:
            import_module(WAN)
        finally:
            torch.cuda.current_device = current
    return sys.modules[WAN]
