"""`dit-patch bench`, see `dit_patch.bench.sites`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .numbers import positive_number


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "specs", nargs="*", metavar="NAME", help="specs, such as diffusers/wan, or libraries, such as fastvideo"
    )
    parser.add_argument(
        "--only", action="append", choices=("hits", "sites", "kernels", "forwards"), help="one part; repeat for more"
    )
    parser.add_argument("--device", default=None, metavar="DEVICE", help="default: cuda where there is one, else cpu")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write every row, with the environment, to FILE")
    parser.add_argument(
        "--seconds", type=positive_number, default=0.5, metavar="S", help="least time per figure (default: 0.5)"
    )


def run(options: argparse.Namespace) -> int:
    from ..bench.sites import run_benchmark

    return run_benchmark(
        parts=options.only,
        specs=options.specs,
        device=options.device,
        csv=options.csv,
        seconds=options.seconds,
    )
