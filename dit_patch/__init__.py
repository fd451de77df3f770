"""dit_patch makes existing diffusion transformers faster from outside: one line, the same bits, and a way back.

handle = dit_patch.apply(pipeline)
print(handle)
handle.remove()
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

from .errors import (
    DitPatchError,
    SiteError,
    SpecError,
    StepCacheError,
    UnsupportedModelError,
    VersionError,
)

if TYPE_CHECKING:
    from .handle import Handle, apply
    from .step_cache import StepCache

try:
    __version__ = metadata.version("dit-patch")
except metadata.PackageNotFoundError:  # a plain checkout
    __version__ = "0.0.0"

__all__ = [
    "DitPatchError",
    "Handle",
    "SiteError",
    "SpecError",
    "StepCache",
    "StepCacheError",
    "UnsupportedModelError",
    "VersionError",
    "apply",
]


_WHERE = {"apply": ".handle", "Handle": ".handle", "StepCache": ".step_cache"}


def __getattr__(name: str):
    # torch is imported with the first use, so that the command line starts without it.
    if name in _WHERE:
        return getattr(import_module(_WHERE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
