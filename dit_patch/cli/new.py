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
        "each with a key. The exit status is 1 where there is nothing to propose: the file then says why, and what to "
        "mend in its `mini`. Then: read, prune, `dit-patch check FILE`. CONTRIBUTING.md goes through one addition from "
        "beginning to end."
    )


def run(options: argparse.Namespace) -> int:
    import torch

    from ..contribute.new.draft import draft
    from ..contribute.new.write import spec_text
    from ..errors import DitPatchError, quote
    from ..outputs import check_file, replacing, write_errors
    from ..spec.loading import load_mini
    from ..upstream.verbosity import quiet_upstream

    check_file("--out", options.out)
    if options.out is not None and options.out.exists() and not options.force:
        raise DitPatchError(f"--out: {quote(options.out)} exists; --force overwrites it")
    given = None
    if options.mini is not None:
        given = load_mini(options.mini)
    torch.set_num_threads(1)
    with quiet_upstream():
        made = draft(options.model, given)
    text = spec_text(made)
    if options.out is None:
        print(text, end="")
    else:
        with write_errors("--out", options.out), replacing(options.out) as draft_file:
            draft_file.write_text(text, encoding="utf-8")
        lists = f"{len(made.blocks)} list{'' if len(made.blocks) == 1 else 's'} of blocks"
        print(f"{options.out}: {len(made.sites)} site{'' if len(made.sites) == 1 else 's'}, {lists}")
    if made.problem:
        whose = "given" if made.own_mini else "guessed"
        file = options.out or "FILE"
        print(
            f"dit-patch: the {whose} mini did not run: {made.problem}\n"
            f"    Mend `mini` in {file}, then: dit-patch new {options.model} --mini {file} --out {file} --force",
            file=sys.stderr,
        )
    elif not made.sites:
        print("dit-patch: no call was seen to repeat, so there is nothing to propose", file=sys.stderr)
    for fault in made.faults:
        print(f"dit-patch: check finds: {fault}", file=sys.stderr)
    return int(bool(made.problem or made.faults or not made.sites))
