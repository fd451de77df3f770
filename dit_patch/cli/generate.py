"""`dit-patch generate`, see `dit_patch.pipelines.generate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..launch import flags
from .numbers import number, positive_number, seed, whole_number

OFFLOAD = ("none", "model", "sequential", "group")
COMPILE = ("none", "blocks", "model")


def arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the pipeline")
    model.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_ID",
        help="a saved diffusers pipeline: its folder or hub id; or `shapes`, the small trained Wan that comes along",
    )
    model.add_argument("--variant", metavar="NAME", help="of the weight files, such as fp16")
    model.add_argument("--revision", metavar="REV", help="of a hub id: branch, tag or commit")
    model.add_argument(
        "--dtype",
        action="append",
        metavar="DTYPE",
        help="to load the weights in (default: bfloat16); COMPONENT=DTYPE for one component, such as vae=float32; "
        "repeat for more",
    )
    model.add_argument("--device", metavar="DEVICE", help="default: cuda where there is one, else cpu")
    model.add_argument(
        "--offload",
        choices=OFFLOAD,
        default="none",
        help="keep weights on the CPU until they are needed: whole models, single layers, or single layers with the "
        "next brought in meanwhile, but beside a step cache (default: %(default)s)",
    )
    model.add_argument(
        "--compile",
        choices=COMPILE,
        default="none",
        help="torch.compile the transformers' blocks, or the transformers as a whole, in which nothing can be cached "
        "(default: %(default)s)",
    )

    call = parser.add_argument_group("what to generate; what is not given is as the pipeline has it by default")
    call.add_argument("--prompt", metavar="TEXT")
    call.add_argument("--negative-prompt", metavar="TEXT")
    call.add_argument("--image", type=Path, metavar="FILE", help="a picture to begin with, for image-to-video")
    call.add_argument("--height", type=whole_number(1), metavar="PIXELS")
    call.add_argument("--width", type=whole_number(1), metavar="PIXELS")
    call.add_argument("--frames", type=whole_number(1), metavar="N", help="of a video")
    call.add_argument("--steps", type=whole_number(1), metavar="N", help="denoising steps")
    call.add_argument("--guidance", type=number, metavar="SCALE")
    call.add_argument("--seed", type=seed, default=0, metavar="S", help="of the noise (default: %(default)s)")
    call.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="whatever else the pipeline's __call__ takes; repeat for more",
    )

    result = parser.add_argument_group("what comes of it")
    result.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=".mp4 or .gif; .png: the picture, or a contact sheet of a video; a name without ending: a folder with "
        "every frame (default: dit-patch.mp4, or dit-patch.png for a picture)",
    )
    result.add_argument(
        "--fps", type=positive_number, default=16.0, metavar="N", help="of the file (default: %(default)g)"
    )
    result.add_argument(
        "--compare",
        action="store_true",
        help="generate without and with patches, from the same seed, and say whether the frames are identical; status "
        "1 where they should be and are not",
    )
    flags.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    from ..pipelines.generate import run_generate

    return run_generate(options)
