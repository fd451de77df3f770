"""`dit-patch list`."""

from __future__ import annotations

import argparse

from ..launch.flags import add_spec_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    add_spec_arguments(parser)


def run(options: argparse.Namespace) -> int:
    from ..spec.registry import Registry

    specs = list(Registry(options.spec_dir, trust=options.trust_specs))
    width = max(len(spec.name) for spec in specs)
    kinds = [", ".join(dict.fromkeys(site.kind for site in spec.sites)) for spec in specs]
    middle = max(map(len, kinds))
    for spec, kind in zip(specs, kinds):
        classes = ", ".join(name.rpartition(".")[2] for name in spec.classes)
        print(f"{spec.name:<{width}}  {kind:<{middle}}  {classes}{'  (off by default)' if spec.off_by_default else ''}")
    return 0
