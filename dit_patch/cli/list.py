"""`dit-patch list`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..launch.flags import add_spec_arguments

if TYPE_CHECKING:
    from ..spec.model import Spec


def arguments(parser: argparse.ArgumentParser) -> None:
    add_spec_arguments(parser)
    parser.add_argument("--json", action="store_true", help="as JSON, with paths, whole class names and requirements")
    parser.add_argument(
        "--strict", action="store_true", help="a fault in the specs of an installed package is an error, not a warning"
    )


def run(options: argparse.Namespace) -> int:
    from ..spec.registry import Registry

    specs = list(Registry(options.spec_dir, trust=options.trust_specs, strict=options.strict))
    if options.json:
        print(json.dumps([_as_dict(spec) for spec in specs], indent=1))
        return 0
    width = max(len(spec.name) for spec in specs)
    kinds = [", ".join(dict.fromkeys(site.kind for site in spec.sites)) for spec in specs]
    middle = max(map(len, kinds))
    for spec, kind in zip(specs, kinds):
        classes = ", ".join(name.rpartition(".")[2] for name in spec.classes)
        print(f"{spec.name:<{width}}  {kind:<{middle}}  {classes}{'  (off by default)' if spec.off_by_default else ''}")
    return 0


def _as_dict(spec: Spec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "path": str(spec.path),
        "classes": list(spec.classes),
        "kinds": list(dict.fromkeys(site.kind for site in spec.sites)),
        "requires": list(spec.requires),
        "off_by_default": spec.off_by_default,
    }
