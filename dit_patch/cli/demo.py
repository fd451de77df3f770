"""`dit-patch demo`, see `dit_patch.pipelines.demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .numbers import seed, whole_number


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("dit-patch-demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--steps", type=whole_number(1), default=8, metavar="N", help="denoising steps (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="of weights and noise (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    from ..pipelines.demo import run_demo

    return run_demo(options.out, steps=options.steps, seed=options.seed)
