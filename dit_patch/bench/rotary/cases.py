"""The shapes that RoPE is applied at, each with the library's own function and what `rotary` is given instead of it.

The functions are taken live from what is installed. Tensors and tables are made up, in the shapes, dtypes and strides
that the libraries have them in: neither times nor the question of equal bits depend on more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...extras import version
from ...sites.inner_functions import InnerFunctions
from ...upstream import fastvideo_internals

_GRID = (3, 22, 40)  # latent frames, height and width of a Matrix-Game 2 block, in tokens


@dataclass(frozen=True)
class Problem:
    """One case on a device: queries and keys (B, S, H, D), and the tables that `rotary` rotates them by.

    `live` is the library's function. It takes a tensor, or where it is for `both` at once q and k, and what is `given`.
    """

    live: Callable[..., Any]
    given: tuple[Any, ...]
    q: torch.Tensor
    k: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    pairs: str = "interleaved"
    arithmetic: str = "separate"
    both: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def how(self) -> dict[str, str]:
        """The keywords with which `rotary` and `rotary_qk_` give the bits of `live`."""
        return {"pairs": self.pairs, "arithmetic": self.arithmetic}

    def call(self, live: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
        """What `live`, or the same function compiled, makes of q; of q and k where it is for both."""
        if self.both:
            return live(self.q, self.k, *self.given, **self.options)
        return (live(self.q, *self.given, **self.options),)

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the library makes of q and of k."""
        if self.both:
            return self.call(self.live)
        return tuple(self.live(x, *self.given, **self.options) for x in (self.q, self.k))


@dataclass(frozen=True)
class Case:
    """A shape with the function that meets it, which `make` gets from the `library`. `big`: minutes on a CPU."""

    name: str
    words: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    library: str
    make: Callable[[torch.Tensor, torch.Tensor], Problem]
    big: bool = False

    def problem(self, device: torch.device | str) -> Problem:
        """The case on a device, always with the same numbers.

        Raises:
            ImportError: the library is not installed, or cannot be imported.
            LookupError: it has no such function.
        """
        random = torch.Generator(device).manual_seed(0)
        q, k = (torch.randn(self.shape, generator=random, device=device, dtype=self.dtype) for _ in range(2))
        return self.make(q, k)

    def missing(self, error: Exception) -> str:
        """Why there is no such problem here."""
        installed = version(self.library)
        return f"{self.library} {installed}: {error}" if installed else f"{self.library} is not installed"


def wan_closure() -> Callable[..., torch.Tensor]:
    """The function that diffusers' Wan attention defines anew in each call.

    Raises:
        LookupError: this diffusers has none.
    """
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    functions = vars(InnerFunctions(WanAttnProcessor.__call__))
    if "apply_rotary_emb" not in functions:
        raise LookupError("no function apply_rotary_emb in WanAttnProcessor.__call__")
    return functions["apply_rotary_emb"]


def _wan(q: torch.Tensor, k: torch.Tensor) -> Problem:
    tables = tuple(table[None, :, None].float() for table in _repeated(q))
    return Problem(wan_closure(), tables, q, k, *tables)


def _hunyuan(q: torch.Tensor, k: torch.Tensor) -> Problem:
    from diffusers.models.embeddings import apply_rotary_emb

    tables = tuple(table.float() for table in _repeated(q))
    return Problem(apply_rotary_emb, (tables,), q, k, *tables, options={"sequence_dim": 1})


def _fastvideo(q: torch.Tensor, k: torch.Tensor, dtype: torch.dtype = torch.float32) -> Problem:
    tables = tuple(table.to(dtype) for table in _repeated(q))
    return Problem(fastvideo_internals.rotary_function(), tables, q, k, *tables, options={"is_neox_style": False})


def _action_module(q: torch.Tensor, k: torch.Tensor) -> Problem:
    tables = tuple(table.float()[:, ::2] for table in _repeated(q))
    return Problem(fastvideo_internals.rotary_function(), tables, q, k, *tables, options={"is_neox_style": False})


