"""`dit-patch report`: what the processes have left that others started with the variables of `run --print-env`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of `run --print-env --patch-report FOLDER`")
    parser.add_argument("--json", action="store_true", help="as JSON, as `run --patch-report FILE.json` writes it")


def run(options: argparse.Namespace) -> int:
    from ..errors import DitPatchError, quote
    from ..launch.summary import Summary

    if not options.folder.is_dir():
        raise DitPatchError(f"FOLDER: {quote(options.folder)}: there is no such folder")
    summary = Summary.from_folder(options.folder, (), 0)
    print(json.dumps(summary.document, indent=1) if options.json else summary)
    return int(summary.verdict is not None)
