"""One `apply`: what was asked for, the transaction that patches a pipeline, its handle, and the way back.

    handle = apply(pipeline)
    print(handle)
    handle.remove()

`entry` is `apply`.
`options` is what the user asked for, checked once.
`transaction` finds the models that have specs, and patches all of them or none.
`handle` is what the user gets.
`patched_model` is one model of a handle.
`reach` notices which sites the forwards of a model do not reach.
"""

from .entry import apply
from .handle import Handle, handle_of
from .options import Options
from .transaction import check_versions, patch_models, with_specs

__all__ = ["Handle", "Options", "apply", "check_versions", "handle_of", "patch_models", "with_specs"]
