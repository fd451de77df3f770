"""Where a spec comes from, for messages and for whoever decides what it may do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .yaml_reader import Document


@dataclass(frozen=True)
class Origin:
    """What a spec is called, the file that it was read from, and where in it things stand.

    Attributes:
        name: such as "diffusers/wan"; "" for a spec that was not read from text.
        path: the file; None for a text.
        trusted: whether its `use:` may name functions outside dit_patch.
        keys: the file:line:column of each top-level key.
        sites: the file:line that declares each site, by its `at`.
    """

    name: str = ""
    path: Path | None = None
    trusted: bool = False
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    sites: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of_document(cls, document: Document, name: str, path: Path | None, trusted: bool) -> Origin:
        """Return the origin of a spec that the document declares."""
        keys, sites = {}, {}
        for loc, place in document.places.items():
            if len(loc) == 1:
                keys[loc[0]] = document.label(place.start)
            elif loc[:1] == ("sites",) and loc[2:] == ("at",):
                sites[place.text] = f"{document.file}:{document.places[loc[:2]].start.line}"
        return cls(name, path, trusted, keys, sites)

    def extending(self, base: Origin) -> Origin:
        """Return this origin, which knows the inherited sites of `base`, too."""
        return replace(self, sites={**base.sites, **self.sites})
