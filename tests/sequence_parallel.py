"""FastVideo's models with and without dit_patch, each rank of a sequence-parallel group for itself.

    torchrun --standalone --nproc-per-node 2 tests/sequence_parallel.py FOLDER

leaves `0.json` and `1.json` in FOLDER: of each case digests of outputs and tables, and what the handle reports. Without
torchrun, one process does the same alone and leaves `alone.json`. test_sequence_parallel.py says what it should be.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import dit_patch
from dit_patch.contribute import verify
from dit_patch.handle import Handle
from dit_patch.hosts import fastvideo
from dit_patch.spec import mini
from dit_patch.spec.registry import Registry
from dit_patch.step_cache import ranks

RANKS = 2
LIMIT = 240  # seconds; it takes some thirty
ROPE = "forward:get_rotary_pos_embed"
STEPS = 2
SIZES = 2  # as many generations, one of each
SPECS = {spec.name: spec for spec in Registry(plugins=False) if spec.mini.host == fastvideo.__name__}


@dataclass(frozen=True)
class Case:
    """A spec's mini. Of an argument in `split` each rank has its part, along that dimension, and of the others all."""

    spec: str
    variant: str | None = None
    split: Mapping[str, int] = field(default_factory=dict)


def _cases() -> Iterator[tuple[str, Case]]:
    for spec in SPECS.values():
        # It takes the latents for the rank's own frames: the only one whose tables differ from rank to rank.
        split = {"hidden_states": 2} if spec.name == "fastvideo/matrixgame2_bidirectional" else {}
        # The causal one has no collectives, and is slow on a CPU: one of its minis is enough.
        variants = () if spec.name == "fastvideo/matrixgame2" else spec.mini.variants
        for variant in (None, *variants):
            yield f"{spec.name} {variant}" if variant else spec.name, Case(spec.name, variant, split)
    # With a timestep for every token, as FastVideo's stage gives them, Wan raises.
    yield "fastvideo/wan ti2v split", Case("fastvideo/wan", "ti2v", {"timestep": 1})


CASES = dict(_cases())


class Trial:
    """One case on this rank, of which `record` is the report."""

    def __init__(self, case: Case, rank: int, world: int) -> None:
        self.case, self.rank, self.world = case, rank, world
        self.spec = SPECS[case.spec]
        self.mini = self.spec.mini.case(case.variant)
        # A process alone has the frames of all ranks, and reports on them in as many parts.
        self.parts = RANKS // world if "hidden_states" in case.split else 1

    def record(self) -> dict[str, Any]:
        model = mini.build(self.spec, self.mini)
        groups = [torch.distributed.get_world_size(group) for group in ranks.groups(model)]
        generations = [self.forwards(number) for number in range(SIZES)]
        first, both = generations[0], sum(generations, [])
        record: dict[str, Any] = {"groups": groups, "plain": self.outcome(model, both)}
        with another_rank(self.world - 1 - self.rank):
            record["plain as another rank"] = self.outcome(model, first)
        handle = dit_patch.apply(model)
        record["patched"] = self.outcome(model, both)
        record["counts"] = counts(handle)
        record["tables"] = self.tables(handle)
        if self.rank == 0:
            handle.clear()
        record["after one rank's clear"] = self.outcome(model, first)
        record["counts after one rank's clear"] = counts(handle)
        with another_rank(self.world - 1 - self.rank):
            record["patched as another rank"] = self.outcome(model, first)
        record["counts as another rank"] = counts(handle)
        record["tables as another rank"] = self.tables(handle)
        handle.remove()
        record["removed"] = self.outcome(model, first)
        return record

    def forwards(self, number: int) -> list[dict[str, Any]]:
        size = dict(self.mini.sizes[number])
        if "blocks" in size:
            size["blocks"] = 2
        if "hidden_states" in self.case.split:
            size["f"] *= RANKS
            size["frames"] = 4 * size["f"] // self.world - 3  # of the video, for the latent frames of one rank
        forwards = list(mini.forwards(self.mini, size, steps=STEPS, generation=number))
        for arguments in forwards:
            for name, dimension in self.case.split.items():
                arguments[name] = arguments[name].chunk(self.world, dimension)[self.rank]
        return forwards

    def outcome(self, model: torch.nn.Module, forwards: list[dict[str, Any]]) -> list[Any]:
        """Digests of each forward's output, or the one exception."""
        try:
            outputs = verify.run(model, forwards)
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]
        return [[digest(part) for part in output.chunk(self.parts, 2)] for [output] in outputs]

    def tables(self, handle: Handle) -> list[dict[str, Any]]:
        """The RoPE tables that are held, in the order they were made: whose they are by their key, and digests."""
        [member] = handle.patched_models
        return [
            {
                "rank and size": entry.key[-2:],
                "cos and sin": [[digest(part) for part in table.chunk(self.parts)] for table in entry.value],
            }
            for patch in member.sites.get(ROPE, ())
            for entry in patch.memo.cache.entries.values()
        ]


def counts(handle: Handle) -> dict[str, tuple[int, int, int]]:
    """Hits, misses and bypassed calls of each site, by the handle's own report."""
    return {row.at: (row.hits, row.misses, sum(row.bypassed.values())) for row in handle.stats()}


@contextmanager
def another_rank(rank: int) -> Iterator[None]:
    """FastVideo's functions say that this process is that rank; who sends what to whom stays as it is."""
    group = import_module("fastvideo.distributed.parallel_state").get_sp_group()
    with mock.patch.object(group, "rank_in_group", rank):
        yield


def digest(tensor: torch.Tensor) -> str:
    """Equal for equal shape, dtype and bits."""
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(repr((tensor.shape, tensor.dtype)).encode() + content).hexdigest()[:12]


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # ranks that wait for each other would wait for half an hour
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="dit_patch")
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    fastvideo.prepare()
    report = {name: Trial(case, rank, world).record() for name, case in CASES.items()}
    name = "alone" if world == 1 else str(rank)
    (folder / f"{name}.json").write_text(json.dumps(report, default=repr), encoding="utf-8")
    # A rank that ends while the group is there is aborted by the group's threads.
    import_module("fastvideo.distributed").cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
