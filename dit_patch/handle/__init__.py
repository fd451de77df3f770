"""One `apply`: the transaction that patches a pipeline, its handle, and the way back."""

from .handle import (
    Handle,
    Options,
    apply,
    check_versions,
    handle_of,
    patch,
    with_specs,
)

__all__ = ["Handle", "Options", "apply", "check_versions", "handle_of", "patch", "with_specs"]
