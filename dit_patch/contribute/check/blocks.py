"""What the blocks of a model take and return, and so which of cache-dit's forward patterns is theirs."""

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
class Seen:
    """One call of a block: its tensor arguments by place and name, and what it returned."""

    args: tuple
    kwargs: dict[str, Any]
    returned: Any


def problems(model: torch.nn.Module, spec: Spec, forwards: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the spec's `blocks`, from the calls of the blocks in these forwards of the unpatched model."""
    found = []
    for blocks in spec.blocks:
        where = f"{spec.name}: blocks: {blocks.at}"
        try:
            [owner] = resolve.submodules(model, blocks.at, where)
        except SiteError as error:
            found.append(str(error))
            continue
        if not isinstance(owner, torch.nn.ModuleList):
            found.append(f"{where}: is a {type(owner).__name__}, not a list of blocks")
            continue
        seen = calls(model, owner, forwards)
        if not seen:
            found.append(f"{where}: none of its {len(owner)} blocks is called by the model's forward")
            continue
        fitting, why = fits(seen)
        if blocks.pattern not in fitting:
            instead = " or ".join(map(str, fitting)) or "none of cache-dit's"
            pattern = PATTERNS[blocks.pattern]
            taken, returned = (" and ".join(names) for names in (pattern.inputs, pattern.outputs))
            found.append(
                f"{where}: pattern {blocks.pattern} is for blocks that take {taken} and return {returned}; {why}. "
                f"The pattern is {instead}"
            )
    return found


def fits(calls: list[Seen]) -> tuple[list[int], str]:
    """The patterns that blocks called like this follow, and what was seen of them in words."""
    first = calls[0]
    returned = first.returned if isinstance(first.returned, (tuple, list)) else (first.returned,)
    if not all(isinstance(each, torch.Tensor) for each in returned) or len(returned) > 2:
        return [], f"these return {', '.join(type(each).__name__ for each in returned)}"
    hidden = _argument(first, 0, HIDDEN)
    if not isinstance(hidden, torch.Tensor):
        return [], f"these take no tensor in the first place or by the name {HIDDEN}"
    if len(returned) == 1:
        return [2, 3], "these return one tensor"  # of which one follows does not matter: nothing else changes
    order = _hidden_first(calls)
    if order is None:
        return [0, 1, 4, 5], "these return two tensors, and which are the hidden states is not clear"
    both = _takes_both(calls, other=1 if order else 0)
    words = f"these return two tensors, hidden states {'first' if order else 'last'}"
    words += "" if both else ", and take no more than those of what they return"
    return ([0] if both else [4]) if order else ([1] if both else [5]), words


def _hidden_first(calls: list[Seen]) -> bool | None:
    """Whether the first of the two returned tensors is the next block's hidden states; None where that is not clear."""
    for one, following in zip(calls, calls[1:]):
        taken = _argument(following, 0, HIDDEN)
        same = [each is taken for each in one.returned]
        if any(same):
            return same[0]
    hidden = _argument(calls[0], 0, HIDDEN)
    like = [each.shape == hidden.shape for each in calls[0].returned]
    return like[0] if like[0] != like[1] else None


def _takes_both(calls: list[Seen], other: int) -> bool:
    """Whether the next block takes the other tensor, too, in the second place or as the encoder's hidden states."""
    for one, following in zip(calls, calls[1:]):
        if _argument(following, 0, HIDDEN) is one.returned[1 - other]:
            return _argument(following, 1, ENCODER) is one.returned[other]
    second = _argument(calls[0], 1, ENCODER)
    return isinstance(second, torch.Tensor) and second.shape == calls[0].returned[other].shape


def _argument(call: Seen, place: int, name: str) -> Any:
    return call.args[place] if place < len(call.args) else call.kwargs.get(name)


def calls(model: torch.nn.Module, blocks: torch.nn.ModuleList, forwards: Iterable[Mapping[str, Any]]) -> list[Seen]:
    """The calls of the blocks in the first forward that makes any."""
    seen: list[Seen] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict, returned: Any) -> None:
        seen.append(Seen(args, kwargs, returned))

    with ExitStack() as undo, torch.no_grad():
        for block in blocks:
            undo.callback(block.register_forward_hook(note, with_kwargs=True).remove)
        for arguments in forwards:
            model(**arguments)
            if seen:
                break
    return seen
