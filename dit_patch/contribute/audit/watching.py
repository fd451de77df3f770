"""In a process of somebody else's program: audit its models while they run, and leave what was found in a folder.

A model is audited if it is called by the program itself, and has a list of blocks. Its first forward is let pass; the
next ones are recorded, on whatever device they run. If there is a spec, it is then patched, and as many are recorded
again. No torch is imported before the program imports it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    import torch

FORWARDS, PATCH = "DIT_PATCH_AUDIT_FORWARDS", "DIT_PATCH_AUDIT_PATCH"
FOUND = "audit-*.pickle"


def start(folder: str) -> None:
    """Have the models of this process audited from when torch is imported on, and the findings written to `folder`."""
    wrapt.register_post_import_hook(lambda module: _Watcher(Path(folder)).install(), "torch")


class _Watcher:
    """Finds the models that the program calls itself, and has each audited."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.audited: dict[int, Any] = {}
        self._depth = threading.local()

    def __repr__(self) -> str:
        return f"<_Watcher of {len(self.audited)} models>"

    def install(self) -> None:
        """Hook the calls of all modules."""
        from torch.nn.modules import module

        from ...sites.scope import Hook

        module.register_module_forward_pre_hook(Hook(self._enter, self))
        module.register_module_forward_hook(Hook(self._leave, self), always_call=True)
        atexit.register(self._write)

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        depth = getattr(self._depth, "value", 0)
        self._depth.value = depth + 1
        if not depth and id(module) not in self.audited:
            self.audited[id(module)] = self._audit(module)

    def _leave(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        self._depth.value = max(0, getattr(self._depth, "value", 1) - 1)

    def _audit(self, module: torch.nn.Module) -> Any:
        from ..new.observe import block_lists
        from .live import LiveAudit

        if next(block_lists(module), None) is None:
            return None
        with contextlib.suppress(Exception):  # what cannot be audited runs on all the same
            return LiveAudit(module, int(os.environ.get(FORWARDS, "6")), patch=os.environ.get(PATCH) != "0")

    def _write(self) -> None:
        for number, each in enumerate(filter(None, self.audited.values())):
            found: Mapping[str, Any] | None = each.found()
            if found is not None:
                path = self.folder / f"audit-{os.getpid()}-{number}.pickle"
                path.with_suffix(".part").write_bytes(pickle.dumps(found))
                path.with_suffix(".part").replace(path)
