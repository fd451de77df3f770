"""Write the beginning of a spec as YAML, with comments on what was observed and what is left to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from .observe import BlockList, Proposal


@dataclass
class Draft:
    """What `dit-patch new` found out about a class.

    Attributes:
        name: the dotted name of the class.
        mini: as the spec has it.
        blocks: the lists of blocks that are called.
        sites: that are proposed.
        unknown: parameters of the forward that no input was guessed for.
        problem: why the mini could not be built or called, or None.
        forwards: the number of forwards that were run.
        own_mini: the mini was given, not guessed.
        refused: addresses of sites that `dit-patch check` found fault with, each with what it said.
        faults: what else it finds.
    """

    name: str
    mini: Mapping[str, Any]
    blocks: Sequence[BlockList] = ()
    sites: Sequence[Proposal] = ()
    unknown: Sequence[str] = ()
    problem: str | None = None
    forwards: int = 0
    own_mini: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    faults: Sequence[str] = ()


def spec_text(draft: Draft) -> str:
    """Return the content of the spec's file."""
    lines = [
        "# Begun by `dit-patch new`; try it with `dit-patch check`. Say here what the model is for.",
        f"model: {draft.name}",
        *_requires(draft.name),
        *_blocks(draft),
        *_sites(draft),
        "",
        *_mini(draft),
    ]
    return "\n".join(lines) + "\n"


def _requires(name: str) -> list[str]:
    package = name.partition(".")[0]
    for distribution in metadata.packages_distributions().get(package, ())[:1]:
        release = ".".join(metadata.version(distribution).split(".")[:2])
        return [f"requires: [{distribution}>={release}]  # what it was begun with; older ones are for you to try"]
    return []


def _blocks(draft: Draft) -> list[str]:
    if not draft.blocks:
        none = "# No list of blocks was seen to be called, so nothing can be step-cached."
        return [] if draft.problem else [none]
    lines = ["blocks:"]
    for each in draft.blocks:
        if "." in each.at:
            lines.append(f"  # {each.at}: part of something else, by its path")
        elif each.patterns:
            others = "".join(f"; {other} would fit as well" for other in each.patterns[:-1])
            lines.append(f"  - {{at: {each.at}, pattern: {each.patterns[-1]}}}  # {each.about}{others}")
        else:
            lines.append(f"  # {each.at}: {each.about}, which is no pattern of cache-dit's")
    if all(line.lstrip().startswith("#") for line in lines[1:]):
        return ["# No list of blocks that cache-dit has a pattern for:", *lines[1:]]
    lines.append("# From how many steps on something may be skipped; or, where blocks write into KV caches:")
    return [*lines, "# {supported: false, reason: ...}", "step_cache: {min_steps: 12}"]


def _sites(draft: Draft) -> list[str]:
    if draft.problem:
        return [
            "# The mini could not be built or called, so nothing could be seen of what repeats:",
            *(f"#   {line}" for line in draft.problem.splitlines()[:4]),
            "# Mend `mini` below, then: dit-patch new " + draft.name + " --mini THIS_FILE --out OTHER_FILE",
            "sites: []",
        ]
    refused = [f"# Not {at}: {' '.join(reason.split())}"[:240] for at, reason in draft.refused.items()]
    if not draft.sites:
        return ["# No submodule outside the blocks gave the same result twice.", *refused, "sites: []"]
    lines = [
        f"# In {draft.forwards} forwards (steps, passes, sizes, prompts) the results of these calls repeat. A key may",
        "# be finer than needed, never coarser, so read each one's source: what of a tensor does not count (its dtype,",
        "# its device) may go, and what counts besides must come. Remove what does not pay, and what a pipeline makes",
        "# anew at each step. A span, `a..b`, is for code between two calls.",
        *refused,
        "sites:",
    ]
    for each in draft.sites:
        seen = f"{each.hits} of {each.calls} calls repeat" if each.hits else f"{each.calls} calls in a forward"
        lines.append(f"  # {each.about}: {seen}.")
        lines.append(f"  - at: {each.at}")
        lines.append(f"    kind: {each.kind}")
        if each.key:
            lines.append(f"    key: {_flow(each.key)}")
        if each.reads:
            lines.append(f"    reads: {_flow(list(each.reads))}")
        if each.use:
            function, source = each.use
            lines += [f"    use: {function}", f"    source: {source}"]
        lines.append("")
    return lines[:-1]


def _mini(draft: Draft) -> list[str]:
    mini = draft.mini
    guessed = "# Guessed from names: a model that is as small as it can be, and calls as a pipeline makes them."
    lines = ["mini:"] if draft.own_mini else [guessed, "mini:"]
    for name in ("host", "rollout"):
        if mini.get(name):
            lines.append(f"  {name}: {mini[name]}")
    lines += [f"  config: {_flow(mini['config'])}", "  sizes:", *(f"    - {_flow(size)}" for size in mini["sizes"])]
    if mini.get("inputs"):
        lines += ["  inputs:", *(f"    {name}: {_flow(recipe)}" for name, recipe in mini["inputs"].items())]
    lines += [f"    {name}: {{value: null}}  # to be filled in" for name in draft.unknown]
    variants = mini.get("variants")
    if not variants:
        none = "  # variants:  one for each mode of the model that reaches other code, as the difference from the above"
        return [*lines, none]
    return [*lines, "  variants:", *(f"    {name}: {_flow(variant)}" for name, variant in variants.items())]


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_flow(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    plain = isinstance(value, str) and value.replace("_", "").replace(".", "").replace(":", "").isalnum()
    return value if plain and value not in ("true", "false", "null", "yes", "no", "on", "off") else json.dumps(value)
