"""`dit-patch audit`, see `dit_patch.contribute.audit`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import quote
from ..launch.flags import add_spec_arguments
from .numbers import whole_number

if TYPE_CHECKING:
    from ..contribute.audit.audit import Audit
    from ..contribute.audit.devices import Device

_EPILOG = """\
examples:
  dit-patch audit diffusers/wan                                    a model that there is a spec for
  dit-patch audit diffusers.SanaVideoTransformer3DModel            any class of models
  dit-patch audit --model ~/Wan2.1-T2V-14B --size f=21,h=90,w=160  a checkpoint's configuration; no weights are read
  dit-patch audit diffusers/wan --out wan.html                     the same as a page, with every line
  dit-patch audit CLASS --write-spec draft.yaml                    a draft of a spec, what is worth most first
  dit-patch audit -- python generate.py                            the models of a program, while it runs
  dit-patch audit --all diffusers --out table.md                   all models of a library, one row each

Without a GPU and without weights. A small model runs with numbers, to see what depends on what; the model at full size
runs in shapes alone, to count. Where there is a spec, both are counted: as the model is, and patched. Times are
estimates from a device's peak figures. With a program, its own forwards are counted, on the device that it uses.

The exit status is 1 where the model could not be run at full size.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "dit-patch audit SPEC | CLASS | --model FOLDER | --all LIBRARY | -- COMMAND ...  [--out FILE] [...]"
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "subject",
        nargs="*",
        metavar="SPEC|CLASS",
        help="a spec, or the dotted name of a class; or, behind --, a COMMAND",
    )
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="a saved model or pipeline of diffusers: its configuration"
    )
    parser.add_argument(
        "--all", choices=("diffusers", "fastvideo"), help="all classes of models of this library, a row of a table each"
    )
    parser.add_argument(
        "--mini", type=Path, metavar="FILE", help="take `mini` from this spec: how to build and call CLASS"
    )
    parser.add_argument("--bench", metavar="NAME", help="the full size that this `bench` case of the spec says")
    parser.add_argument(
        "--config",
        type=_pairs,
        default={},
        metavar="NAME=VALUE,...",
        help="other values of the configuration at full size",
    )
    parser.add_argument(
        "--size",
        type=_sizes,
        default={},
        metavar="NAME=N,...",
        help="other sizes at full size: f, h and w of the latents, tokens, or what the spec's `sizes` have",
    )
    parser.add_argument("--dtype", default="bfloat16", metavar="DTYPE", help="at full size (default: %(default)s)")
    parser.add_argument("--device", default="H100", metavar="NAME", help="to estimate times for (default: %(default)s)")
    parser.add_argument("--max-bytes", type=whole_number(1), metavar="N", help="what all caches may hold together")
    parser.add_argument("--no-patch", action="store_true", help="do not count the same patched")
    parser.add_argument("--write-spec", type=Path, metavar="FILE", help="write a draft of a spec, a .yaml, for CLASS")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write a page (.html), JSON (.json) or, of --all, a table (.md)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite what --write-spec names")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--forwards", type=whole_number(2), default=6, metavar="N", help="of a program's models (default: %(default)s)"
    )
    add_spec_arguments(parser)
    parser.set_defaults(refuse=parser.error)


def run(options: argparse.Namespace) -> int:
    from ..contribute.audit import table
    from ..contribute.audit.devices import device
    from ..contribute.audit.document import check_out
    from ..contribute.audit.worth import check_spec_file

    words = options.subject
    is_command = len(words) > 1 or (len(words) == 1 and shutil.which(words[0]) is not None)
    if sum((bool(words), options.model is not None, options.all is not None)) != 1:
        options.refuse("give one of SPEC, CLASS, --model FOLDER, --all LIBRARY, or -- COMMAND")
    if options.write_spec is not None and (is_command or not words or "." not in words[0]):
        options.refuse("--write-spec drafts a spec for a CLASS, package.module.Class")
    place = device(options.device)
    check_out(options.out, is_table=options.all is not None)
    check_spec_file(options.write_spec, force=options.force)
    if options.all is not None:
        return table.run(options.all, place, options.out, say=_say, as_json=options.json)
    return _program(options, place) if is_command else _model(options, place)


def _model(options: argparse.Namespace, place: Device) -> int:
    from ..contribute.audit import targets
    from ..contribute.audit.audit import audit
    from ..contribute.audit.worth import write_spec
    from ..pipelines import loading
    from ..spec.loading import load_mini
    from ..spec.registry import Registry
    from ..upstream.verbosity import quiet_upstream

    dtype = loading.one_dtype(options.dtype)
    registry = Registry(options.spec_dir, trust=options.trust_specs)
    own = None if options.mini is None else load_mini(options.mini)
    chosen: dict[str, Any] = {"bench": options.bench, "config": options.config, "size": options.size}
    # Some libraries print to standard output when they are imported, where JSON may be wanted.
    with quiet_upstream(), redirect_stdout(sys.stderr):
        if options.model is not None:
            subject = targets.folder_subject(registry, options.model, own, **chosen)
        else:
            subject = targets.subject(registry, options.subject[0], own, **chosen)
        found = audit(subject, dtype=dtype, patch=not options.no_patch, max_bytes=options.max_bytes, say=_say)
        if options.write_spec is not None:
            _say(f"{subject.name}: a draft of a spec ...")
            write_spec(options.write_spec, options.subject[0], own, found, place)
            _say(str(options.write_spec))
    _show(options, [found], place)
    return int(not found.is_full_size)


def _program(options: argparse.Namespace, place: Device) -> int:
    from ..contribute.audit.program import audit_program
    from ..launch.run_command import CommandError

    try:
        found, status = audit_program(options.subject, options.forwards, patch=not options.no_patch)
    except CommandError as error:
        print(f"dit-patch audit: {error}", file=sys.stderr)
        return error.status
    if not found:
        print(
            "dit-patch audit: no model with a list of blocks ran three forwards in this command; its models must run "
            "in Python processes that can import dit_patch",
            file=sys.stderr,
        )
        return status or 1
    _show(options, found, place)
    return status


def _show(options: argparse.Namespace, found: list[Audit], place: Device) -> None:
    from ..contribute.audit.document import as_dict, write_out
    from ..contribute.audit.text import audit_text

    if options.out is not None:
        for path in write_out(options.out, found, place):
            _say(str(path))
    if options.json:
        parts = [as_dict(each, place) for each in found]
        print(json.dumps(parts[0] if len(parts) == 1 else parts, indent=1))
    else:
        print("\n\n".join(audit_text(each, place) for each in found))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _pairs(text: str) -> dict[str, Any]:
    """Read NAME=VALUE,..., each value as YAML has it; commas inside of brackets belong to a value."""
    try:
        found = yaml.safe_load("{" + text.replace("=", ": ") + "}")
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or any(value is None for value in found.values()):
        raise argparse.ArgumentTypeError(f"{quote(text)} is not NAME=VALUE, or several with commas between them")
    return found


def _sizes(text: str) -> dict[str, int]:
    found = _pairs(text)
    for name, value in found.items():
        if type(value) is not int or value < 1:
            raise argparse.ArgumentTypeError(f"{quote(f'{name}={value}')} is no whole number from 1 on")
    return found
