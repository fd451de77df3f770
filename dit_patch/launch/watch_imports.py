"""In a process under `dit-patch run`: wait for the modules of the classes that have specs, then watch these classes.

`start` is called before the first of their packages is imported. No torch is imported before one of the modules.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

import wrapt

from ..findings import DitPatchWarning
from .flags import VARIABLES


def start(folder: str, classes: Sequence[str]) -> None:
    """Have the classes with these dotted names watched as soon as their modules are imported.

    Args:
        folder: of the run; the process writes its report there. Where it is "", the report goes where
            `DIT_PATCH_REPORT` says, or to standard error, when the process ends.
        classes: dotted names.
    """
    by_module: dict[str, list[str]] = {}
    for name in classes:
        module, _, attribute = name.rpartition(".")
        by_module.setdefault(module, []).append(attribute)
    for module, names in by_module.items():
        wrapt.register_post_import_hook(functools.partial(_watch_classes, folder, names), module)


def _watch_classes(folder: str, names: list[str], module: ModuleType) -> None:
    try:
        from ..report.journal import journal
        from . import first_forward

        # Under -W error a warning of ours would end the program.
        warnings.filterwarnings("default", category=DitPatchWarning)
        if folder:
            journal.record_in(folder)
        else:
            journal.report_at_exit(os.environ.get(VARIABLES["patch_report"]) or "-")
        for name in names:
            cls = vars(module).get(name)
            if isinstance(cls, type):  # other versions of a library may lack it
                first_forward.watch(cls)
    except Exception as error:
        # wrapt would have the program's import fail.
        print(f"dit_patch: {module.__name__}: {type(error).__name__}: {error}", file=sys.stderr)
        from ..report.journal import journal

        journal.add_failure(", ".join(names), f"{type(error).__name__}: {error}")
