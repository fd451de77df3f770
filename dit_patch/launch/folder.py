"""What the two sides of `dit-patch run` share: the names of environment variables, and of files in a folder.

`site/sitecustomize.py` knows them by itself, since it may run where dit_patch cannot be imported.
"""

from __future__ import annotations

from pathlib import Path

SITE = Path(__file__).with_name("site")
FOLDER, STRICT = "DIT_PATCH_RUN", "DIT_PATCH_RUN_STRICT"
CLASSES = "classes"  # the dotted names to watch, a line each
CAME_BY = "python-*"  # an empty file of each process that has read them
UNREACHABLE = "unreachable-*"  # of each interpreter that has no dit_patch: what it said
REPORTS = "*.json"  # what `dit_patch.report.journal` has on a process
