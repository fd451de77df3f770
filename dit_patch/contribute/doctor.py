"""`dit-patch doctor`: what this environment has, and what `apply` would do with the models that can be made in it."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import DitPatchError
from ..extras import installed_version, version
from ..findings import DitPatchWarning, FindingKind
from ..handle import apply, check_versions, is_installed
from ..rotary import has_triton, rotary
from ..spec import mini
from ..spec.model import Spec
from ..spec.registry import Registry
from ..upstream.verbosity import quiet_upstream

_PACKAGES = ("diffusers", "fastvideo", "transformers", "accelerate", "peft", "cache-dit", "triton", "pydantic", "wrapt")
_IN_ORDER = {FindingKind.ABSENT, FindingKind.ABSENT_STAGE, FindingKind.STAND_IN, FindingKind.NOT_CALLED}


@dataclass(frozen=True)
class Fact:
    """One line: under a heading, what it is about and how it is with that.

    `is_fault` says that something is wrong which somebody can mend; what is merely not installed is no fault.
    """

    heading: str
    what: str
    state: str
    is_fault: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the fact as JSON can hold it."""
        return asdict(self)


def facts() -> Iterator[Fact]:
    """Yield everything that there is to say, as it is found out; the models take the time."""
    yield Fact("environment", "dit_patch", installed_version("dit-patch"))
    yield Fact("environment", "python", f"{platform.python_version()}, {sys.executable}")
    yield Fact("environment", "platform", platform.platform())
    yield Fact("environment", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield from _devices()
    for name in sorted(os.environ):
        if name.startswith("DIT_PATCH_"):
            yield Fact("environment", name, os.environ[name])
    for package in _PACKAGES:
        yield Fact("packages", package, version(package) or "not installed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DitPatchWarning)
        registry = Registry()
        try:
            specs = [*registry]
            registry.classes()
        except DitPatchError as error:
            yield Fact("specs", "all", str(error), is_fault=True)
            return
    for each in caught:
        if isinstance(each.message, DitPatchWarning):
            finding = each.message.finding
            yield Fact("specs of other packages", finding.site, finding.detail, is_fault=True)
    for spec in specs:
        yield _model(spec)


def _devices() -> Iterator[Fact]:
    if not torch.cuda.is_available():
        yield Fact("environment", "GPU", "torch finds none: everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield Fact("environment", f"cuda:{index}", f"{properties.name}, {memory:.0f} GiB, CUDA {torch.version.cuda}")
    yield _kernel()


def _kernel() -> Fact:
    """Say whether the rotation's kernel compiles and gives the bits of plain torch."""
    what = "rotary kernel"
    if not has_triton():
        return Fact("environment", what, "Triton is missing: plain torch is used", is_fault=True)
    angles = torch.randn(16, 64)
    tensors = torch.randn(1, 16, 2, 64), angles.cos(), angles.sin()
    try:
        same = torch.equal(rotary(*(each.cuda() for each in tensors)).cpu(), rotary(*tensors))
    except Exception as error:  # of the compiler, whatever it is
        return Fact("environment", what, f"does not compile: {type(error).__name__}: {error}"[:300], is_fault=True)
    return Fact("environment", what, "compiles, same bits as on the CPU" if same else "NOT the same bits", not same)


def _model(spec: Spec) -> Fact:
    """Say what `apply` would do with the spec's model, tried on a tiny one."""
    heading = "models, and what apply() does with them"
    try:
        check_versions(spec, strict=True)
    except DitPatchError as error:
        problem = str(error).removeprefix(f"{spec.name} ")
        return Fact(heading, spec.name, problem, is_fault=is_installed(spec))
    if spec.mini is None:
        return Fact(heading, spec.name, "has no mini to try it on")
    try:
        with quiet_upstream(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = mini.build(spec, spec.mini.case())
            with apply(model, only=[spec.name]) as handle:
                rows = handle.stats()
    except Exception as error:  # of the library, whatever it is
        return Fact(heading, spec.name, f"{type(error).__name__}: {error}"[:400], is_fault=True)
    notes = [f"{row.at}: {each.note}" for row in rows for each in row.findings if each.kind not in _IN_ORDER]
    here = sum(all(each.kind not in _IN_ORDER for each in row.findings) for row in rows)
    state = f"patches {here} of {len(rows)} sites of a tiny {spec.classes[0].rpartition('.')[2]}"
    if spec.off_by_default:
        state = f"off by default; only=[{spec.name!r}] {state}"
    return Fact(heading, spec.name, "; ".join([state, *notes]), is_fault=bool(notes))


def text(fact: Fact) -> str:
    """Return the fact as a line below its heading."""
    first, *rest = fact.state.splitlines() or [""]
    mark = "!!" if fact.is_fault else "  "
    return "\n".join([f"{mark} {fact.what:<34} {first}", *(f"   {'':<34} {line.strip()}" for line in rest)])
