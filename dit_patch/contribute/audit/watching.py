"""In a process of somebody else's program: audit its models while they run, and leave what was found in a folder.

A model is audited if it is called by the program itself, and has a list of blocks. Its first forward is let pass; the
next ones are recorded, on whatever device they run. If there is a spec, it is then patched, and as many are recorded
again. No torch is imported before the program imports it.
"""

from __future__ import annotations

import atexit
import os
import pickle
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    import torch

    from .live import LiveAudit

FORWARDS, PATCH = "DIT_PATCH_AUDIT_FORWARDS", "DIT_PATCH_AUDIT_PATCH"
FOUND = "audit-*.pickle"


def start(folder: str) -> None:
    """Have the models of this process audited from when torch is imported on, and the findings written to `folder`."""
    wrapt.register_post_import_hook(lambda module: _Watcher(Path(folder)).install(), "torch")


class _Watcher:
    """Finds the models that the program calls itself, and has each audited."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.audits: list[LiveAudit] = []
        self._seen: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._depth = threading.local()

    def __repr__(self) -> str:
        return f"<_Watcher of {len(self.audits)} models>"

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
        if not depth and module not in self._seen:
            self._seen.add(module)
            self._audit(module)

    def _leave(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        self._depth.value = max(0, getattr(self._depth, "value", 1) - 1)

    def _audit(self, module: torch.nn.Module) -> None:
        from ...upstream.torch_internals import is_compiled
        from ..new.observe import block_lists
        from .live import LiveAudit

        if next(block_lists(module), None) is None:
            return
        name = type(module).__name__
        if any(map(is_compiled, module.modules())):
            _say(f"{name} is compiled, and what compiled code does cannot be seen; audit it uncompiled")
            return
        try:
            audit = LiveAudit(module, int(os.environ.get(FORWARDS, "6")), patch=os.environ.get(PATCH) != "0")
        except Exception as error:  # the program runs on all the same
            _say(f"{name} cannot be audited: {type(error).__name__}: {error}")
        else:
            self.audits.append(audit)

    def _write(self) -> None:
        for number, each in enumerate(self.audits):
            try:
                found = each.found()
                if found is not None:
                    draft = self.folder / f"audit-{os.getpid()}-{number}.part"
                    draft.write_bytes(pickle.dumps(found))
                    draft.replace(draft.with_suffix(".pickle"))
            except Exception as error:  # the program has ended; nobody else would say so
                _say(f"{each!r}: {type(error).__name__}: {error}")


def _say(message: str) -> None:
    print(f"dit_patch audit: {message}", file=sys.stderr, flush=True)
