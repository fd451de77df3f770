"""`dit-patch schema`."""

from __future__ import annotations

import argparse
import json


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> int:
    from ..spec.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
