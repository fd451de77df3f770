"""The code between two submodules, of which what depends on known tensors runs once."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from toys import SPAN, agree, counts

MASK = torch.tensor([1.0, 0.0, 1.0])


def test_tensor_code_on_known_arguments_runs_once(patched):
    model, plain, handle = patched(SPAN)
    given = toys.inputs() | {"mask": MASK.clone()}
    agree(model, plain, *[given] * 4)
    row = toys.row(handle, "embed..blocks.0")
    assert row.misses == 4 and row.hits == 12 and not row.bypassed  # to, unsqueeze, mul, squeeze


def test_a_write_into_the_argument_or_another_one_is_a_miss(patched):
    model, plain, handle = patched(SPAN)
    given = toys.inputs() | {"mask": MASK.clone()}
    agree(model, plain, given, given)
    given["mask"][0] = 5.0
    agree(model, plain, given, given | {"mask": MASK.double()})
    assert toys.row(handle, "embed..blocks.0").misses == 12


def test_what_is_made_of_unknown_tensors_is_left_alone(patched):
    model, plain, handle = patched("- {at: embed..blocks.0, kind: mask}")
    agree(model, plain, *[toys.inputs() | {"mask": MASK}] * 3)
    assert counts(handle, "embed..blocks.0") == (0, 0, {})


def test_tensors_made_from_sizes_alone_are_kept(patched):
    model, plain, handle = patched("- {at: embed..blocks.0, kind: mask}")
    agree(model, plain, *[toys.inputs()] * 3)
    assert counts(handle, "embed..blocks.0") == (2, 1, {})


def test_a_span_may_begin_where_the_forward_does(patched):
    model, plain, handle = patched("- {at: ..first, kind: rope}", cls=toys.Counting)
    x = torch.randn(3, 2)
    agree(model, plain, *[{"x": x, "rows": [2, 0]}] * 3)
    assert counts(handle, "..first") == (4, 2, {})
    assert model.seen[0][0] is model.seen[2][0] and model.seen[0][1] is model.seen[2][1]
    agree(model, plain, {"x": x, "rows": [1, 0]})
    assert counts(handle, "..first") == (5, 3, {})
    handle.remove()
    model(x, [2, 0])
    assert model.seen[-1][0] is not model.seen[0][0]


def test_whether_a_known_tensor_is_true_is_asked_once(patched):
    model, plain, handle = patched(
        "- {at: first..last, kind: context, key: {model.mask: [identity]}}", cls=toys.Counting
    )
    x, zeros, ones = torch.randn(3, 2), [torch.zeros(2)], [torch.ones(2)]
    given = [{"x": x, "rows": [0], "mask": mask} for mask in (zeros, ones)]
    agree(model, plain, *given, *given, *given)
    row = toys.row(handle, "first..last")
    assert row.misses == 2 * 3 and row.hits == 4 * 3  # eq, all and bool
    zeros[0][1] = 1.0
    agree(model, plain, *given)
    assert toys.row(handle, "first..last").misses == 3 * 3


def test_nothing_outside_the_span_is_watched(patched):
    model, plain, handle = patched("- {at: table..time, kind: mask, key: {model.x: [identity]}}")
    given = toys.inputs()
    agree(model, plain, given, given)
    assert counts(handle, "table..time") == (0, 0, {})


def test_a_forward_that_raises_inside_a_span_leaves_nothing_switched_on(patched):
    model, plain, handle = patched(SPAN)
    model.bias_of = lambda mask: mask.nothing
    depth = torch._C._len_torch_function_stack()
    with pytest.raises(AttributeError):
        model(**toys.inputs(), mask=MASK)
    assert torch._C._len_torch_function_stack() == depth
    del model.bias_of
    agree(model, plain, *[toys.inputs() | {"mask": MASK}] * 2)


def test_a_span_that_the_forward_does_not_finish_ends_with_it(patched):
    model, plain, _ = patched("- {at: table..blocks.0, kind: mask, key: {model.mask: [identity]}}")
    given = {name: value for name, value in toys.inputs().items() if name != "text"}
    depth = torch._C._len_torch_function_stack()
    agree(model, plain, given, given)
    assert torch._C._len_torch_function_stack() == depth


def test_what_a_span_keeps_and_somebody_writes_into_switches_it_off(patched):
    model, plain, handle = patched("- {at: embed..blocks.0, kind: mask}")
    agree(model, plain, toys.inputs(), toys.inputs())
    (entry,) = handle.patched_models[0].patches[0].memo.cache.entries.values()
    entry.value.mul_(3)
    with pytest.warns(UserWarning, match="wrote into"):
        agree(model, plain, toys.inputs(), toys.inputs())


def test_a_span_is_not_entered_by_a_copy_or_after_removal(patched):
    model, plain, handle = patched(SPAN)
    given = toys.inputs() | {"mask": MASK}
    agree(model, plain, given)
    agree(copy.deepcopy(model), plain, given)
    handle.remove()
    agree(model, plain, given)
    assert counts(handle, "embed..blocks.0")[:2] == (0, 4)
    assert not model.embed._forward_hooks and not model.blocks[0]._forward_pre_hooks
