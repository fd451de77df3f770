"""Measures one part of `dit-patch bench here` in this process: `python -m dit_patch.bench.here.child`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ...upstream.verbosity import quiet_upstream
from .parts import PARTS, Setting
from .results import FAILED, SKIPPED, Row, append_row


def main() -> None:
    """Measure the part that the command line names, and add each row to a file as it comes."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("device", type=torch.device)
    parser.add_argument("seconds", type=float)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.device.type == "cpu":
        torch.set_num_threads(1)  # tiny models gain nothing from more
    setting = Setting(given.device, given.seconds, given.tiny)
    try:
        with quiet_upstream(), torch.no_grad():
            for row in PARTS[given.part].measure(given.part, setting):
                append_row(given.rows, row)
    except ImportError as error:
        append_row(given.rows, Row(given.part, note=f"{SKIPPED}: {error}"))
    except torch.OutOfMemoryError:
        append_row(given.rows, Row(given.part, note=f"{SKIPPED}: not enough memory on the device"))
    except Exception as error:
        message = (str(error) or "no message").splitlines()[0]
        append_row(given.rows, Row(given.part, note=f"{FAILED}: {type(error).__name__}: {message}"))


if __name__ == "__main__":
    main()
