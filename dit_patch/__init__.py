"""dit_patch makes existing diffusion transformers faster from outside: one line, the same bits, and a way back.

handle = dit_patch.apply(pipeline)
print(handle)
handle.remove()
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import DitPatchError, SiteError, SpecError, StepCacheError, UnsupportedModelError, VersionError

if TYPE_CHECKING:
    from .handle import Handle, apply, handle_of, remove
    from .launch.flags import add_arguments, from_args
    from .step_cache import StepCache

    __version__: str

__all__ = [
    "DitPatchError",
    "Handle",
    "SiteError",
    "SpecError",
    "StepCache",
    "StepCacheError",
    "UnsupportedModelError",
    "VersionError",
    "add_arguments",
    "apply",
    "from_args",
    "handle_of",
    "remove",
]


# `apply` and its like come with what knows of worker processes, which has registered there.
_MODULES = {
    "Handle": ".handle",
    "StepCache": ".step_cache",
    "add_arguments": ".launch.flags",
    "apply": ".launch.workers",
    "from_args": ".launch.flags",
    "handle_of": ".launch.workers",
    "remove": ".launch.workers",
}


def __getattr__(name: str):
    # torch is imported with the first use, so that the command line starts without it.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    if name == "__version__":
        return import_module(".extras", __name__).installed_version("dit-patch")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
