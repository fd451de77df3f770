"""What transformer blocks take and return, by the numbers of cache-dit's forward patterns, which a spec states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import StepCacheError

HIDDEN, ENCODER = "hidden_states", "encoder_hidden_states"

States = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states, and those of the encoder where blocks have them."""


@dataclass(frozen=True)
class BlockPattern:
    """The tensors that a block takes first, and those that it returns, in order and by name."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def take(self, args: tuple, kwargs: dict, made: torch.Tensor | None, label: str) -> States:
        """Return the states among a block's arguments.

        Args:
            made: the encoder's states that an earlier block returned, where blocks do not take them.
            label: what messages call the list of blocks.

        Raises:
            StepCacheError: there are no hidden states; the pattern is for other blocks.
        """
        given = [args[place] if place < len(args) else kwargs.get(name) for place, name in enumerate(self.inputs)]
        if not isinstance(given[0], torch.Tensor):
            raise StepCacheError(
                f"{label}: its blocks are called without hidden states in the first place or by the name "
                f"`{self.inputs[0]}`; the spec's `pattern` is for other blocks"
            )
        if ENCODER not in self.outputs:
            return given[0], None  # what blocks do not return, they do not change
        return given[0], given[1] if len(given) > 1 else made

    def split(self, result: Any, label: str) -> States:
        """Return the states of what a block returned.

        Raises:
            StepCacheError: it is something else; the pattern is for other blocks.
        """
        results = (result,) if isinstance(result, torch.Tensor) else result
        fits = isinstance(results, (tuple, list)) and len(results) == len(self.outputs)
        fits = fits and (len(self.outputs) > 1 or results is not result)
        states = dict(zip(self.outputs, results)) if fits else {}
        if not isinstance(states.get(HIDDEN), torch.Tensor):
            raise StepCacheError(
                f"{label}: a block returned {type(result).__name__}, not {', '.join(self.outputs)}; "
                "the spec's `pattern` is for other blocks"
            )
        return states[HIDDEN], states.get(ENCODER)

    def give(self, states: States) -> Any:
        """Return the states as a block returns them."""
        if len(self.outputs) == 1:
            return states[0]
        return tuple(states[0] if name == HIDDEN else states[1] for name in self.outputs)


PATTERNS = {
    0: BlockPattern((HIDDEN, ENCODER), (HIDDEN, ENCODER)),
    1: BlockPattern((HIDDEN, ENCODER), (ENCODER, HIDDEN)),
    2: BlockPattern((HIDDEN, ENCODER), (HIDDEN,)),
    3: BlockPattern((HIDDEN,), (HIDDEN,)),
    4: BlockPattern((HIDDEN,), (HIDDEN, ENCODER)),
    5: BlockPattern((HIDDEN,), (ENCODER, HIDDEN)),
}
"""cache-dit's forward patterns, by their numbers."""
