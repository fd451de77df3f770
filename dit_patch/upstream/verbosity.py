"""Upstream's advice about half-built or unusual models, which is not for whoever watches ours being built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module


@contextmanager
def quiet_upstream() -> Iterator[None]:
    """Only errors are logged by diffusers and transformers, where there are any."""
    with ExitStack() as undo:
        for name in ("diffusers.utils.logging", "transformers.utils.logging"):
            try:
                logging = import_module(name)
            except ImportError:
                continue
            undo.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
        yield
