"""diffusers' models on two ranks, with and without dit_patch: sharded, context-parallel, and each on its own.

    torchrun --standalone --nproc-per-node 2 tests/distributed.py FOLDER

leaves `0.json` and `1.json` in FOLDER. Without torchrun, one process does what needs no other rank and leaves
`alone.json`. test_distributed.py says what it should be.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard

import dit_patch
from dit_patch.contribute import verify
from dit_patch.errors import VersionError
from dit_patch.handle import check_versions
from dit_patch.spec import mini
from dit_patch.spec.model import Spec
from dit_patch.spec.registry import Registry

RANKS = 2
LIMIT = 240  # seconds
STEPS = 2
CACHED_STEPS = (6, 7)  # of each rank's own generation, where they have nothing to do with each other
STEP_CACHE = {"fn": 1, "warmup": 2, "threshold": 0.485, "min_steps": 0}
"""Of ranks that decide alone, one would skip a step that the other would not."""
SHARDED = ("wan", "hunyuan_video", "hunyuan_video15", "flux", "qwen_image")
ORDERS = ("before", "after")
# diffusers splits the sequences of text and image alike, so that both must be even; its masks it does not split.
CONTEXT = {"wan": {}, "flux": {"text": 8}, "qwen_image": {"text": 8}}


def specs(names: Any) -> dict[str, Spec]:
    """Those that this version of diffusers has the models of."""
    known = {spec.name: spec for spec in Registry(plugins=False)}
    found = {}
    for name in names:
        try:
            check_versions(known[f"diffusers/{name}"], strict=True)
            mini.model_class(known[f"diffusers/{name}"])
        except (ImportError, KeyError, VersionError):
            continue
        found[name] = known[f"diffusers/{name}"]
    return found


def context_parallel(names: Any) -> dict[str, Spec]:
    """Those whose models diffusers can split; none in versions without context parallelism."""
    import diffusers

    if not hasattr(diffusers, "ContextParallelConfig"):
        return {}
    return {name: spec for name, spec in specs(names).items() if getattr(mini.model_class(spec), "_cp_plan", None)}


def shard(model: torch.nn.Module, spec: Spec) -> None:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (RANKS,))
    for blocks in spec.blocks:
        for block in model.get_submodule(blocks.at):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def split(model: torch.nn.Module, spec: Spec, **degrees: int) -> None:
    from diffusers import ContextParallelConfig

    # diffusers counts accelerators to find this rank's own, and divides by their number.
    with mock.patch.object(torch.accelerator, "device_count", lambda: 1):
        model.enable_parallelism(config=ContextParallelConfig(**(degrees or {"ulysses_degree": RANKS})))


def generation(spec: Spec, *, steps: int = STEPS, number: int = 0, **names: int) -> list[dict[str, Any]]:
    case = spec.mini.case(None)
    forwards = mini.forwards(case, {**case.sizes[0], **names}, steps=steps, generation=number)
    return [{**arguments, "return_dict": False} for arguments in forwards]


def outcome(model: torch.nn.Module, forwards: list[dict[str, Any]]) -> list[Any]:
    """Digests of each forward's output, or the one exception."""
    try:
        outputs = verify.run(model, forwards)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return [[digest(tensor) for tensor in output] for output in outputs]


def digest(tensor: torch.Tensor) -> str:
    """Equal for equal shape, dtype and bits."""
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(repr((tensor.shape, tensor.dtype)).encode() + content).hexdigest()[:12]


def counts(handle: Any) -> dict[str, Any]:
    """Of each site: its kind, hits, misses, and why calls were bypassed."""
    return {row.at: (row.kind, row.hits, row.misses, dict(row.bypassed)) for row in handle.stats()}


