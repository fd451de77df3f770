"""`dit-patch show`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ..launch.flags import add_spec_arguments

if TYPE_CHECKING:
    from ..spec.model import Spec


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="as `dit-patch list` prints it, such as diffusers/wan")
    parser.add_argument(
        "--live", action="store_true", help="also patch the spec's small model, call it, and explain each site's calls"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, in the words of a spec's file")
    add_spec_arguments(parser)


def run(options: argparse.Namespace) -> int:
    from ..spec.registry import Registry

    spec = Registry(options.spec_dir, trust=options.trust_specs).get(options.name)
    if options.json:
        content = spec.model_dump(mode="json", exclude_unset=True)
        live = {"live": _live(spec)} if options.live else {}
        print(json.dumps({"name": spec.name, "path": str(spec.path), **content, **live}, indent=1))
        return 0
    print(f"{spec.name}  ({spec.path})")
    for name in spec.classes:
        print(f"  model     {name}")
    if spec.requires:
        print(f"  requires  {', '.join(spec.requires)}")
    if spec.off_by_default:
        print(f"  off       by default: {spec.off_by_default}\n            only={[spec.name]} asks for it")
    for blocks in spec.blocks:
        print(f"  blocks    {blocks.at}, pattern {blocks.pattern}")
    rule = spec.step_cache
    if rule is not None:
        few = f", from {rule.min_steps} steps" if rule.min_steps else ""
        print(f"  stepping  {f'cacheable{few}' if rule.supported else f'not cacheable: {rule.reason}'}")
    for site in spec.sites:
        print(f"\n  {site.at}")
        print(f"    kind      {site.kind}{', optional' if site.optional else ''}")
        for name, facets in site.key.items():
            print(f"    key       {name}: {', '.join(facets)}")
        for word in ("use", "then", "device", "dtype"):
            if getattr(site, word):
                print(f"    {word:<8}  {getattr(site, word)}")
        for word in ("reads", "clears"):
            if getattr(site, word):
                print(f"    {word:<8}  {', '.join(getattr(site, word))}")
        for name, source in site.bind.items():
            print(f"    bind      {name} = {source} (with fixes=True)")
        if site.unused:
            print("    unused    the result is never read; a stand-in is returned")
        if site.unused_with:
            print(f"    unused    with {', '.join(site.unused_with)}: a stand-in is returned")
    if options.live:
        print(f"\n{_live(spec)}")
    return 0


def _live(spec: Spec) -> str:
    """Return how the sites did in a generation of two steps on the spec's small model."""
    import torch

    from ..handle import apply, check_versions
    from ..spec import mini

    check_versions(spec, strict=True)
    case = spec.mini.case()
    model = mini.build(spec, case)
    with torch.no_grad(), apply(model, only=[spec.name]) as handle:
        for arguments in mini.repeat(mini.forwards(case, case.sizes[0], steps=2)):
            model(**arguments)
        return handle.explain()
