"""`dit-patch show`."""

from __future__ import annotations

import argparse

from ..launch.flags import add_spec_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="as `dit-patch list` prints it, such as diffusers/wan")
    add_spec_arguments(parser)


def run(options: argparse.Namespace) -> int:
    from ..spec.registry import Registry

    spec = Registry(options.spec_dir, trust=options.trust_specs).get(options.name)
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
    return 0
