"""What a warm forward asks of a device, unpatched and patched: copies from the host with their bytes, and syncs.

    python tests/transfers.py          # the table in the README

Counted on the simulated accelerator. Copies and syncs are those of a model of real depth and tiny width; bytes those of
a forward at real size without its blocks, in which what crosses to the device are a few numbers each.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from simulated_accelerator import DEVICE, Accelerator, Counts, to_accelerator

import dit_patch
from dit_patch.contribute import verify
from dit_patch.spec import mini
from dit_patch.spec.recipe import Case
from dit_patch.spec.registry import Registry

ACTION_BLOCKS = list(range(15))
HUNYUAN_VIDEO = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "rope_axes_dim": [16, 56, 56],
    "num_layers": 0,
    "num_single_layers": 0,
}


@dataclass(frozen=True)
class Row:
    """A model at its real depth, and (in a bench case of the spec, or here) at its real size with no blocks."""

    name: str
    spec: str
    deep: Mapping[str, Any]
    real: Mapping[str, Any]
    size: Mapping[str, int]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    stage: str | None = None


ROWS = (
    Row(
        "FastVideo Wan 1.3B, 480p",
        "fastvideo/wan",
        {"num_layers": 30},
        {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 0},
        {"f": 21, "h": 60, "w": 104, "tokens": 32760},
    ),
    Row(
        "FastVideo causal Wan 1.3B, 480p",
        "fastvideo/causal_wan",
        {"num_layers": 30},
        {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 0},
        {"blocks": 1, "f": 3, "h": 60, "w": 104},
        stage="fastvideo.pipelines.stages.causal_denoising:CausalDMDDenosingStage",
    ),
    Row(
        "FastVideo HunyuanVideo, 720p",
        "fastvideo/hunyuan_video",
        {"num_layers": 20, "num_single_layers": 40},
        HUNYUAN_VIDEO,
        {"f": 33, "h": 90, "w": 160},
    ),
    Row(
        "FastVideo HunyuanVideo 1.5, 480p",
        "fastvideo/hunyuan_video15",
        {"num_layers": 54},
        {"num_attention_heads": 16, "attention_head_dim": 128, "rope_axes_dim": [16, 56, 56], "num_layers": 0},
        {"f": 31, "h": 30, "w": 52},
    ),
    Row(
        "FastVideo Matrix-Game 2, causal",
        "fastvideo/matrixgame2",
        {"num_layers": 30},
        {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 0},
        {"blocks": 1, "f": 3, "h": 44, "w": 80, "per_call": 3},
        stage="fastvideo.pipelines.stages.matrixgame2_denoising:MatrixGame2CausalDenoisingStage",
    ),
    Row(
        "FastVideo Matrix-Game 3",
        "fastvideo/matrixgame3",
        {"num_layers": 30},
        {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 0},
        {"h": 44, "w": 80, "tokens": 2640, "memory": 1760},
    ),
    Row(
        "diffusers Wan 1.3B, 480p",
        "diffusers/wan",
        {"num_layers": 30},
        {"num_attention_heads": 12, "attention_head_dim": 128, "rope_max_seq_len": 1024, "num_layers": 0},
        {"f": 21, "h": 60, "w": 104, "tokens": 32760},
    ),
    Row(
        "diffusers HunyuanVideo, 720p",
        "diffusers/hunyuan_video",
        {"num_layers": 20, "num_single_layers": 40},
        HUNYUAN_VIDEO,
        {"f": 33, "h": 90, "w": 160},
    ),
)


def deep(row: Row) -> tuple[Counts, Counts]:
    """Of the model at real depth: what a warm forward asks for unpatched, and patched."""
    spec = Registry(plugins=False).get(row.spec)
    case = spec.mini.case()
    config = {**case.config, **row.deep}
    if "action_config" in config:
        config["action_config"] = {**config["action_config"], "blocks": ACTION_BLOCKS}
    return _both(row, case.model_copy(update={"config": config}), case.sizes[0] | {"blocks": 1})


def real(row: Row) -> tuple[Counts, Counts]:
    """Of the model at real size, without its blocks."""
    spec = Registry(plugins=False).get(row.spec)
    case = spec.mini.case()
    # Without blocks there is nothing that a span could end at; tables are all that is large.
    kinds = ("rope", "timestep")
    return _both(row, case.model_copy(update={"config": {**case.config, **row.real}}), row.size, only=kinds)


def _both(row: Row, case: Case, size: Mapping[str, int], only: Any = None) -> tuple[Counts, Counts]:
    spec = Registry(plugins=False).get(row.spec)
    with Accelerator() as accelerator, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dit_patch: .* was not reached")  # in no blocks, say
        found = []
        for patched in (False, True):
            model = to_accelerator(mini.build(spec, case))
            pipeline = types.SimpleNamespace(modules={"transformer": model}, stages=_stages(row, model))
            with dit_patch.apply(pipeline, only=only, max_bytes=4 << 30) if patched else contextlib.nullcontext():
                # The third call is the first that takes every result as it was kept.
                forwards = list(mini.forwards(case, size, steps=3, passes=("cond",), device=DEVICE))
                if row.stage and case.config["num_layers"]:
                    _give_caches_of(pipeline.stages[0], forwards, size)
                left = len(forwards)

                def last(model=model, **arguments: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if not left:
                        accelerator.take()
                    return model(**arguments)

                verify.run(last, forwards)
                found.append(accelerator.take())
    return found[0], found[1]


def _stages(row: Row, model: torch.nn.Module) -> list[Any]:
    if row.stage is None or not len(model.blocks):
        return []
    module, _, name = row.stage.partition(":")
    return [vars(__import__(module, fromlist=[name]))[name](model, None)]


def _give_caches_of(stage: Any, forwards: list[dict[str, Any]], size: Mapping[str, int]) -> None:
    """The KV caches that the stage makes, in place of those of the rollout: one set for each pass."""
    stage.frame_seq_length = size["h"] * size["w"] // 4
    made: dict[int, dict[str, Any]] = {}
    for arguments in forwards:
        caches = made.get(id(arguments["kv_cache"]))
        if caches is None:
            new = stage._initialize_kv_cache(batch_size=1, dtype=torch.float32, device=torch.device(DEVICE))
            caches = made[id(arguments["kv_cache"])] = {"kv_cache": mini.KVCaches(new)}
            if hasattr(stage, "_initialize_action_kv_cache"):
                mouse, keys = stage._initialize_action_kv_cache(
                    batch_size=1, dtype=torch.float32, device=torch.device(DEVICE)
                )
                caches |= {"kv_cache_mouse": mini.KVCaches(mouse), "kv_cache_keyboard": mini.KVCaches(keys)}
            made[id(caches["kv_cache"])] = caches
        arguments.update(caches)


def main() -> None:
    print("| per warm forward | copies to the device | bytes | syncs |\n|---|---|---|---|")
    for row in ROWS:
        plain, patched = deep(row)
        large, small = real(row)
        sizes = [sum(copy.nbytes for copy in counts.uploads) for counts in (large, small)]
        print(
            f"| {row.name} | {len(plain.uploads)} -> {len(patched.uploads)} "
            f"| {_amount(sizes[0])} -> {_amount(sizes[1])} | {len(plain.syncs)} -> {len(patched.syncs)} |",
            flush=True,
        )


def _amount(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes} B"


if __name__ == "__main__":
    main()
