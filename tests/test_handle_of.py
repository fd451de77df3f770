"""A handle that was not kept: `handle_of` finds it, and `remove` takes everything back."""

import json
import logging

import pytest
import torch
import toys

import dit_patch
from dit_patch.errors import DitPatchError


@pytest.fixture
def apply(tmp_path):
    toys.write_spec(tmp_path, "- {at: table.forward, kind: rope, key: {x: [shape]}}")

    def apply(target, **options):
        return dit_patch.apply(target, specs=[tmp_path], **options)

    return apply


class Pipeline:
    def __init__(self, **components):
        self.components = components


def test_the_handle_of_a_model_and_of_its_pipeline_is_found(apply):
    model = toys.build()
    pipeline = Pipeline(transformer=model)
    assert dit_patch.handle_of(pipeline) is None and dit_patch.handle_of(model) is None
    handle = apply(pipeline)
    assert dit_patch.handle_of(pipeline) is handle and dit_patch.handle_of(model) is handle


def test_remove_takes_everything_back_once(apply):
    model = toys.build()
    before = toys.snapshot(model)
    apply(model, only="rope")
    assert dit_patch.remove(Pipeline(transformer=model)) is True
    assert toys.same_snapshot(before, toys.snapshot(model)) and dit_patch.remove(model) is False
    assert apply(model) is not None  # with other options, now that nothing is patched


def test_a_model_inside_another_is_found_too(apply):
    model = toys.build()
    handle = apply(model)
    assert dit_patch.handle_of(Pipeline(encoder=torch.nn.Sequential(model))) is handle


def test_of_two_handles_one_has_to_be_asked_for_and_remove_takes_both_back(apply):
    one, other = toys.build(), toys.build()
    handles = apply(one), apply(other)
    pipeline = Pipeline(transformer=one, transformer_2=other)
    with pytest.raises(DitPatchError, match="2 handles have patched models in this Pipeline"):
        dit_patch.handle_of(pipeline)
    assert [dit_patch.handle_of(each) for each in (one, other)] == list(handles)
    assert dit_patch.remove(pipeline) is True and dit_patch.handle_of(pipeline) is None


def test_what_is_no_pipeline_is_refused():
    for ask in (dit_patch.handle_of, dit_patch.remove):
        with pytest.raises(DitPatchError, match="expected a pipeline or a torch.nn.Module, got `3`"):
            ask(3)


def test_applying_and_removing_are_logged(apply, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dit_patch"), "disabled", False)  # import-linter disables all that there are
    caplog.set_level(logging.INFO, "dit_patch")
    handle = apply(toys.build())
    handle.remove()
    assert [each.getMessage().split()[:2] for each in caplog.records] == [["patched", "model"], ["took", "back"]]


def test_rows_are_json_and_a_notebook_gets_a_table(apply):
    model = toys.build()
    handle = apply(model)
    for _ in range(2):
        model(**toys.inputs())
    rows = json.loads(json.dumps([row.as_dict() for row in handle.stats()]))
    assert rows and all(row["hits"] >= 0 and isinstance(row["is_replacement"], bool) for row in rows)
    page = handle._repr_html_()
    assert page.startswith("<div>") and page.count("<tr>") == len(rows) + 1
    assert all(row["at"] in page for row in rows)
