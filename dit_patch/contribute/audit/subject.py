"""The model to audit: tiny, with numbers, and at full size, in shapes alone; each with what to call it with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import DitPatchError, SpecError, quote, suggest
from ...spec import mini
from ...spec.model import Spec
from ...spec.recipe import Case, Input, Mini, merge
from ..check.cases import is_size, nearest_mini

TEXT_TOKENS = 512
_VIDEO, _IMAGE = {"f": 21, "h": 60, "w": 104}, {"h": 128, "w": 128}
_WIDTHS = {
    "text": ("text", "caption", "joint", "cap_feat", "cross_attention", "pooled"),
    "image": ("image_dim", "image_embed", "img"),
    "pooled": ("pooled",),
}


@dataclass(frozen=True)
class Subject:
    """A model to audit.

    Attributes:
        name: for people.
        spec: the one there is for its class, or one made of a mini alone, which has no sites.
        toy: how to build and call it tiny.
        full: how to build and call it at full size.
        notes: what was guessed, in words.
    """

    name: str
    spec: Spec
    toy: Case
    full: Case
    notes: tuple[str, ...] = ()

    @property
    def is_patchable(self) -> bool:
        """Whether there is a spec with something to patch."""
        return bool(self.spec.sites)

    @property
    def size(self) -> Mapping[str, int]:
        """What the names in the shapes stand for at full size."""
        return self.full.sizes[0]


def from_spec(
    spec: Spec,
    *,
    bench: str | None = None,
    config: Mapping[str, Any] | None = None,
    size: Mapping[str, int] | None = None,
    whole_config: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Subject:
    """Return the model of a spec, at full size as one of its `bench` cases says, or else as its class defaults to.

    Args:
        bench: the name of the case; by default the first that knows its depth.
        config: what the configuration has instead.
        size: what names in shapes stand for instead.
        whole_config: a checkpoint's configuration, which says everything.
        name: for people; by default the spec's.

    Raises:
        SpecError: the spec has no mini, or no such case, or no such size.
    """
    if spec.mini is None:
        raise SpecError(f"{spec.position('model')}: without a `mini` there is nothing to call the model with")
    notes: list[str] = []
    toy = spec.mini.case()
    chosen = bench or next((each for each, case in spec.bench.items() if case.depth), None)
    if whole_config is not None:
        _, toy = nearest_mini(spec, whole_config)
        full = grow(
            toy, {**mini.class_defaults(mini.model_class(spec), spec.mini.host), **whole_config}, notes, whole_config
        )
    elif chosen is not None:
        full = spec.bench_case(chosen)
        full = merge(full, Case(config=full.depth))
        notes.append(f"full size: `{chosen}` of the spec")
    else:
        full = grow(toy, mini.class_defaults(mini.model_class(spec), spec.mini.host), notes)
        notes.append("full size: the defaults of the class; sizes and text tokens are guessed")
    full = merge(full, Case(config=config or {}, sizes=(_sizes(full, toy, size or {}),)))
    return Subject(name or spec.name, spec, toy, full, tuple(notes))


def from_mini(model: str, own: Mini, **options: Any) -> Subject:
    """Return the model of a class without a spec, from what a mini says of it; the options are those of `from_spec`."""
    return from_spec(mini.spec_without_sites(model, own), **{"name": model.rpartition(".")[2], **options})


def grow(toy: Case, defaults: Mapping[str, Any], notes: list[str], given: Mapping[str, Any] | None = None) -> Case:
    """Return the tiny case at full size.

    Numbers of the configuration become those of `defaults`; its modes stay, but for what is given.
    A width in an input's shape becomes that of the configuration; text has 512 tokens; latents are those of 81 frames
    of 480 x 832 (f=21, h=60, w=104), or of an image of 1024 x 1024 (h=w=128), where the sizes have such names.
    """
    config = {
        name: defaults[name] if name in defaults and is_size(value) and is_size(defaults[name]) else value
        for name, value in toy.config.items()
    }
    config |= given or {}
    names = toy.sizes[0]
    sizes = {**names, **{name: value for name, value in (_VIDEO if "f" in names else _IMAGE).items() if name in names}}
    if "blocks" in names:  # of a rollout, of which one is enough; they have the model's own number of frames
        sizes |= {"blocks": 1, **{name: names[name] for name in ("f",) if name in names}}
    sizes = _with_derived(toy, sizes)
    text = _text_tokens(toy)
    large = {**defaults, **config}
    inputs = {name: _grown(name, recipe, toy.config, large, text) for name, recipe in toy.inputs.items()}
    parts: dict[str, Any] = {"rollout": toy.rollout} if toy.rollout else {"inputs": inputs}
    if text is not None and text != TEXT_TOKENS:
        notes.append(f"{TEXT_TOKENS} tokens of text")
    return Case(config=config, sizes=(sizes,), **parts)


def _grown(name: str, recipe: Input, small: Mapping[str, Any], large: Mapping[str, Any], text: int | None) -> Input:
    if recipe.items:
        items = tuple(_grown(name, item, small, large, text) for item in recipe.items)
        return recipe.model_copy(update={"items": items})
    if recipe.shape is None:
        return recipe
    is_text = "encoder" in name or "text" in name or "mask" in name or name in ("context", "txt_ids")
    shape = []
    for place, each in enumerate(recipe.shape):
        is_last = place == len(recipe.shape) - 1
        if not isinstance(each, int) or place == 0 and len(recipe.shape) > 1 and each == 1:
            shape.append(each)
        elif is_text and each == text and (not is_last or "mask" in name or len(recipe.shape) == 1):
            shape.append(TEXT_TOKENS)
        else:
            shape.append(_width(name, each, small, large))
    return recipe.model_copy(update={"shape": tuple(shape)})


def _width(name: str, width: int, small: Mapping[str, Any], large: Mapping[str, Any]) -> int:
    """Return what has that width in the small configuration, by the numbers there are and by the input's name."""
    same = [each for each, value in small.items() if type(value) is int and value == width and each in large]
    about = next((words for word, words in _WIDTHS.items() if word in name), None)
    if about is None and "encoder" in name:
        about = _WIDTHS["text"]
    about = about or ("in_channels", "in_dim", "channels")
    fitting = [each for each in same if any(word in each for word in about)]
    found = (fitting or (same if len(same) == 1 else [None]))[0]
    return width if found is None else large[found]