@contextmanager
def tokens(model: torch.nn.Module, spec: Spec) -> Iterator[list[int]]:
    """How long the sequences are that the last of the first blocks gets."""
    found: list[int] = []

    def note(module, args, kwargs):
        found.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    hook = model.get_submodule(spec.blocks[0].at)[-1].register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def beside(spec: Spec, parallelise: Callable, order: str, rank: int, **names: int) -> dict[str, Any]:
    """Patched `order` the model is parallelised: what comes out of it, beside what comes out of it unpatched."""
    forwards = generation(spec, **names)
    plain, model = (mini.build(spec, spec.mini.case(None)) for _ in range(2))
    with tokens(plain, spec) as whole:
        outcome(plain, forwards[:1])
    parallelise(plain, spec)
    with tokens(plain, spec) as own:
        record: dict[str, Any] = {"plain": outcome(plain, forwards)}
    record["tokens"] = (whole[0], own[0] if own else None)
    if order == "before":
        handle = dit_patch.apply(model)
        parallelise(model, spec)
    else:
        parallelise(model, spec)
        handle = dit_patch.apply(model)
    record["sharded"] = sum(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    record["patched"] = outcome(model, forwards)
    record["counts"] = counts(handle)
    if rank == 0:
        handle.clear()
    record["after one rank's clear"] = outcome(model, forwards)
    record["counts after one rank's clear"] = counts(handle)
    for each in (plain, model):
        change(each)
    record["plain with other weights"] = outcome(plain, forwards)
    record["patched with other weights"] = outcome(model, forwards)
    handle.remove()
    record["removed"] = outcome(model, forwards)
    return record


def change(model: torch.nn.Module) -> None:
    """New weights in place, as an optimizer or a swap of averaged weights leaves them."""
    if hasattr(model, "reshard"):
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.25)


def stepped(spec: Spec, parallelise: Callable | None, *, number: int, steps: int = CACHED_STEPS[0]) -> dict[str, Any]:
    """A generation with a step cache: what came out, which steps were skipped, and the differences they were for."""
    model = mini.build(spec, spec.mini.case(None))
    if parallelise is not None:
        parallelise(model, spec)
    with dit_patch.apply(model, step_cache=STEP_CACHE) as handle:
        made = outcome(model, generation(spec, steps=steps, number=number))
        rows = handle.step_stats()
    return {
        "made": made,
        "cached": {row.label: row.cached for row in rows},
        "diffs": {row.label: row.diffs for row in rows},
    }


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # ranks that wait for each other would wait for half an hour
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="dit_patch")
    rank = int(os.environ.get("RANK", -1))
    wan = specs(["wan"]).get("wan")
    stepping = wan is not None and find_spec("cache_dit") is not None
    report: dict[str, Any] = {}
    if rank < 0:
        if stepping:
            report["step cache"] = [
                stepped(wan, None, number=number, steps=steps) for number, steps in enumerate(CACHED_STEPS)
            ]
            report["step cache, as long"] = [stepped(wan, None, number=number) for number in range(RANKS)]
        (folder / "alone.json").write_text(json.dumps(report), encoding="utf-8")
        return
    torch.distributed.init_process_group("gloo")
    for name, spec in specs(SHARDED).items():
        for order in ORDERS:
            report[f"sharded {name} {order}"] = beside(spec, shard, order, rank)
    for name, spec in context_parallel(CONTEXT).items():
        for order in ORDERS:
            report[f"context {name} {order}"] = beside(spec, split, order, rank, **CONTEXT[name])
    for name, spec in context_parallel(["wan"]).items():
        report[f"ring {name}"] = beside(spec, lambda model, spec: split(model, spec, ring_degree=RANKS), "before", rank)
    if stepping:
        report["step cache"] = stepped(wan, None, number=rank, steps=CACHED_STEPS[rank])
        report["step cache, sharded"] = stepped(wan, shard, number=rank)
        if context_parallel(["wan"]):
            report["step cache, context"] = stepped(wan, split, number=0)
    (folder / f"{rank}.json").write_text(json.dumps(report), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
