"""The draft of a spec that `dit-patch new` makes, without the sites that are worth nothing, the best first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...errors import DitPatchError, quote
from ...outputs import check_file, replacing, write_errors
from ...spec.address import Address, AttributeAddress
from ...spec.recipe import Mini
from ..new.draft import draft
from ..new.observe import Proposal
from ..new.write import Draft, spec_text
from .audit import Audit
from .devices import Device
from .repeats import pattern
from .summary import Amount, Summary, summary
from .text import figure, share

_LEAST = 1e-4  # of the time or of the kernels of a forward: less is not worth a site


def check_spec_file(path: Path | None, *, force: bool) -> None:
    """Refuse a file that a draft cannot be written to.

    Raises:
        DitPatchError: it exists and is not to be overwritten, or it cannot be written.
    """
    check_file("--write-spec", path)
    if path is not None and path.exists() and not force:
        raise DitPatchError(f"--write-spec: {quote(path)} exists; --force overwrites it")


def write_spec(path: Path, name: str, own: Mini | None, audit: Audit, device: Device) -> None:
    """Write the draft for a class, each site with what it is worth at full size."""
    text = spec_text(by_worth(draft(name, own), summary(audit.plain, device)))
    with write_errors("--write-spec", path), replacing(path) as file:
        file.write_text(text, encoding="utf-8")


def by_worth(made: Draft, plain: Summary) -> Draft:
    """Return the draft with its sites in the order of their worth; those that are worth too little are refused."""
    worths = {each.at: _worth(each, plain) for each in made.sites}
    chosen: list[Proposal] = []
    refused = dict(made.refused)
    for each in sorted(made.sites, key=lambda each: -worths[each.at].milliseconds):
        worth = worths[each.at]
        if each.kind != "rotary" and _is_nothing(worth, plain.total):
            refused[each.at] = "it repeats, and is worth less than a hundredth of a percent of a forward at full size"
        else:
            words = "" if each.kind == "rotary" else f" Worth {_words(worth, plain.total)}"
            chosen.append(replace(each, about=f"{each.about}.{words}".rstrip(".")))
    return replace(made, sites=chosen, refused=refused)


def _worth(proposal: Proposal, plain: Summary) -> Amount:
    """Return what repeats within the module that the proposed site is on."""
    found = Amount()
    address = Address.parse(proposal.at)
    if not isinstance(address, AttributeAddress):
        return found
    path = pattern(address.path)
    for row in plain.rows:
        if f"{row.module}.".startswith(f"{path}.") and row.category.repeats:
            found.join(row.amount)
    return found


def _is_nothing(worth: Amount, total: Amount) -> bool:
    shares = (worth.milliseconds / (total.milliseconds or 1), worth.kernels / (total.kernels or 1))
    return max(shares) < _LEAST and not worth.copies and not worth.syncs


def _words(worth: Amount, total: Amount) -> str:
    parts = [f"{share(worth.milliseconds, total.milliseconds)} of a forward's time (an estimate)"]
    parts.append(f"{figure(worth.kernels)} of {figure(total.kernels)} kernels")
    parts += [f"{figure(worth.copies)} copies to the device"] if worth.copies else []
    parts += [f"{figure(worth.syncs)} waits of the host"] if worth.syncs else []
    return ", ".join(parts)
