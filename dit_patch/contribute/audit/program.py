"""`dit-patch audit -- COMMAND`: run a program as it is, and audit the models in its processes while it runs."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...launch.run_command import python_path, wait_for
from ...launch.run_folder import AUDIT
from .audit import Audit
from .live import audit_of
from .watching import FORWARDS, FOUND, PATCH


def audit_program(command: Sequence[str], forwards: int, *, patch: bool) -> tuple[list[Audit], int]:
    """Run the command; return an audit of each of its models, and its exit status.

    Args:
        command: with its arguments.
        forwards: how many of each model are recorded, plain and then patched.
        patch: patch the models that there are specs for.
    """
    folder = Path(tempfile.mkdtemp(prefix="dit-patch-audit-"))
    try:
        own = {AUDIT: str(folder), FORWARDS: str(forwards), PATCH: "1" if patch else "0"}
        environment = {**os.environ, **python_path(os.environ), **own}
        status = wait_for(command, environment)
        # Written by our own processes into a folder of our own, so pickle's dangers are not ours.
        found = [pickle.loads(each.read_bytes()) for each in sorted(folder.glob(FOUND))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [audit_of(each) for each in found], status
