"""What a benchmark is run on: the specs that were chosen, the hardware, and the versions of packages."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch

from .. import __version__
from ..errors import DitPatchError
from ..extras import version
from ..handle import check_versions, is_installed
from ..spec.model import Spec
from ..spec.registry import Registry


def choose(registry: Registry, names: Sequence[str] | None) -> list[Spec]:
    """Return the specs of these names or libraries ("fastvideo" for all of `fastvideo/...`); by default all installed.

    Raises:
        SpecError: a name is neither.
        DitPatchError: no name is given, and no library is installed.
        VersionError: a package that one of them needs is not installed.
    """
    if not names:
        chosen = [spec for spec in registry if is_installed(spec)]
        if not chosen:
            raise DitPatchError(
                "nothing to measure, since no library that there are specs for is installed: "
                "pip install 'dit-patch[diffusers]'"
            )
        return chosen
    named: dict[str, Spec] = {}
    for name in names:
        below = [each for each in registry.names() if each.startswith(f"{name}/")]
        named |= {each: registry.get(each) for each in below or (name,)}
    for spec in named.values():
        if not is_installed(spec):
            check_versions(spec, strict=True)  # which says what is missing
    return list(named.values())


def environment(device: str) -> dict[str, str]:
    """Return what a figure depends on besides the code: hardware and versions."""
    cpu = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu
    packages = ("torch", "wrapt", "diffusers", "transformers", "fastvideo")
    versions = {"dit-patch": __version__, **{name: found for name in packages if (found := version(name))}}
    return {"device": name, "threads": str(torch.get_num_threads()), "python": platform.python_version(), **versions}
