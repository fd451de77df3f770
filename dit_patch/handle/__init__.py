"""One `apply`: what was asked for, the transaction that patches a pipeline, its handle, and the way back.

    handle = apply(pipeline)
    print(handle)
    handle.remove()

`entry` has `apply`, `options` what it was asked for, `transaction` patches all models or none, `handle` is what the
user gets, `patched_model` one model of it, and `reach` which of the model's sites its forwards come by.
"""

from .entry import apply
from .handle import Handle, handle_of
from .options import Options
from .transaction import check_versions, patch, with_specs

__all__ = ["Handle", "Options", "apply", "check_versions", "handle_of", "patch", "with_specs"]
