"""Numbers on the command line: types for argparse, which refuse what no command can use before anything begins."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from ..errors import quote

LARGEST_SEED = 2**63 - 1  # of torch's generators


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a type for whole numbers from `least` on."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{quote(text)} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{quote(text)} is less than {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{quote(text)} is more than {most}")
        return value

    return read


def seed(text: str) -> int:
    """Read a seed."""
    return whole_number(0, LARGEST_SEED)(text)


def number(text: str) -> float:
    """Read a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{quote(text)} is no number")
    return value


def positive_number(text: str) -> float:
    """Read a finite number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{quote(text)} is not above 0")
    return value
