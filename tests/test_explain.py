"""`handle.explain()`: what each site depends on, and why its last call hit, was computed, or was passed through."""

from __future__ import annotations

import pytest
import torch

from dit_patch.cli import main


def about(handle, at):
    """The lines on one site."""
    lines = [line.strip() for line in handle.explain().splitlines()]
    start = lines.index(at)
    return lines[start : start + 4]


ROPE, TEXT, TIME = "rope.forward", "condition_embedder.text_embedder.forward", "condition_embedder.time_proj.forward"


def test_a_site_that_hits_says_what_it_depends_on(wan):
    handle, calls = wan.apply(), wan.calls()
    wan.agree(calls)
    text = about(handle, TEXT)
    assert text[1] == "last call: a hit"
    assert text[2].startswith("depends on: caption (identity); ") and "weights and buffers" in text[2]
    assert text[3] == "last computed, since caption is another"  # the other pass has another prompt
    assert about(handle, ROPE)[2].startswith("depends on: hidden_states (shape)")
    assert "between the model's arguments and the site" in about(handle, TIME)[2]
    assert about(handle, TIME)[3] == "last computed, since model.timestep is another"


def test_before_the_first_forward_nothing_was_called(wan):
    assert about(wan.apply(), ROPE)[1] == "not called so far"


@pytest.mark.parametrize(
    "edit, why",
    [
        (lambda model: setattr(model.condition_embedder.text_embedder, "training", True), "looked at once a forward"),
        (lambda model: model.condition_embedder.text_embedder.linear_1.bias.mul_(2), "a weight or an adapter"),
    ],
    ids=["attribute", "weight"],
)
def test_what_has_changed_is_named(wan, edit, why):
    handle, calls = wan.apply(), wan.calls()[:1]
    wan.agree(calls), wan.agree(calls)
    with torch.no_grad():
        for model in wan.both:
            edit(model)
            model.condition_embedder.text_embedder.training = False
            model.condition_embedder.text_embedder.extra = "attribute" if "once" in why else None
    if "weight" in why:
        for model in wan.both:
            del model.condition_embedder.text_embedder.extra
    wan.agree(calls)
    text = about(handle, TEXT)
    assert text[1] == "last call: computed and stored" and why in text[3]


def test_a_call_that_is_passed_through_says_why(wan):
    handle, calls = wan.apply(), wan.calls()
    wan.agree(calls)
    for model in wan.both:
        model.condition_embedder.text_embedder.linear_1.register_forward_hook(lambda *_: None)
    wan.agree(calls)
    text = about(handle, TEXT)
    assert text[1] == "last call: passed through: a hook is registered on a submodule, and a hit would skip it"
    assert "now left to the original: a hook is registered on a submodule" in text[2]


def test_another_shape_is_named(wan):
    handle = wan.apply()
    wan.agree(wan.calls())
    wan.agree(wan.calls(size=1)[:1])
    assert about(handle, ROPE)[3] == "last computed, since hidden_states is another"


def test_show_live_explains_the_small_model(capsys):
    assert main(["show", "diffusers/wan", "--live"]) == 0
    said = capsys.readouterr().out
    assert "last call: a hit" in said and "depends on: hidden_states (shape)" in said
