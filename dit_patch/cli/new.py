"""`dit-patch new`, see `dit_patch.contribute.new`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="CLASS", help="the dotted name of the model's class, package.module.Class")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there, a .yaml, rather than print it")
    parser.add_argument(
        "--mini", type=Path, metavar="FILE", help="take `mini` from this spec, where the guessed one did not run"
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.epilog = (
        "A tiny model is built with random weights and run, and the calls whose results repeat are proposed as sites, "
        "each with a key. Then: read, prune, `dit-patch check FILE`. CONTRIBUTING.md goes through one addition from "
        "beginning to end."
    )


def run(options: argparse.Namespace) -> int:
    import torch

    from ..contribute.new.draft import draft
    from ..contribute.new.write import spec_text
    from ..errors import DitPatchError, quote
    from ..spec.registry import Registry
    from ..upstream.verbosity import quiet_upstream

    if options.out is not None and options.out.exists() and not options.force:
        raise DitPatchError(f"--out: {quote(options.out)} exists; --force overwrites it")
    given = None
    if options.mini is not None:
        given = Registry(trust=True).read(options.mini).mini
        if given is None:
            raise DitPatchError(f"--mini: {quote(options.mini)} has no `mini`")
    torch.set_num_threads(1)
    with quiet_upstream():
        made = draft(options.model, given)
    text = spec_text(made)
    if options.out is None:
        print(text, end="")
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
        lists = f"{len(made.blocks)} list{'' if len(made.blocks) == 1 else 's'} of blocks"
        print(f"{options.out}: {len(made.sites)} site{'' if len(made.sites) == 1 else 's'}, {lists}")
    if made.problem:
        print(f"dit-patch: the guessed mini did not run: {made.problem}", file=sys.stderr)
    return 0
