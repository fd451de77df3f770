"""`dit-patch bench here`, see `dit_patch.bench.here`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .numbers import positive_number


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes",
        type=positive_number,
        default=8.0,
        metavar="M",
        help="for all parts together (default: %(default)g)",
    )
    parser.add_argument("--only", action="append", metavar="PART", help="one part, such as wan-short; repeat for more")
    parser.add_argument("--device", default=None, metavar="DEVICE", help="default: cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write every row to FILE, as JSON, as they come")
    parser.add_argument("--tiny", action="store_true", help="a dry run with tiny models; its figures say nothing")


def run(options: argparse.Namespace) -> int:
    from ..bench.here import run_benchmark

    return run_benchmark(options.minutes, options.device, options.out, options.only, tiny=options.tiny)