def _text_tokens(case: Case) -> int | None:
    """Return how many tokens the prompt has: the last axis but one of its embeddings."""
    for name in ("encoder_hidden_states", "context", "txt", "caption"):
        recipe = case.inputs.get(name)
        recipe = recipe.items[0] if recipe is not None and recipe.items else recipe
        if recipe is not None and recipe.shape and len(recipe.shape) > 1 and isinstance(recipe.shape[-2], int):
            return recipe.shape[-2]
    return None


def _sizes(full: Case, toy: Case, given: Mapping[str, int]) -> dict[str, int]:
    names = full.sizes[0]
    for name in given:
        if name not in names:
            known = ", ".join(names)
            raise DitPatchError(f"--size: no size {quote(name)}{suggest(name, names)}. This model has: {known}.")
    return _with_derived(toy, {**names, **given}, given) if given else dict(names)


def _with_derived(case: Case, sizes: Mapping[str, int], given: Iterable[str] = ()) -> dict[str, int]:
    """Return sizes with those made to fit that go by f, h and w, as a number of tokens does in the case's own sizes."""
    found = dict(sizes)
    for name in set(sizes) - {"f", "h", "w", "blocks", *given}:
        for axes in ("fhw", "hw", "h", "w", "f"):
            volumes = [math.prod(each.get(axis, 1) for axis in axes) for each in case.sizes]
            ratios = {volume / each[name] for volume, each in zip(volumes, case.sizes, strict=True) if name in each}
            if len(ratios) == 1 and set(axes) <= set(sizes):
                found[name] = max(1, round(math.prod(sizes[axis] for axis in axes) / ratios.pop()))
                break
    return found
