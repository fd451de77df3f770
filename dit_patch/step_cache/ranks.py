"""Which ranks must skip the same blocks: those that compute one model together.

A block of a model that is parallelised waits in its collectives for the other ranks, so that they all run it or all
leave it out. Ranks that merely generate at the same time, each with a model of its own, must not wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..upstream import diffusers_internals, fastvideo_internals


def groups(model: torch.nn.Module) -> list[Any]:
    """The process groups of more than one rank that take part in the model's blocks, each once.

    diffusers' context and tensor parallelism, FastVideo's sequence and tensor parallelism, FSDP of either kind, and
    whatever else keeps weights as DTensors. FSDP2 holds them so while they are sharded, as those of blocks are when the
    model's forward begins; blocks that stay gathered have nothing to wait for.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    found = (*_of_diffusers(model), *fastvideo_internals.parallel_groups(model), *_of_weights(model))
    return [group for group in dict.fromkeys(found) if torch.distributed.get_world_size(group) > 1]


def average(group: list[Any], values: torch.Tensor) -> torch.Tensor:
    """The mean of `values` over the ranks of these groups together; every rank gets the same bits."""
    for each in group:
        # Not ReduceOp.AVG, which gloo does not have.
        torch.distributed.all_reduce(values, group=each)
        values /= torch.distributed.get_world_size(each)
    return values


def _of_diffusers(model: torch.nn.Module) -> Iterator[Any]:
    if diffusers_internals.is_parallel(model):
        yield from diffusers_internals.parallel_groups(model)
    elif getattr(model, "_is_parallelized", False):
        # cache-dit's own parallelism says no more than that there is one.
        yield torch.distributed.group.WORLD


def _of_weights(model: torch.nn.Module) -> Iterator[Any]:
    for parameter in model.parameters():
        for dimension, placement in enumerate(getattr(parameter, "placements", ())):
            if placement.is_shard():  # replicas have nothing to say to each other
                yield parameter.device_mesh.get_group(dimension)
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            yield module.process_group
