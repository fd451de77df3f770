"""`dit-patch bench step-cache`, see `dit_patch.bench.step_cache.command`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .numbers import number, seed, whole_number


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="shapes",
        metavar="PATH",
        help="a diffusers pipeline, folder or hub id; or `shapes`, the small trained Wan that comes along (default)",
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeat for more; `shapes` has its own")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt per line")
    parser.add_argument(
        "--preset",
        action="append",
        metavar="NAME",
        help="quality, balanced, performance; repeat for more (default: all)",
    )
    parser.add_argument(
        "--threshold",
        type=number,
        action="append",
        metavar="R",
        help="a threshold to sweep; repeat for more, all else as in the (first) preset",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KNOB=VALUE",
        help="any knob of StepCache, for every variant; repeat for more",
    )
    parser.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what else to call the pipeline with, such as height=480",
    )
    parser.add_argument(
        "--steps", type=whole_number(1), default=30, metavar="N", help="denoising steps (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="S",
        help="of the first prompt, the next has the next (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=whole_number(1),
        default=3,
        metavar="N",
        help="times each generation is timed (default: %(default)s)",
    )
    parser.add_argument(
        "--beside-cache-dit", action="store_true", help="also drive cache-dit itself, on copies of the transformers"
    )
    parser.add_argument("--device", default=None, metavar="DEVICE", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        metavar="DTYPE",
        help="to load a model in (default: %(default)s; `shapes` is float32)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("step-cache-report"), metavar="DIR", help="default: %(default)s"
    )


def run(options: argparse.Namespace) -> int:
    from ..bench.step_cache import command

    return command.run(options)
