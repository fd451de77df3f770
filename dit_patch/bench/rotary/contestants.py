"""The ways to rotate that are compared: the library's own function, compiled or not, `rotary`, and those of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...extras import version
from ...rotary import rotary, rotary_qk_
from .cases import Problem

EAGER, COMPILE, OURS, IN_PLACE, FLASH, CLONE = (
    "eager", "compile", "dit_patch", "dit_patch q+k in place", "flash-attn", "clone",
)  # fmt: skip


class Missing(Exception):
    """A contestant that is not here, and why."""


@dataclass(frozen=True)
class Contestant:
    """A `call` that returns q rotated, or q and k; `tables` are those it reads.

    `begin` puts back what calls write into. One that is not `rotating` has no bits to compare.
    """

    call: Callable[[], tuple[torch.Tensor, ...]]
    tables: tuple[torch.Tensor, ...] = ()
    begin: Callable[[], None] | None = None
    rotating: bool = True


Maker = Callable[[Problem], Contestant | None]
"""Makes a contestant for a case, or none where it does not do such cases; raises `Missing` where it is not here."""


def _eager(problem: Problem) -> Contestant:
    return Contestant(lambda: problem.call(problem.live), (problem.cos, problem.sin))


def _compile(problem: Problem, **options: bool) -> Contestant:
    compiled = torch.compile(problem.live, options=options or None)
    return Contestant(lambda: problem.call(compiled), (problem.cos, problem.sin))


def _compile_exact(problem: Problem) -> Contestant:
    return _compile(problem, emulate_precision_casts=True)


def _ours(problem: Problem) -> Contestant:
    tables = problem.cos, problem.sin
    return Contestant(lambda: (rotary(problem.q, *tables, **problem.how),), tables)


def _in_place(problem: Problem) -> Contestant:
    tables = problem.cos, problem.sin

    def rotate(q: torch.Tensor, k: torch.Tensor) -> None:
        rotary_qk_(q, k, *tables, **problem.how)

    return _writing(problem, rotate, tables)


def _flash_attn(problem: Problem) -> Contestant:
    _require("flash-attn", problem)
    from flash_attn.ops.triton.rotary import apply_rotary

    # It has one dtype for all and half the width, one row after the other.
    cos, sin = (table.to(problem.q.dtype).contiguous() for table in _half_width(problem))
    interleaved = problem.pairs == "interleaved"
    return Contestant(lambda: (apply_rotary(problem.q, cos, sin, interleaved=interleaved),), (cos, sin))


def _liger(problem: Problem) -> Contestant | None:
    if problem.pairs != "half":
        return None
    _require("liger-kernel", problem)
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    tables = problem.cos, problem.sin

    def rotate(q: torch.Tensor, k: torch.Tensor) -> None:
        liger_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *tables)

    return _writing(problem, rotate, tables)


def _clone(problem: Problem) -> Contestant:
    return Contestant(lambda: (problem.q.clone(),), rotating=False)


CONTESTANTS: Mapping[str, Maker] = {
    EAGER: _eager,
    COMPILE: _compile,
    "compile-exact": _compile_exact,
    OURS: _ours,
    IN_PLACE: _in_place,
    FLASH: _flash_attn,
    "liger": _liger,
    CLONE: _clone,
}


def _writing(
    problem: Problem, rotate: Callable[[torch.Tensor, torch.Tensor], None], tables: tuple[torch.Tensor, ...]
) -> Contestant:
    """One that rotates q and k in place: copies of its own, lest the others get what is rotated already."""
    q, k = problem.q.clone(), problem.k.clone()

    def begin() -> None:
        q.copy_(problem.q)
        k.copy_(problem.k)

    def call() -> tuple[torch.Tensor, ...]:
        rotate(q, k)
        return q, k

    return Contestant(call, tables, begin)


def _half_width(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables as (S, D / 2)."""
    tokens, width = problem.q.shape[1], problem.q.shape[-1]
    tables = (table.reshape(tokens, -1) for table in (problem.cos, problem.sin))
    if problem.cos.shape[-1] < width:
        return tuple(tables)
    chosen = slice(None, None, 2) if problem.pairs == "interleaved" else slice(width // 2)
    return tuple(table[:, chosen] for table in tables)


def _require(package: str, problem: Problem) -> None:
    if version(package) is None:
        raise Missing("not installed")
    if not problem.q.is_cuda:
        raise Missing("needs a CUDA device")
