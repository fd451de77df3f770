"""Which code a spec may name: dit_patch's own, or any if whoever loads it trusts it."""

from collections.abc import Iterator

from ..errors import quote
from .messages import dotted_path
from .yaml_reader import Document, Loc, Position

OWN_CODE = ("dit_patch.functions.", "dit_patch.hosts.")


def untrusted_code(document: Document) -> Iterator[tuple[Position, str]]:
    """Yield where the document names a function or module that is not dit_patch's own, and a sentence about it."""
    models = [
        place.text for loc, place in document.places.items() if loc[:1] in (("model",), ("models",)) and place.text
    ]
    theirs = tuple(f"{model.partition('.')[0]}." for model in models)
    for loc, place in document.places.items():
        if not place.text or not _names_code(loc, place.text):
            continue
        module = place.text.partition(":")[0]
        # What a model's own package says of itself is as good as the model.
        if not f"{module}.".startswith(OWN_CODE + theirs if "reads" in loc else OWN_CODE):
            message = (
                f"{quote(place.text)} is code outside `{OWN_CODE[0].rstrip('.')}`, which a spec of your own may name "
                "only if you trust it: trust=True, or --trust-specs"
            )
            yield place.start, f"{dotted_path(loc)}: {message}"


def _names_code(loc: Loc, text: str) -> bool:
    """Return whether `text` at this path names what is imported and called; not what is patched."""
    if loc[0] == "sites":
        return len(loc) > 2 and (loc[2] in ("use", "then") or (loc[2] == "reads" and ":" in text))
    return loc[0] in ("mini", "bench") and loc[-1] in ("host", "rollout")
