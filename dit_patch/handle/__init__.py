"""One `apply`: what was asked for, the transaction that patches a pipeline, its handle, and the way back.

    handle = apply(pipeline)
    print(handle)
    handle.remove()

`entry` is `apply`, `handle_of` and `remove`.
`options` is what the user asked for, checked once.
`transaction` finds the models that have specs, and patches all of them or none.
`handle` is what the user gets.
`patched_model` is one model of a handle.
`reach` notices which sites the forwards of a model do not reach.
"""

from .entry import apply, handle_of, remove
from .handle import Handle, own_handle
from .options import Options
from .transaction import check_versions, is_installed, patch_models, with_specs

__all__ = [
    "Handle",
    "Options",
    "apply",
    "check_versions",
    "handle_of",
    "is_installed",
    "own_handle",
    "patch_models",
    "remove",
    "with_specs",
]
