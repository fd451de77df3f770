"""Guess a tiny configuration for a class of models, and inputs for its forward, from signatures and names.

Whether the guess is right is seen by building and calling the model.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

HEAD_DIM = 16
TEXT_TOKENS = 6
SIZES = ({"f": 3, "h": 8, "w": 8}, {"f": 2, "h": 8, "w": 12}, {"f": 1, "h": 4, "w": 8})
_TEXT = ("text_dim", "caption_channels", "text_embed_dim", "joint_attention_dim", "in_text_dim", "cap_feat_dim",
         "cross_attention_dim", "encoder_hidden_states_dim")  # fmt: skip
_WIDTH = (("num_attention_heads", "n_heads", "num_heads"), ("attention_head_dim", "head_dim"))
_UNPACKED = re.compile(r"^\s*([\w, ]+?)\s*=\s*(?:hidden_states|x|latents)\.(?:shape|size\(\))\s*$", re.MULTILINE)
_SMALL = (
    # A pattern of the parameter's name, its defaults above which it is made small, and how small.
    (r"(num|n)_.*(layers|blocks)$|depth$", 0, 2),
    (r"(num|n)_.*heads$", 0, 2),
    (r"head_dim$", 0, HEAD_DIM),
    (r"(in|out)_channels$|_visual_dim$", 16, 4),
    (r"max_.*len|max_sequence_length", 64, 64),
    (r"^(text|caption|joint|cross|pooled|cap|in_text)|_embed_dim$|_projection_dim$|image_dim", 32, 16),
    (r"(ffn|mlp|ff|inner|model|time|hidden).*dim$", 32, 32),
)

_NEEDED = {"in_channels": 4, "out_channels": 4, "sample_size": 8, "num_layers": 2}
"""Small values for parameters that some models cannot do without, although their default is None."""


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return small values for those defaults of a configuration that decide how large the model is."""
    small: dict[str, Any] = {}
    for name, default in given.items():
        if default is None and name in _NEEDED:
            small[name] = _NEEDED[name]
        if isinstance(default, bool) or not isinstance(default, int):
            continue
        size = next((size for pattern, above, size in _SMALL if re.search(pattern, name) and default > above), None)
        if size is not None:
            small[name] = min(size, default)
    inner = _inner(given)
    for name, default in given.items():
        if inner is not None and default == inner and name != "ffn_dim":
            small[name] = _inner({**given, **small})
    heads = [value for name, value in given.items() if re.search(r"head_dim$", name) and isinstance(value, int)]
    for name, default in given.items():
        whole = isinstance(default, (list, tuple)) and default and all(type(item) is int for item in default)
        if whole and sum(default) in heads:  # RoPE's share of a head for each axis
            small[name] = _shares(len(default))
    return small


