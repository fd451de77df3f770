"""Check on a GPU whether the operations work in a CUDA graph, and on more elements than 32 bits count."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...rotary import eager, rotary, rotary_qk_
from ..cuda_graphs import capture
from .rows import Row
from .timing import differing

OPS = ("rotary", "rotary_qk_")

_SHAPE = (1, 4680, 12, 128)
_HEADS, _WIDTH = 24, 128
_SLICE = 64  # tokens


def run_checks(device: torch.device) -> Iterator[Row]:
    """Yield a row for each check: exact or not."""
    for (case, op), check in _CHECKS.items():
        try:
            row = Row("checks", case, op, differing=check(device))
        except torch.OutOfMemoryError:
            row = Row("checks", case, op, note="skipped: not enough memory")
        except Exception as error:  # a refusal is a result as well
            row = Row("checks", case, op, note=f"failed: {type(error).__name__}: {str(error).splitlines()[0]}")
        torch.cuda.empty_cache()
        yield row


def _captured(device: torch.device) -> float:
    x, (cos, sin) = _noise(_SHAPE, device, 0), _tables(_SHAPE[1], device)
    replay = _capture(lambda: rotary(x, cos, sin))
    x.copy_(_noise(_SHAPE, device, 1))
    expected = _reference(x, cos, sin)
    return differing([replay()], [expected])


def _captured_in_place(device: torch.device) -> float:
    q, k = (_noise(_SHAPE, device, seed) for seed in (0, 1))
    cos, sin = _tables(_SHAPE[1], device)

    def rotate() -> tuple[torch.Tensor, torch.Tensor]:
        rotary_qk_(q, k, cos, sin)
        return q, k

    replay = _capture(rotate)
    q.copy_(_noise(_SHAPE, device, 2))
    k.copy_(_noise(_SHAPE, device, 3))
    expected = [_reference(x, cos, sin) for x in (q, k)]
    return differing(replay(), expected)


def _large(device: torch.device) -> float:
    x, tables, slices = _large_input(device)
    result = rotary(x, *tables)
    return _on_slices(result, [_rotated(x, tables, each) for each in slices], slices)


def _large_in_place(device: torch.device) -> float:
    x, tables, slices = _large_input(device)
    expected = [_rotated(x, tables, each) for each in slices]
    rotary_qk_(x, None, *tables)
    return _on_slices(x, expected, slices)


_CHECKS: dict[tuple[str, str], Callable[[torch.device], float]] = {
    ("CUDA graph", OPS[0]): _captured,
    ("CUDA graph", OPS[1]): _captured_in_place,
    ("more than 2^31 elements", OPS[0]): _large,
    ("more than 2^31 elements", OPS[1]): _large_in_place,
}


def _capture(call: Callable) -> Callable:
    """The call as a CUDA graph, as what replays it, waits, and returns the result."""
    graph, result = capture(call)

    def replay():
        graph.replay()
        torch.cuda.synchronize()
        return result

    return replay


def _large_input(device: torch.device) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], list[slice]]:
    """A tensor that 32 bits do not count, its tables, and the tokens to look at: first, middle, around 2^31, last."""
    border = 2**31 // (_HEADS * _WIDTH)
    tokens = border + 1000
    x = torch.empty(1, tokens, _HEADS, _WIDTH, dtype=torch.bfloat16, device=device).normal_()
    starts = (0, tokens // 2, border - _SLICE // 2, tokens - _SLICE)
    return x, _tables(tokens, device), [slice(start, start + _SLICE) for start in starts]


def _rotated(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], where: slice) -> torch.Tensor:
    return _reference(x[:, where], *(table[where] for table in tables))


def _on_slices(result: torch.Tensor, expected: list[torch.Tensor], slices: list[slice]) -> float:
    return differing([result[:, each] for each in slices], expected)


def _reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What plain torch makes of it, by tables (S, D / 2)."""
    out = torch.empty_like(x)
    eager.rotate(x, out, cos[:, None], sin[:, None], interleaved=True, arithmetic="separate")
    return out


def _noise(shape: tuple[int, ...], device: torch.device, seed: int) -> torch.Tensor:
    random = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.bfloat16, device=device)


def _tables(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (S, D / 2)."""
    angles = torch.rand(tokens, _WIDTH // 2, generator=torch.Generator(device).manual_seed(9), device=device) * 6.28
    return angles.cos(), angles.sin()
