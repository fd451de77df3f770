"""An audit as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .audit import Audit
from .devices import Device
from .summary import Amount, Category, Row, Summary, summary, together

_ROWS = 12


def audit_text(audit: Audit, device: Device, rows: int = _ROWS) -> str:
    """Return what was found: a bar for each stage, what repeats, what crosses to the device, and what is left."""
    return "\n".join(_lines(audit, device, rows))


def _lines(audit: Audit, device: Device, rows: int) -> Iterator[str]:
    plain = summary(audit.plain, device)
    patched = None if audit.patched is None else summary(audit.patched, device)
    yield from heading(audit)
    yield ""
    yield f"a warm forward (mean of the passes of a step), times estimated for one {device.name} from peak figures"
    for first, *others in figure_table(plain, patched):
        yield f"  {first:<22}" + "".join(f"{each:>13}" for each in others)
    yield ""
    yield from _stages(plain)
    left = plain if patched is None else patched
    repeating = (row for row in left.rows if row.category.repeats)
    found = [row for row in repeating if row.amount.kernels or row.amount.copies or row.amount.syncs]
    yield ""
    yield "what repeats" if patched is None else "what is left that repeats, patched"
    yield from _rows(found[:rows], left.total) if found else ["  nothing"]
    if len(found) > rows:
        yield f"  ... and {len(found) - rows} more lines"
    crossing = [row for row in left.rows if row.amount.copies or row.amount.downloads or row.amount.syncs]
    crossing = [row for row in crossing if row not in found[:rows] and row.category is not Category.PERHAPS]
    if crossing:
        yield ""
        yield "other copies to the device and waits for it"
        yield from _rows(crossing[:rows], left.total)
    perhaps = [row for row in left.rows if row.category is Category.PERHAPS]
    if perhaps:
        names = sorted({name for row in perhaps for name in row.reads})
        yield ""
        yield "what gave the same in all that was tried; not proved, since the host had read numbers before: of"
        yield f"{', '.join(names) or 'something'}"
        yield from _rows(perhaps[:rows], left.total)
        if len(perhaps) > rows:
            yield f"  ... and {len(perhaps) - rows} more lines"
    if audit.left_over:
        yield ""
        yield "what the sites of the spec say"
        yield from (f"  {at}: {note}" for at, note in audit.left_over.items())


def heading(audit: Audit) -> list[str]:
    """Return what was audited, in a line or more."""
    subject = audit.subject
    sizes = ", ".join(f"{name}={value}" for name, value in subject.size.items())
    spec = f"spec {subject.spec.name}" if subject.is_patchable else "no spec"
    return [
        f"{subject.name}: {', '.join(name.rpartition('.')[2] for name in subject.spec.classes)}, "
        f"{audit.weights / 1e9:.2f} billion weights, {sizes + '; ' if sizes else ''}{spec}",
        *(f"  {note}" for note in audit.notes),
    ]


FIGURES = (
    ("TFLOP", "flops", 1e12),
    ("GB read and written", "nbytes", 1e9),
    ("kernels", "kernels", 1),
    ("copies to the device", "copies", 1),
    ("MB of these", "copied", 1e6),
    ("copies back", "downloads", 1),
    ("waits of the host", "syncs", 1),
    ("ms (estimate)", "milliseconds", 1),
)
"""What is shown of an amount: the words, the attribute, and what it is divided by."""


def figure(value: float) -> str:
    """Return a number with as many digits as say something."""
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def share(part: float, whole: float) -> str:
    """Return a percentage; "-" of nothing."""
    return f"{part / whole:.1%}" if whole else "-"


def figure_table(plain: Summary, patched: Summary | None) -> list[list[str]]:
    """Return the head and the rows of a table: each figure in all, the share that repeats, and the figure patched."""
    rows = [["", "in all", "over steps", "over passes", "generations", "not proved", *(["patched"] if patched else [])]]
    for words, name, unit in FIGURES:
        whole = getattr(plain.total, name)
        repeats = [share(getattr(each, name), whole) for each in (plain.steps, plain.passes, plain.generations)]
        repeats.append(share(getattr(plain.perhaps, name), whole))
        after = [figure(getattr(patched.total, name) / unit)] if patched else []
        rows.append([words, figure(whole / unit), *repeats, *after])
    after = [figure(patched.peak_nbytes / 1e9)] if patched else []
    return [*rows, ["GB held at most", figure(plain.peak_nbytes / 1e9), *[""] * 4, *after]]


_MARKS = {
    Category.SIZES: "█",
    Category.STEPS: "▓",
    Category.PASSES: "▒",
    Category.PERHAPS: "?",
    Category.CHANGING: "·",
}


def _stages(plain: Summary, width: int = 40) -> Iterator[str]:
    stages = plain.stages()
    name_width = max(map(len, stages), default=0)
    whole = plain.total.milliseconds or 1.0
    times = {name: together(amounts.values()).milliseconds for name, amounts in stages.items()}
    longest = max(times.values(), default=0.0) or 1.0
    yield "  ".join(f"{mark} {category.value}" for category, mark in _MARKS.items() if category in plain.by_category)
    for name, amounts in stages.items():
        bar = "".join(
            _MARKS[category] * max(1, round(width * amounts[category].milliseconds / longest))
            for category in Category
            if category in amounts and amounts[category].milliseconds
        )
        yield f"  {name:<{name_width}}  {share(times[name], whole):>6}  {bar}"


def _rows(rows: Sequence[Row], total: Amount) -> Iterator[str]:
    for row in rows:
        amount = row.amount
        parts = [f"{share(amount.milliseconds, total.milliseconds)} of the time"]
        if amount.flops and amount.flops > 0.0005 * total.flops:
            parts.append(f"{share(amount.flops, total.flops)} of the FLOPs")
        for value, one, many in (
            (amount.kernels, "kernel", "kernels"),
            (amount.copies, "copy to the device", "copies to the device"),
            (amount.downloads, "copy back", "copies back"),
            (amount.syncs, "wait of the host", "waits of the host"),
        ):
            if value:
                parts.append(f"{figure(value)} {one if value == 1 else many}")
        yield f"  {row.module or '(the model itself)'}  {row.line}  {', '.join(row.operations[:4])}"
        yield f"      {row.about}: {', '.join(parts)}"
