"""What the last call of a site depended on, and why it hit, was computed, or was passed through; in words."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from .memoised import MemoisedSite
from .patch import Patch

_HEAD = (
    "something that is looked at once a forward has changed (an attribute, a hook, a class, a switch of the numerics)",
    "a weight or an adapter has changed",
    "autocast, the default device or the CUDA stream is another",
    "it was another call within the forward",
)


def explain(patch: Patch) -> Iterator[str]:
    """Yield lines on one patch: its last call, what its results depend on, and why one was computed last."""
    memo = patch.memo
    yield f"{patch.site.at}"
    if memo.off is not None:
        yield f"  {memo.off.note}"
    elif not memo.calls:
        yield "  not called so far"
    else:
        yield f"  last call: {memo.last_outcome}"
    if isinstance(patch, MemoisedSite):
        yield f"  depends on: {'; '.join(_dependencies(patch))}"
        if memo.missed:
            yield f"  last computed, since {_why(patch, memo.missed)}"


def _dependencies(patch: MemoisedSite) -> Iterator[str]:
    for name, facets in patch.site.key.items():
        yield f"{name} ({', '.join(facets)})"
    modules = len(patch.guards.inside())
    weights = len(patch.guards.weights.tensors())
    if modules:
        yield f"{modules} modules with {weights} weights and buffers" if weights else f"{modules} modules"
    between = len(list(patch.guards.between()))
    if between or patch.guards.ancestors:
        yield f"{between + len(patch.guards.ancestors)} modules between the model's arguments and the site"
    if patch.guards.refusal is not None:
        yield f"now left to the original: {patch.guards.refusal}"


def _why(patch: MemoisedSite, missed: Sequence[tuple]) -> str:
    if len(missed) < 2:
        return "nothing was stored yet"
    before, now = missed
    changed = [words for at, words in enumerate(_HEAD) if before[at] != now[at]]
    if changed:
        return " and ".join(changed)
    names = _names(patch, now[len(_HEAD) :])
    if len(before) != len(now):
        return "it was called with other arguments"
    differing = [name for name, one, other in zip(names, before[len(_HEAD) :], now[len(_HEAD) :]) if one != other]
    return f"{' and '.join(differing)} is another" if differing else "what was stored was given up"


def _names(patch: MemoisedSite, parts: Sequence[Hashable]) -> list[str]:
    """Return the name of each part of a key: arguments by position, arguments of the model, arguments by name."""
    plan = patch.plan
    named = [part[0] for part in parts if isinstance(part, tuple) and part and part[0] in plan.named]
    others = [*(f"model.{each.name}" for each in plan.borrowed), *named]
    others += ["the model's device"] * patch.output.follows_model
    others += ["what a function that it reads returns"] * len(patch.attribute.values)
    return [*(each.name for each in plan.positional[: len(parts) - len(others)]), *others]
