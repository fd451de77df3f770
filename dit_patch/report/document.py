"""The report on one process as a document: plain data as JSON has it, its text, and its file.

The parent of a run puts the documents of many processes together; it imports this, and no torch.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

from ..extras import installed_version
from ..outputs import replacing

REFRESHED = 3.0
"""Seconds between two versions of the file on a process that still runs."""

PATCHED = "patched"
NEVER_CALLED = "made, and never called (or compiled as a whole by torch.compile, which is left alone)"


def process_facts() -> dict[str, Any]:
    """Return what a document says of the process itself."""
    torch = sys.modules.get("torch")
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK")
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "rank": int(rank) if rank and rank.isdigit() else None,
        "world_size": _world_size(),
        "argv": list(getattr(sys, "argv", [])),
        "python": platform.python_version(),
        "versions": {
            "dit_patch": installed_version("dit-patch"),
            "torch": str(getattr(torch, "__version__", "")) or None,
        },
    }


def document_text(document: dict[str, Any]) -> str:
    """Return the report on one process as text."""
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
    if not has_content(document):
        lines.append("nothing patched")
    if document["uncaught"]:
        lines.append(f"ended by {document['uncaught']}"[:300])
    elif not document["ended"]:
        lines.append(f"ended without its last word (killed?): this is up to {REFRESHED:.0f} s older than its end")
    return "\n".join(lines)


def save(path: str, document: dict[str, Any], as_text: Callable[[dict[str, Any]], str]) -> None:
    """Write `document` to a file, whole or not at all: as JSON if the file's name ends so, else as text."""
    content = json.dumps(document, indent=1) if path.endswith(".json") else as_text(document)
    with replacing(path) as draft:
        draft.write_text(content + "\n", encoding="utf-8")


def path_of_process(path: str, *, child: bool = False) -> str:
    """Return this process's file: `report.json`; `report.rank1.json` for a rank, `report.pid42.json` for a child."""
    if path == "-":
        return path
    stem, ending = os.path.splitext(path)
    rank = os.environ.get("RANK", "0")
    if (_world_size() or 1) > 1 and rank != "0":
        stem += f".rank{rank}"
    return f"{stem}.pid{os.getpid()}{ending}" if child else stem + ending


def has_content(document: dict[str, Any]) -> bool:
    """Return whether there is anything to tell of the process."""
    return bool(document["handles"] or document["failures"] or document["models"])


def _rank(document: dict[str, Any]) -> str:
    if document["rank"] is None:
        return ""
    return f", rank {document['rank']}" + (f" of {document['world_size']}" if document["world_size"] else "")


def _world_size() -> int | None:
    """Return the number of ranks, if a launcher has started several."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() else None
