"""`dit-patch check`, see `dit_patch.contribute.check`."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from ..launch.flags import add_spec_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help="a YAML file, or a name such as diffusers/wan")
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="try it on the weights in this folder (a saved model or pipeline) rather than on the spec's mini",
    )
    subject.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="try it on this configuration (a checkpoint's config.json), made small, with random weights",
    )
    parser.add_argument("--device", default=None, metavar="DEVICE", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--dtype", default="bfloat16", metavar="DTYPE", help="to load --model in (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON, at its end")
    add_spec_arguments(parser)
    parser.epilog = (
        "The exit status is 1 where anything is wrong: a key that is too coarse, an address or argument that does not "
        "exist, a site that is never reached or never hits, a block pattern of other blocks, a replacement that is not "
        "equal. Minis say nothing of speed at real size; `dit-patch bench` does."
    )


def run(options: argparse.Namespace) -> int:
    import torch

    from ..contribute.check import cases
    from ..contribute.check.text import result_text
    from ..contribute.check.trial import try_spec
    from ..pipelines import loading
    from ..spec.registry import Registry
    from ..upstream.verbosity import quiet_upstream

    registry = Registry(options.spec_dir, trust=options.trust_specs)
    is_file = options.spec.endswith((".yaml", ".yml")) or Path(options.spec).is_file()
    spec = registry.read(options.spec) if is_file else registry.get(options.spec)
    dtype, device = loading.one_dtype(options.dtype), loading.device(options.device)
    if options.model is not None:
        subjects = [cases.from_weights(spec, options.model, dtype)]
    elif options.config is not None:
        subjects = [cases.from_config(spec, options.config)]
    else:
        subjects = cases.minis(spec)
    if options.model is None:
        torch.set_num_threads(1)  # minis are too small to share
    say = partial(print, file=sys.stderr if options.json else sys.stdout, flush=True)
    say(f"{spec.name}  ({spec.path})\n{', '.join(name.rpartition('.')[2] for name in spec.classes)}\n")
    with quiet_upstream():
        result = try_spec(spec, subjects, device=device, say=say)
    print(json.dumps(result.as_dict(), indent=1) if options.json else f"\n{result_text(result)}")
    return 1 if result.problems else 0
