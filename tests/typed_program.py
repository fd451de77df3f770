"""A program of a user's, for a type checker alone: `.ci/run` has pyright look at it in basic mode. It is not run."""

import argparse
import json
from typing import Any

import torch

import dit_patch
from dit_patch.findings import DitPatchWarning
from dit_patch.rotary import rotary, rotary_qk_


def patch(pipeline: Any) -> None:
    handle = dit_patch.apply(pipeline, only=("rope", "mask"), max_bytes=1 << 20, check="always")
    print(handle, handle.explain(), handle.nbytes, handle.models)
    handle.begin_generation()
    handle.begin_generation(steps=30)
    handle.clear()
    rows = [row.as_dict() for row in handle.stats()]
    print(json.dumps(rows), sum(row.hits for row in handle.stats()))
    handle.repair()
    handle.remove()
    with dit_patch.apply(pipeline, specs=["specs"], strict=False, trust=True, fixes=True) as other:
        print(other.stats()[0].notes)
    found = dit_patch.handle_of(pipeline)
    if found is not None:
        found.remove()
    was: bool = dit_patch.remove(pipeline)
    print(was, dit_patch.__version__)


def step_cached(pipeline: Any) -> None:
    cache = dit_patch.StepCache(fn=1, warmup=4, calibrator="taylorseer")
    cache.save("mine.yaml")
    made = dit_patch.StepCache.load("mine.yaml")
    best = dit_patch.StepCache.calibrate(pipeline, ["a cat"], "1.5x", height=480)
    print(best.calibration, made.threshold + 0.1)
    for asked in ("balanced", "mine.yaml", cache, {"preset": "quality", "bn": 1}, None):
        handle = dit_patch.apply(pipeline, step_cache=asked)
        print([step + 1 for row in handle.step_stats() for step in row.cached])


def from_the_command_line(pipeline: Any) -> None:
    parser = argparse.ArgumentParser()
    dit_patch.add_arguments(parser)
    handle = dit_patch.from_args(pipeline, parser.parse_args())
    if handle is not None:
        print(handle.max_bytes)


def caught(model: torch.nn.Module, warning: DitPatchWarning) -> str:
    try:
        dit_patch.apply(model)
    except (dit_patch.UnsupportedModelError, dit_patch.SiteError, dit_patch.VersionError) as error:
        return str(error)
    except dit_patch.DitPatchError as error:
        return f"{error}: {warning.finding.kind.name}"
    return ""


def rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotary_qk_(q, k, cos, sin, pairs="half")
    return rotary(q, cos, sin, arithmetic="rounded") + k
