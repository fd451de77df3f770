"""The report on one process as a document: as JSON has it, as it is read, and in a file of its own.

A document is plain data, so that the parent of a run can put those of many processes together. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

REFRESHED = 3.0
"""Seconds between two versions of a file that tells of a process which still runs."""


def text(document: dict[str, Any]) -> str:
    """The report on one process, as it is read."""
    lines = [" ".join(("process", f"{document['pid']}{_rank(document)}:", *document["argv"]))[:160].rstrip()]
    for each in document["handles"]:
        lines.append(each["report"])
        if each["removed"]:
            lines.append("  (taken back before the process ended)")
    for each in document["failures"]:
        lines.append(f"NOT PATCHED: {each['what']}: {each['message']}")
    for each in document["models"]:
        if each["state"] != PATCHED:
            lines.append(f"{each['count']} {each['class'].rpartition('.')[2]}: {each['state']}")
    if not document["handles"] and not document["failures"] and not document["models"]:
        lines.append("nothing patched")
    if document["uncaught"]:
        lines.append(f"ended by {document['uncaught']}"[:300])
    elif not document["ended"]:
        lines.append(f"ended without its last word (killed?): this is up to {REFRESHED:.0f} s older than its end")
    return "\n".join(lines)


PATCHED = "patched"
NEVER_CALLED = "made, and never called (or compiled as a whole by torch.compile, which is left alone)"


def save(path: str, document: dict[str, Any], as_text: Callable[[dict[str, Any]], str]) -> None:
    """Write `document` to a file, whole or not at all: as JSON where its name ends so, else as text."""
    told = json.dumps(document, indent=1) if path.endswith(".json") else as_text(document)
    draft = f"{path}.{os.getpid()}"
    with open(draft, "w", encoding="utf-8") as file:
        file.write(told + "\n")
    os.replace(draft, path)


def own_path(path: str, *, child: bool = False) -> str:
    """The report's file of this process: `report.json`, or `report.rank1.json`, or a child's `report.pid42.json`."""
    if path == "-":
        return path
    stem, ending = os.path.splitext(path)
    rank = os.environ.get("RANK", "0")
    if (world_size() or 1) > 1 and rank != "0":
        stem += f".rank{rank}"
    return f"{stem}.pid{os.getpid()}{ending}" if child else stem + ending


def has_content(document: dict[str, Any]) -> bool:
    """Return whether there is anything to tell of the process."""
    return bool(document["handles"] or document["failures"] or document["models"])


def _rank(document: dict[str, Any]) -> str:
    if document["rank"] is None:
        return ""
    return f", rank {document['rank']}" + (f" of {document['world_size']}" if document["world_size"] else "")


def world_size() -> int | None:
    """Return the number of ranks that a launcher has started, if one has."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() else None