def inputs(
    model: torch.nn.Module, settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return recipes for the arguments of the model's forward, and the names of those that have none.

    Args:
        model: of the class.
        settings: what it is built with.
        defaults: what the class is built with where nothing is said.
    """
    own = {**defaults, **settings}
    text = next((name for name in _TEXT if type(own.get(name)) is int), None)
    recipes = {
        "timestep": {"shape": [1], "fill": "timestep", "new": "step"},
        "r_timestep": {"shape": [1], "fill": "timestep", "new": "step"},
        "timestep_r": {"shape": [1], "fill": "timestep", "new": "step"},
        "original_size": {"shape": [1, 2], "fill": 64},
        "target_size": {"shape": [1, 2], "fill": 64},
        "crop_coords": {"shape": [1, 2], "fill": "zeros"},
        "encoder_hidden_states": {"shape": [1, TEXT_TOKENS, _size(text, settings, own)], "new": "pass"},
        "encoder_attention_mask": _mask(),
        "encoder_hidden_states_mask": _mask(),
        "pooled_projections": {"shape": [1, _size("pooled_projection_dim", settings, own)], "new": "pass"},
        "encoder_hidden_states_image": {"shape": [1, 257, _size("image_dim", settings, own)]},
        "guidance": {"shape": [1], "fill": 3.5},
        "txt_ids": {"shape": [TEXT_TOKENS, 3], "fill": "zeros"},
        "img_ids": {"shape": ["tokens", 3]},
    }
    chosen, unknown = {}, []
    parameters = list(inspect.signature(inspect.unwrap(type(model).forward)).parameters.values())[1:]
    for position, each in enumerate(parameters):
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        is_required = each.default is each.empty
        if position == 0:
            chosen[each.name] = {"shape": _latents(model, settings, own), "new": "step"}
        elif each.name in recipes and (is_required or _is_on(each.name, own)):
            chosen[each.name] = recipes[each.name]
        elif is_required:
            unknown.append(each.name)
    return chosen, unknown


def _mask() -> dict[str, Any]:
    return {"shape": [1, TEXT_TOKENS], "fill": "mask", "dtype": "int64", "new": "pass"}


def sizes(recipes: Mapping[str, Mapping[str, Any]], patch: int) -> list[dict[str, int]]:
    """Return three sizes for the names in the recipes' shapes; a token is made of `patch` latents."""
    used = {name for recipe in recipes.values() for name in recipe.get("shape", ()) if isinstance(name, str)}
    every = [{**size, "tokens": max(1, size["f"] * size["h"] * size["w"] // patch)} for size in SIZES]
    return [{name: value for name, value in size.items() if name in used} for size in every]


def other_latents(recipe: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the recipe with latents of other axes, for a model that does not take the guessed ones."""
    name, latents = next(iter(recipe["inputs"].items()))
    channels = latents["shape"][-1 if latents["shape"][1:2] == ["tokens"] else 1]
    for axes in (["h", "w"], ["f", "h", "w"]):
        shape = [1, channels, *axes]
        if shape != latents["shape"]:
            inputs = {**recipe["inputs"], name: {**latents, "shape": shape}}
            yield {**recipe, "sizes": sizes(inputs, 4), "inputs": inputs}


def _latents(model: torch.nn.Module, settings: Mapping[str, Any], own: Mapping[str, Any]) -> list[Any]:
    """Return the shape of the latents: as the forward unpacks it, or else as the first fitting layer takes it."""
    name = "in_channels" if "in_channels" in own else "in_visual_dim"
    channels = own.get(name)
    unpacked = _UNPACKED.search(inspect.getsource(inspect.unwrap(type(model).forward)))
    axes = [_axis(each.strip()) for each in unpacked[1].split(",") if each.strip()] if unpacked else []
    if len(axes) > 2 and all(axes):
        return [_size(name, settings, own) if axis == "c" else 1 if axis == "b" else axis for axis in axes]
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv3d, torch.nn.Conv2d)):
            axes = ["f", "h", "w"] if isinstance(module, torch.nn.Conv3d) else ["h", "w"]
            same = module.in_channels == channels
            return [1, _size(name, settings, own) if same else module.in_channels, *axes]
        if isinstance(module, torch.nn.Linear) and module.in_features == channels:
            return [1, "tokens", _size(name, settings, own)]
    return [1, "tokens", _size(name, settings, own)]


def _axis(name: str) -> str | None:
    """Return which axis a size in the forward is, by its name: b(atch), c(hannels), f(rames), h, w, or None."""
    words = {
        "b": r"batch|^b$",
        "c": r"channel|^c$",
        "f": r"frame|^f$|^t$|^time$",
        "h": r"height|^h$",
        "w": r"width|^w$",
    }
    return next((axis for axis, pattern in words.items() if re.search(pattern, name, re.IGNORECASE)), None)


def _inner(own: Mapping[str, Any]) -> int | None:
    """Return the width of the model, heads times their size, or None."""
    sizes = [next((own[name] for name in names if type(own.get(name)) is int), None) for names in _WIDTH]
    return sizes[0] * sizes[1] if all(sizes) else None


def _size(name: str | None, settings: Mapping[str, Any], own: Mapping[str, Any]) -> str | int:
    """Return a number of the configuration: its name if the mini sets it, else its value."""
    value = own.get(name)
    return name if name in settings else value if type(value) is int and value > 0 else HEAD_DIM


def _is_on(name: str, own: Mapping[str, Any]) -> bool:
    """Return whether the configuration makes the forward use an optional argument."""
    switches = {"guidance": "guidance_embeds", "encoder_hidden_states_image": "image_dim"}
    return bool(own.get(switches[name])) if name in switches else not name.endswith("mask")


def _shares(axes: int) -> list[int]:
    """Return even numbers, one for each axis, whose sum is the size of a head."""
    share = HEAD_DIM // axes // 2 * 2
    return [HEAD_DIM - share * (axes - 1), *[share] * (axes - 1)]


def latents_per_token(model: torch.nn.Module) -> int:
    """Return how many latents a token is made of: 1 where the model takes tokens; else 4, which is usual."""
    return 1 if not any(isinstance(each, (torch.nn.Conv2d, torch.nn.Conv3d)) for each in model.modules()) else 4
