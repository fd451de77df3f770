"""`dit-patch bench host`, see `dit_patch.bench.host`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .numbers import whole_number


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "specs", nargs="*", metavar="NAME", help="specs, such as diffusers/wan, or libraries, such as fastvideo"
    )
    parser.add_argument(
        "--only", action="append", choices=("forwards", "inside", "growth"), help="one part; repeat for more"
    )
    parser.add_argument(
        "--layers", type=whole_number(1), default=30, metavar="N", help="depth of the models (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=whole_number(9), default=9, metavar="N", help="generations, at least 9 (default: 9)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write every row, with the environment, to FILE")


def run(options: argparse.Namespace) -> int:
    from ..bench.host import run_benchmark

    return run_benchmark(options.only, options.specs, options.layers, options.rounds, options.csv)
