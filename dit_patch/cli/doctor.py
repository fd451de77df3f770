"""`dit-patch doctor`, see `dit_patch.contribute.doctor`."""

from __future__ import annotations

import argparse
import json


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON, at the end")
    parser.epilog = (
        "The exit status is 1 where something is wrong that can be mended, marked !!: versions that a spec excludes, "
        "faults in the specs of another package, a site that does not fit its model, a kernel that does not compile."
    )


def run(options: argparse.Namespace) -> int:
    from ..contribute.doctor import facts, text

    found, heading = [], None
    for fact in facts():
        found.append(fact)
        if options.json:
            continue
        if fact.heading != heading:
            heading = fact.heading
            print(f"{heading}:")
        print(text(fact), flush=True)
    if options.json:
        print(json.dumps([fact.as_dict() for fact in found], indent=1))
    return int(any(fact.is_fault for fact in found))