def _matrix_game(q: torch.Tensor, k: torch.Tensor) -> Problem:
    """`rotary` gets whole the table that the live function puts together from its axes in each call."""
    from fastvideo.models.dits.matrixgame2.causal_model import causal_rope_apply

    angles = _angles(1024, q)
    axes = torch.polar(torch.ones_like(angles), angles)
    third = axes.shape[1] // 3
    parts = []
    for number, part in enumerate(axes.split([axes.shape[1] - 2 * third, third, third], dim=1)):
        along = [1, 1, 1]
        along[number] = _GRID[number]
        parts.append(part[: _GRID[number]].view(*along, -1).expand(*_GRID, -1))
    table = torch.cat(parts, dim=-1).flatten(0, 2)
    return Problem(causal_rope_apply, (_GRID, axes), q, k, table.real, table.imag, arithmetic="complex")


def _qwen(q: torch.Tensor, k: torch.Tensor) -> Problem:
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    def apply(q: torch.Tensor, k: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # In the model heads come before tokens, as a view.
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *tables)
        return q.transpose(1, 2), k.transpose(1, 2)

    # Not from position 0, where there is nothing to round.
    angles = _angles(1000 + q.shape[1], q)[1000:].repeat(1, 2)[None]
    tables = tuple(table.to(q.dtype) for table in (angles.cos(), angles.sin()))
    return Problem(apply, tables, q, k, *tables, pairs="half", arithmetic="rounded", both=True)


def _repeated(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every token's angles, each twice in a row: (S, D), float64."""
    angles = _angles(x.shape[1], x).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def _angles(rows: int, like: torch.Tensor) -> torch.Tensor:
    width = like.shape[-1]
    count = partial(torch.arange, dtype=torch.float64, device=like.device)
    return torch.outer(count(rows), 10000.0 ** (-count(0, width, 2) / width))


_BF16, _FP32, _FP64 = torch.bfloat16, torch.float32, torch.float64
_WAN, _HUNYUAN = "diffusers, the closure of Wan's attention", "diffusers, embeddings.apply_rotary_emb"
_FASTVIDEO, _QWEN = "FastVideo, _apply_rotary_emb", "transformers, Qwen3's apply_rotary_pos_emb on q and k"
_MATRIX_GAME = "FastVideo, Matrix-Game 2's causal_rope_apply"

CASES = {
    case.name: case
    for case in (
        Case("wan-1.3b-480p", _WAN, (1, 32760, 12, 128), _BF16, "diffusers", _wan),
        Case("wan-1.3b-480p-fp32", _WAN, (1, 32760, 12, 128), _FP32, "diffusers", _wan),
        Case("wan-14b-720p", _WAN, (1, 75600, 40, 128), _BF16, "diffusers", _wan, big=True),
        Case("hunyuan-video-720p", _HUNYUAN, (1, 118800, 24, 128), _BF16, "diffusers", _hunyuan, big=True),
        Case("fastvideo-wan-1.3b-480p", _FASTVIDEO, (1, 32760, 12, 128), _BF16, "fastvideo", _fastvideo),
        Case("causal-wan", _FASTVIDEO, (1, 4680, 12, 128), _BF16, "fastvideo", partial(_fastvideo, dtype=_FP64)),
        Case("matrix-game-2", _MATRIX_GAME, (1, 2640, 12, 128), _BF16, "fastvideo", _matrix_game),
        Case("matrix-game-2-actions", _FASTVIDEO, (880, 3, 16, 64), _BF16, "fastvideo", _action_module),
        Case("qwen3", _QWEN, (1, 512, 32, 128), _BF16, "transformers", _qwen),
        Case("qwen3-4-tokens", _QWEN, (1, 4, 32, 128), _BF16, "transformers", _qwen),
        Case("qwen3-1-token", _QWEN, (1, 1, 32, 128), _BF16, "transformers", _qwen),
    )
}
"""By name, in the order in which they are measured."""
