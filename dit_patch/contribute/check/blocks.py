"""Find the forward pattern of cache-dit that a model's blocks follow, from what they take and return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import SiteError
from ...sites import resolve
from ...spec.model import Spec
from ...step_cache.block_pattern import ENCODER, HIDDEN, PATTERNS


@dataclass
class BlockCall:
    """One call of a block: its arguments, and what it returned."""

    args: tuple
    kwargs: dict[str, Any]
    returned: Any


def block_problems(model: torch.nn.Module, spec: Spec, forwards: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the spec's `blocks`, by running these forwards of the unpatched model."""
    problems = []
    for blocks in spec.blocks:
        label = f"{spec.name}: blocks: {blocks.at}"
        try:
            [owner] = resolve.submodules(model, blocks.at, label)
        except SiteError as error:
            problems.append(str(error))
            continue
        if not isinstance(owner, torch.nn.ModuleList):
            problems.append(f"{label}: is a {type(owner).__name__}, not a list of blocks")
            continue
        calls = record_block_calls(model, owner, forwards)
        if not calls:
            problems.append(f"{label}: none of its {len(owner)} blocks is called by the model's forward")
            continue
        fitting, why = fitting_patterns(calls)
        if blocks.pattern not in fitting:
            instead = " or ".join(map(str, fitting)) or "none of cache-dit's"
            pattern = PATTERNS[blocks.pattern]
            taken, returned = (" and ".join(names) for names in (pattern.inputs, pattern.outputs))
            problems.append(
                f"{label}: pattern {blocks.pattern} is for blocks that take {taken} and return {returned}; {why}. "
                f"The pattern is {instead}"
            )
    return problems


def fitting_patterns(calls: list[BlockCall]) -> tuple[list[int], str]:
    """Return the patterns that blocks with these calls may follow, and in words why."""
    first = calls[0]
    returned = first.returned if isinstance(first.returned, (tuple, list)) else (first.returned,)
    if not all(isinstance(each, torch.Tensor) for each in returned) or len(returned) > 2:
        return [], f"these return {', '.join(type(each).__name__ for each in returned)}"
    hidden = _argument(first, 0, HIDDEN)
    if not isinstance(hidden, torch.Tensor):
        return [], f"these take no tensor in the first place or by the name {HIDDEN}"
    if len(returned) == 1:
        return [2, 3], "these return one tensor"  # either will do: nothing but the hidden states changes
    order = _returns_hidden_first(calls)
    if order is None:
        return [0, 1, 4, 5], "these return two tensors, and which are the hidden states is not clear"
    both = _takes_both(calls, other=1 if order else 0)
    words = f"these return two tensors, hidden states {'first' if order else 'last'}"
    words += "" if both else ", and take no more than those of what they return"
    return ([0] if both else [4]) if order else ([1] if both else [5]), words


def _returns_hidden_first(calls: list[BlockCall]) -> bool | None:
    """Return whether the first of two returned tensors is the next block's hidden states; None: unclear."""
    for one, following in zip(calls, calls[1:]):
        taken = _argument(following, 0, HIDDEN)
        same = [each is taken for each in one.returned]
        if any(same):
            return same[0]
    hidden = _argument(calls[0], 0, HIDDEN)
    like = [each.shape == hidden.shape for each in calls[0].returned]
    return like[0] if like[0] != like[1] else None


def _takes_both(calls: list[BlockCall], other: int) -> bool:
    """Return whether the next block takes the other tensor too, as its second argument or its encoder states."""
    for one, following in zip(calls, calls[1:]):
        if _argument(following, 0, HIDDEN) is one.returned[1 - other]:
            return _argument(following, 1, ENCODER) is one.returned[other]
    second = _argument(calls[0], 1, ENCODER)
    return isinstance(second, torch.Tensor) and second.shape == calls[0].returned[other].shape


def _argument(call: BlockCall, position: int, name: str) -> Any:
    return call.args[position] if position < len(call.args) else call.kwargs.get(name)


def record_block_calls(
    model: torch.nn.Module, blocks: torch.nn.ModuleList, forwards: Iterable[Mapping[str, Any]]
) -> list[BlockCall]:
    """Return the calls of the blocks in the first forward that makes any."""
    calls: list[BlockCall] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict, returned: Any) -> None:
        calls.append(BlockCall(args, kwargs, returned))

    with ExitStack() as undo, torch.no_grad():
        for block in blocks:
            undo.callback(block.register_forward_hook(note, with_kwargs=True).remove)
        for arguments in forwards:
            model(**arguments)
            if calls:
                break
    return calls
