"""Where a site is: children, methods, globals; and what is said of addresses and names that are wrong."""

from __future__ import annotations

import inspect

import pytest
import torch
import toys
from toys import TABLE, agree, counts

from dit_patch.errors import SiteError

# Addresses.


def test_a_star_stands_for_every_child_each_with_results_of_its_own(patched):
    model, plain, handle = patched("- {at: blocks.*.forward, kind: context, key: {text: [values]}}")
    given = toys.inputs()
    agree(model, plain, given, given, given)
    row = toys.row(handle, "blocks.*.forward")
    assert (row.targets, row.hits, row.misses) == (2, 4, 2)


def test_a_staticmethod_of_the_model(patched):
    model, plain, handle = patched("- {at: prepare_mask, kind: mask}")
    agree(model, plain, toys.inputs())  # which leaves an attribute on the model that was not there before
    agree(model, plain, toys.inputs(), toys.inputs(), {"x": torch.ones(1, 6)})
    assert counts(handle, "prepare_mask") == (1, 3, {})


@pytest.mark.parametrize("at", ["forward:shift", "toys:shift"])
def test_a_global_acts_only_inside_the_forward_of_a_patched_model(patched, at):
    model, plain, handle = patched(f"- {{at: '{at}', kind: rotary, key: {{x: [values]}}}}")
    x = torch.ones(2)
    for _ in range(3):
        assert toys.shift(x).eq(2).all()
        agree(plain, plain, toys.inputs())
    assert counts(handle, at) == (0, 0, {})
    agree(model, plain, toys.inputs(), toys.inputs())
    assert counts(handle, at) == (1, 1, {})


def test_a_global_is_the_one_that_the_class_s_own_forward_sees(patched, monkeypatch):
    # A subclass elsewhere that overrides forward calls the functions of its own module.
    elsewhere = type(inspect)("elsewhere")
    source = """
import torch
def shift(x, by=2.0):
    return x + by
class Model(torch.nn.Module):
    def forward(self, x):
        return shift(x)
"""
    exec(source, vars(elsewhere))
    monkeypatch.setitem(__import__("sys").modules, "elsewhere", elsewhere)
    model, plain, handle = patched("- {at: 'forward:shift', kind: rotary, key: {x: [values]}}", cls=elsewhere.Model)
    before = toys.shift
    agree(model, plain, *[{"x": torch.ones(2)}] * 3)
    assert toys.shift is before
    assert counts(handle, "forward:shift") == (2, 1, {})


def test_a_subclass_that_inherits_forward_uses_its_parent_s_globals(patched):
    cls = type("Inheriting", (toys.Toy,), {"__module__": "toys", "__qualname__": "Child"})
    model, plain, handle = patched("- {at: 'forward:shift', kind: rotary, key: {x: [values]}}", cls=cls)
    agree(model, plain, toys.inputs(), toys.inputs())
    assert counts(handle, "forward:shift") == (1, 1, {})


def test_two_models_that_share_a_global_do_not_share_results(patched):
    site = "- {at: 'forward:shift', kind: rotary, key: {x: [values]}}"
    one, plain, first = patched(site)
    two, _, second = patched(site)
    agree(one, plain, toys.inputs(), toys.inputs())
    agree(two, plain, toys.inputs())
    assert counts(first, "forward:shift") == (1, 1, {})
    assert counts(second, "forward:shift") == (0, 1, {})


# Addresses and names that are wrong.


@pytest.mark.parametrize(
    "site, message",
    [
        (
            "{at: tabel.forward, kind: rope}",
            "toy: tabel.forward (FILE): Toy has no submodule `tabel`; did you mean `table`?\n"
            "    It has: table, time, embed, blocks.",
        ),
        (
            "{at: table.forwards, kind: rope}",
            "toy: table.forwards (FILE): a Table has no method `forwards`; did you mean `forward`?",
        ),
        (
            "{at: embed.first.weight, kind: rope}",
            "toy: embed.first.weight (FILE): a Linear has no method `weight`",
        ),
        (
            "{at: table.*.forward, kind: rope}",
            "toy: table.*.forward (FILE): Toy.table has no submodule `*`\n    It has: none.",
        ),
        (
            "{at: 'forward:shfit', kind: rotary}",
            "toy: forward:shfit (FILE): toys has no function `shfit`; did you mean `shift`?",
        ),
        (
            "{at: 'nowhere.at.all:f', kind: rotary}",
            "toy: nowhere.at.all:f (FILE): cannot import `nowhere.at.all`: No module named 'nowhere'",
        ),
        (
            "{at: table.forward, kind: rope, key: {hidden: [shape]}}",
            "toy: table.forward (FILE): it has no parameter `hidden`\n    Parameters: x, scale, device.",
        ),
        (
            "{at: table.forward, kind: rope, key: {scales: [shape]}}",
            "toy: table.forward (FILE): it has no parameter `scales`; did you mean `scale`?\n"
            "    Parameters: x, scale, device.",
        ),
        (
            "{at: table.forward, kind: rope, key: {x: [shape], model.texts: [identity]}}",
            "toy: table.forward (FILE): the model has no parameter `texts`; did you mean `text`?\n"
            "    Parameters: x, t, text, mask, window, scale.",
        ),
        (
            "{at: prepare_mask, kind: mask, bind: {windw: model.window}}",
            "toy: prepare_mask (FILE): it has no parameter `windw`; did you mean `window`?\n"
            "    Parameters: size, window.",
        ),
        (
            "{at: embed..blocks.7, kind: mask}",
            "toy: embed..blocks.7 (FILE): Toy.blocks has no submodule `7`\n    It has: 0, 1.",
        ),
        (
            "{at: embed..blocks.0, kind: mask, key: {model.masks: [identity]}}",
            "toy: embed..blocks.0 (FILE): the model's forward has no parameter `masks`; did you mean `mask`?",
        ),
        (
            "{at: table.forward, kind: rope, key: {x: [shape]}, reads: [embd]}",
            "toy: table.forward (FILE): Toy has no submodule `embd`; did you mean `embed`?\n"
            "    It has: table, time, embed, blocks.",
        ),
    ],
)
def test_a_mistake_is_told_with_what_there_is_instead(tmp_path, site, message):
    model = toys.build()
    before = toys.snapshot(model)
    with pytest.raises(SiteError) as caught:
        toys.patch(model, tmp_path, f"- {site}")
    assert str(caught.value) == message.replace("FILE", f"{tmp_path}/toy.yaml:3")
    assert toys.same_snapshot(before, toys.snapshot(model))


def test_an_optional_site_that_is_not_there_is_reported_and_the_others_work(patched):
    model, plain, handle = patched(f"- {{at: image.forward, kind: context, optional: true}}\n{TABLE}")
    agree(model, plain, toys.inputs(), toys.inputs())
    row = toys.row(handle, "image.forward")
    assert (row.targets, row.notes) == (0, ("not in this model",))
    assert "not in this model" in str(handle)


@pytest.mark.parametrize(
    "rest, message",
    [
        ("key: {nothing: [shape]}", "it has no parameter `nothing`"),
        ("key: {x: [shape]}, reads: [embd]", "Toy has no submodule `embd`"),
        ("key: {x: [shape]}, reads: ['toys:nothing']", "`toys:nothing` cannot be found"),
    ],
)
def test_an_optional_site_with_a_wrong_name_is_an_error(patched, rest, message):
    with pytest.raises(SiteError, match=message):
        patched(f"- {{at: table.forward, kind: rope, optional: true, {rest}}}")
