"""The `dit-patch` command. Starts without torch; each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import DitPatchError
from .registry import Registry

_AB = "bench step-cache"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dit-patch`; the exit status is 0 when everything went well, 1 after a result or an error that says no."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:2] == _AB.split():  # a command of two words, beside `bench NAME`
        arguments[:2] = [_AB]
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except DitPatchError as error:
        print(f"dit-patch: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dit-patch",
        description="Makes existing diffusion transformers faster from outside: one line, the same bits, a way back.",
        epilog="In a program of your own: handle = dit_patch.apply(pipeline); print(handle); handle.remove()",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    listing = command("list", _list, "the models that there are specs for")
    show = command("show", _show, "one spec: its model, its sites and what their results depend on")
    show.add_argument("name", metavar="NAME", help="as `dit-patch list` prints it, such as diffusers/wan")
    for each in (listing, show):
        each.add_argument("--spec-dir", action="append", default=[], metavar="DIR", help="another directory with specs")
        each.add_argument("--trust-specs", action="store_true", help="let those specs name code of their own")

    command("schema", _schema, "the JSON Schema of a spec, for your editor")

    demo = command("demo", _demo, "generate with small real pipelines, unpatched and patched, and compare the frames")
    demo.add_argument("--out", type=Path, default=Path("dit-patch-demo"), metavar="DIR", help="default: %(default)s")
    demo.add_argument("--steps", type=int, default=8, metavar="N", help="denoising steps (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, metavar="S", help="of weights and noise (default: %(default)s)")

    bench = command("bench", _bench, "measure what patching saves: hit cost, site times at real sizes, whole forwards")
    bench.add_argument(
        "specs", nargs="*", metavar="NAME", help="specs, such as diffusers/wan, or libraries, such as fastvideo"
    )
    bench.add_argument(
        "--only", action="append", choices=("hits", "sites", "kernels", "forwards"), help="one part; repeat for more"
    )
    bench.add_argument("--device", default=None, metavar="DEVICE", help="default: cuda where there is one, else cpu")
    bench.add_argument("--csv", type=Path, metavar="FILE", help="also write every row, with the environment, to FILE")
    bench.add_argument("--seconds", type=float, default=0.5, metavar="S", help="least time per figure (default: 0.5)")

    ab = command(
        _AB, _bench_step_cache, "what step caching gains and costs: baseline and cached side by side, with controls"
    )
    ab.add_argument(
        "--model",
        default="shapes",
        metavar="PATH",
        help="a diffusers pipeline, folder or hub id; or `shapes`, the small trained Wan that comes along (default)",
    )
    ab.add_argument("--prompt", action="append", metavar="TEXT", help="repeat for more; `shapes` has its own")
    ab.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt per line")
    ab.add_argument(
        "--preset",
        action="append",
        metavar="NAME",
        help="quality, balanced, performance; repeat for more (default: all)",
    )
    ab.add_argument(
        "--threshold",
        type=float,
        action="append",
        metavar="R",
        help="a threshold to sweep; repeat for more, all else as in the (first) preset",
    )
    ab.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KNOB=VALUE",
        help="any knob of StepCache, for every variant; repeat for more",
    )
    ab.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what else to call the pipeline with, such as height=480",
    )
    ab.add_argument("--steps", type=int, default=30, metavar="N", help="denoising steps (default: %(default)s)")
    ab.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="of the first prompt, the next has the next (default: %(default)s)",
    )
    ab.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="times each generation is timed (default: %(default)s)"
    )
    ab.add_argument(
        "--beside-cache-dit", action="store_true", help="also drive cache-dit itself, on copies of the transformers"
    )
    ab.add_argument("--device", default=None, metavar="DEVICE", help="default: cuda where there is one, else cpu")
    ab.add_argument(
        "--dtype",
        default="bfloat16",
        metavar="DTYPE",
        help="to load a model in (default: %(default)s; `shapes` is float32)",
    )
    ab.add_argument("--out", type=Path, default=Path("step-cache-report"), metavar="DIR", help="default: %(default)s")
    return parser


def _list(options: argparse.Namespace) -> int:
    specs = list(Registry(options.spec_dir, trust=options.trust_specs))
    width = max(len(spec.name) for spec in specs)
    kinds = [", ".join(dict.fromkeys(site.kind for site in spec.sites)) for spec in specs]
    middle = max(map(len, kinds))
    for spec, kind in zip(specs, kinds):
        classes = ", ".join(name.rpartition(".")[2] for name in spec.classes)
        print(f"{spec.name:<{width}}  {kind:<{middle}}  {classes}")
    return 0


def _show(options: argparse.Namespace) -> int:
    spec = Registry(options.spec_dir, trust=options.trust_specs).get(options.name)
    print(f"{spec.name}  ({spec.path})")
    for name in spec.classes:
        print(f"  model     {name}")
    if spec.requires:
        print(f"  requires  {', '.join(spec.requires)}")
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


def _schema(options: argparse.Namespace) -> int:
    from .spec import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    return demo.run(options.out, steps=options.steps, seed=options.seed)


def _bench(options: argparse.Namespace) -> int:
    from . import bench

    return bench.run(
        parts=options.only or bench.PARTS,
        specs=options.specs,
        device=options.device,
        csv=options.csv,
        seconds=options.seconds,
    )


def _bench_step_cache(options: argparse.Namespace) -> int:
    from .step_cache import command

    return command.run(options)


if __name__ == "__main__":
    sys.exit(main())
