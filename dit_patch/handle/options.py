"""What `apply` was asked for: checked once, frozen, and handed down as it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from ..errors import DitPatchError, quote, suggest
from ..memo.lookup import CHECKS
from ..spec.model import Site
from ..spec.registry import Registry
from ..step_cache import StepCache

_WORDS = {
    "only": "only:",
    "specs": "only, by specs:",
    "max_bytes": "max_bytes:",
    "check": "check:",
    "fixes": "fixes:",
    "directories": "specs:",
    "step_cache": "step_cache:",
}
"""What the user calls each of the options."""


@dataclass(frozen=True)
class Options:
    """The options of one `apply`; the same options again give the same handle."""

    #: Kinds of sites, such as "rope"; None for all.
    only: tuple[str, ...] | None = None
    #: Names of specs, such as "diffusers/wan"; None for all that are on by default.
    specs: tuple[str, ...] | None = None
    #: What all caches of the handle may hold together, in bytes.
    max_bytes: int = 256 << 20
    #: Which hits are computed again and compared: "first" of each signature, "always", "never".
    check: str = "first"
    #: Whether `bind:` in a spec counts.
    fixes: bool = False
    #: Further directories with specs.
    directories: tuple[str, ...] = ()
    #: How blocks are skipped, which changes the output; None for not at all.
    step_cache: StepCache | None = None

    @classmethod
    def from_user(
        cls,
        registry: Registry,
        *,
        only: Iterable[str] | None,
        max_bytes: Any,
        check: Any,
        fixes: Any,
        directories: Iterable[Any],
        step_cache: StepCache | None,
    ) -> Options:
        """Check what the user gave to `apply`, and freeze it.

        Raises:
            DitPatchError: an option that does not exist, which it quotes.
        """
        words = None if only is None else (only,) if isinstance(only, str) else tuple(only)
        kinds, names = registry.selection(words or (), "only")
        if words == () and step_cache is None:
            raise DitPatchError("only: an empty selection patches nothing; leave it out to patch every kind")
        if check not in CHECKS:
            raise DitPatchError(f"check: `{check}` is none of {', '.join(CHECKS)}{suggest(str(check), CHECKS)}")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes <= 0:
            raise DitPatchError(f"max_bytes: `{max_bytes}` is not a positive number of bytes")
        return cls(
            only=kinds if kinds or words == () else None,
            specs=names or None,
            max_bytes=max_bytes,
            check=check,
            fixes=bool(fixes),
            directories=tuple(str(each) for each in directories),
            step_cache=step_cache,
        )

    def difference(self, other: Options) -> str:
        """Return in words which options differ in another `apply`."""
        pairs = {each.name: (getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        return "; ".join(
            f"{_WORDS[name]} {_words(before)} then, {_words(now)} now" for name, (before, now) in differing.items()
        )

    def wants(self, site: Site) -> bool:
        """Return whether sites of this kind are to be patched."""
        return self.only is None or site.kind in self.only


def _words(value: Any) -> str:
    if value is None or value == ():
        return "none" if value == () else "not given"
    return ", ".join(map(quote, value)) if isinstance(value, tuple) else quote(value)
