"""What a warm forward asks of a device, unpatched and patched: copies from the host with their bytes, and syncs.

    python tests/transfers.py          # the table in the README

Counted on the simulated accelerator. Copies and syncs are those of a model of real depth and tiny width; bytes those of
a forward at real size without its blocks, in which what crosses to the device are a few numbers each.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dit_patch
from dit_patch.contribute import verify
from dit_patch.contribute.audit.accelerator import DEVICE, Accelerator, Counts, to_accelerator
from dit_patch.hosts.fastvideo import give_stage_caches
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
            pipeline = mini.pipeline(spec, model) if case.config.get("num_layers") else None
            subject = pipeline or model
            with dit_patch.apply(subject, only=only, max_bytes=4 << 30) if patched else contextlib.nullcontext():
                # The third call is the first that takes every result as it was kept.
                forwards = list(mini.forwards(case, size, steps=3, passes=("cond",), device=DEVICE))
                if pipeline is not None:
                    give_stage_caches(pipeline, forwards, size)
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
