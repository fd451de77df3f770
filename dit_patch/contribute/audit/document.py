"""An audit as JSON, and the file that has it, or its page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import extras
from ...errors import DitPatchError, quote
from ...outputs import check_file, replacing, write_errors
from .audit import Audit
from .devices import Device
from .summary import summary


def as_dict(audit: Audit, device: Device) -> dict[str, Any]:
    """Return everything that was found out."""
    subject = audit.subject
    return {
        "name": subject.name,
        "classes": list(subject.spec.classes),
        "spec": subject.spec.name if subject.is_patchable else None,
        "weights": audit.weights,
        "sizes": dict(subject.size),
        "is_full_size": audit.is_full_size,
        "notes": list(audit.notes),
        "device_of_estimates": device.name,
        "arguments": {name: vars(each) for name, each in audit.observed.arguments.items()},
        "plain": summary(audit.plain, device).as_dict(),
        "patched": None if audit.patched is None else summary(audit.patched, device).as_dict(),
        "sites": dict(audit.left_over),
    }


def check_out(path: Path | None, *, is_table: bool) -> None:
    """Refuse a file that nothing can be written to.

    Raises:
        DitPatchError: its ending says nothing that can be written, or it cannot be.
    """
    if path is None:
        return
    endings = (".md", ".json") if is_table else (".html", ".json")
    if path.suffix not in endings:
        raise DitPatchError(f"--out: {quote(path)} ends in none of {', '.join(endings)}")
    if path.suffix == ".html":
        extras.require("a page", {"jinja2": "jinja2"}, "audit")
    check_file("--out", path)


def write_out(path: Path, audits: Sequence[Audit], device: Device) -> list[Path]:
    """Write a page for each, or the JSON, as the file's ending says, and return the files.

    The first has that name; further ones have a number before its ending.
    """
    written = []
    for number, each in enumerate(audits, 1):
        place = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        if path.suffix == ".html":
            from .page import audit_page

            text = audit_page(each, device)
        else:
            text = json.dumps(as_dict(each, device), indent=1) + "\n"
        with write_errors("--out", place), replacing(place) as draft:
            draft.write_text(text, encoding="utf-8")
        written.append(place)
    return written
