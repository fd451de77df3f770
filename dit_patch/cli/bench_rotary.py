"""`dit-patch bench rotary`, see `dit_patch.bench.rotary`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .numbers import positive_number, whole_number


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        metavar="CASE",
        help="cases, such as wan-1.3b-480p, or specs to measure forwards of, such as diffusers/wan; an unknown one is "
        "answered with all cases (default: all, on a CPU those that take seconds)",
    )
    parser.add_argument("--all", action="store_true", help="on a CPU, also what takes minutes")
    parser.add_argument("--only", action="append", choices=("ops", "forwards"), help="one part; repeat for more")
    parser.add_argument("--device", default=None, metavar="DEVICE", help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="CPU threads (default: as torch has it)")
    parser.add_argument(
        "--seconds", type=positive_number, default=0.5, metavar="S", help="time per figure (default: %(default)s)"
    )
    parser.add_argument(
        "--layers", type=whole_number(1), metavar="N", help="of the models in forwards (default: as in their specs)"
    )
    parser.add_argument("--checks", action="store_true", help="on a GPU, also CUDA graphs and more than 2^31 elements")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write every row, with the environment, to FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON")


def run(options: argparse.Namespace) -> int:
    from ..bench.rotary import run_benchmark
    from ..bench.rotary.plan import PARTS, Plan

    plan = Plan.from_options(
        options.names,
        parts=options.only or PARTS,
        everything=options.all,
        device=options.device,
        threads=options.threads,
        seconds=options.seconds,
        layers=options.layers,
        checks=options.checks,
    )
    return run_benchmark(plan, csv=options.csv, json=options.json)
