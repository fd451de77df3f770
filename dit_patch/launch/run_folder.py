"""The names that both sides of `dit-patch run` use: environment variables, and files in the folder of a run.

`site/sitecustomize.py` repeats them, since it may run where dit_patch cannot be imported.
"""

from __future__ import annotations

from pathlib import Path

SITE = Path(__file__).with_name("site")
FOLDER, STRICT = "DIT_PATCH_RUN", "DIT_PATCH_RUN_STRICT"
CLASSES_VARIABLE = "DIT_PATCH_CLASSES"  # what is in CLASSES, for machines that may not have the folder
AUDIT = "DIT_PATCH_AUDIT"  # in place of all of these: the folder of an audit
CLASSES = "classes"  # dotted names of the classes to watch, one a line
PYTHONS = "python-*"  # an empty file from each Python process that has read CLASSES
UNREACHABLE = "unreachable-*"  # the message of each interpreter that has no dit_patch
REPORTS = "*.json"  # the document that `dit_patch.report.journal` writes for each process
