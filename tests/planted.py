"""Small transformers whose dependences are known, to see whether an audit finds them."""

from __future__ import annotations

from typing import Any

import torch

WIDTH = 8


class Planted(torch.nn.Module):
    """Computes each of its stages from one source, in one way, and has a layer of its own do it.

    Args:
        plan: of each stage the source ("latents", "timestep", "prompt", "sizes", "calls", how many forwards there
            have been, or "before", the stage before) and the way that it takes: as a "tensor", as a number that the
            host reads ("item"), as how many there are of something ("count"), by deciding a "branch", or over a buffer
            that is written into ("buffer").
    """

    def __init__(self, plan: list[list[str]]) -> None:
        super().__init__()
        self.plan, self.calls = plan, 0
        self.stages = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in plan)
        for number in range(len(plan)):
            self.register_buffer(f"kept{number}", torch.zeros(1, WIDTH))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        before = torch.ones(1, WIDTH, device=hidden_states.device)
        total = hidden_states
        for number, (source, way) in enumerate(self.plan):
            if source == "latents":
                value = hidden_states.mean(0, keepdim=True)
            elif source == "timestep":
                value = (timestep / 1000.0).expand(1, WIDTH)
            elif source == "prompt":
                value = prompt.mean(0, keepdim=True)
            elif source == "calls":
                value = torch.full((1, WIDTH), float(self.calls), device=hidden_states.device)
            elif source == "sizes":
                value = torch.arange(WIDTH, device=hidden_states.device)[None] / len(hidden_states)
            else:
                value = before
            before = self.stages[number](self._taken(number, way, value))
            total = total + before
        return total

    def _taken(self, number: int, way: str, value: torch.Tensor) -> torch.Tensor:
        if way == "item":
            return torch.full_like(value, value.mean().item())
        if way == "count":
            return torch.ones_like(value) * (value > value.mean()).nonzero().shape[0]
        if way == "branch":
            return torch.ones_like(value) * (2 if value.sum().item() > 0.2 else 3)
        if way == "buffer":
            kept = getattr(self, f"kept{number}")
            kept.copy_(value)
            return kept * 1.0
        return value


def truly_depends(plan: list[list[str]], number: int) -> set[str]:
    """Return the arguments that a stage depends on."""
    source, _ = plan[number]
    names = {"latents": {"hidden_states"}, "timestep": {"timestep"}, "prompt": {"prompt"}, "sizes": set()}
    if source == "before":
        return truly_depends(plan, number - 1) if number else set()
    return names[source]


def reads_before(plan: list[list[str]], number: int) -> set[str]:
    """Return the arguments that the host has read something of before a stage's layer runs."""
    ways = ("item", "branch", "count")
    return set().union(*(truly_depends(plan, each) for each in range(number + 1) if plan[each][1] in ways), set())


MINI: dict[str, Any] = {
    "config": {"plan": []},
    "sizes": [{"tokens": 3}],
    "inputs": {
        "hidden_states": {"shape": ["tokens", WIDTH], "new": "step"},
        "timestep": {"shape": [1], "fill": "timestep", "new": "step"},
        "prompt": {"shape": [2, WIDTH], "new": "pass"},
    },
}
