"""What dit_patch knows of PEFT beyond its documented interface; PEFT itself is not imported."""

from __future__ import annotations

from collections.abc import Hashable


def is_adapter(layer: dict) -> bool:
    """Return whether a module, given as its `__dict__`, is a PEFT layer: it has `merged_adapters`."""
    return "merged_adapters" in layer


def adapter_state(layer: dict) -> Hashable:
    """Return what decides a LoRA layer's output besides weights: scaling, and the active, disabled, merged adapters.

    Read from the layer's `__dict__`, since it is at each call of a site with LoRA inside: `_active_adapter`,
    `_disable_adapters`, `scaling`, `merged_adapters`. A merge changes the weights through `.data`, which leaves no
    version behind: without this, results of the adapter before would be handed out.

    Seen in PEFT 0.21, tuners/tuners_utils.py. Where a name is gone, its part no longer counts.
    """
    active = layer.get("_active_adapter", ())
    return (
        tuple((name, repr(scale)) for name, scale in layer.get("scaling", {}).items()),
        active if isinstance(active, str) else tuple(active),
        layer.get("_disable_adapters", False),
        tuple(layer["merged_adapters"]),
    )
