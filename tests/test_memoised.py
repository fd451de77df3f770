"""A result that is kept: what it depends on, how it is proven, where and as what it is kept."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
import toys
from toys import EMBED, TABLE, TIME, agree, counts

from dit_patch.errors import SiteError

# Keys.


def test_what_a_site_depends_on_is_computed_once(patched):
    model, plain, handle = patched(f"{TABLE}\n{TIME}\n{EMBED}")
    given = toys.inputs()
    agree(model, plain, *[given | {"x": torch.randn(2, 4)} for _ in range(5)])
    for at, module in (("table.forward", model.table), ("time.forward", model.time), ("embed.forward", model.embed)):
        assert counts(handle, at) == (4, 1, {})
        assert module._made == 2  # once more for the check at the first hit


def test_what_it_depends_on_makes_another_result(patched):
    model, plain, handle = patched(f"{TABLE}\n{TIME}\n{EMBED}")
    calls = [toys.inputs(size=4), toys.inputs(size=4, seed=1), toys.inputs(size=4, seed=2)]
    agree(model, plain, *calls, *calls, *calls)
    assert counts(handle, "table.forward") == (8, 1, {})
    assert counts(handle, "time.forward") == (6, 3, {})
    assert counts(handle, "embed.forward") == (6, 3, {})


def test_arguments_that_are_no_tensors_count_though_the_spec_does_not_name_them(patched):
    model, plain, handle = patched(TABLE)
    given = toys.inputs()
    agree(model, plain, *[given | {"scale": scale} for scale in (1.0, 2.0, 1, 1.0, 2.0, 1)])
    assert counts(handle, "table.forward") == (3, 3, {})


def test_a_tensor_argument_that_the_spec_does_not_name_stops_the_first_forward(patched):
    model, _, _ = patched("- {at: table.forward, kind: rope}")
    with pytest.raises(SiteError, match=r"(?s)toy: table.forward \(.*toy.yaml:3\): `x` is a tensor.*Add `x: \["):
        model(**toys.inputs())


def test_an_argument_of_the_model_s_forward_stands_for_what_is_made_from_it(patched):
    model, plain, handle = patched(
        "- {at: time.forward, kind: timestep, key: {t: [shape, dtype, device], model.t: [identity]}}", cls=toys.Twice
    )
    one, other = torch.tensor([1.0]), torch.tensor([2.0])
    agree(model, plain, *[{"t": t} for t in (one, one, other, other, one)])
    assert counts(handle, "time.forward") == (6, 4, {})


def test_outside_the_model_s_forward_such_a_site_is_passed_through(patched):
    model, plain, handle = patched("- {at: time.forward, kind: timestep, key: {t: [shape], model.t: [identity]}}")
    t = torch.ones(1)
    assert torch.equal(model.time(t), plain.time(t))
    assert counts(handle, "time.forward") == (0, 0, {"called outside the model's forward": 1})


def test_a_site_with_arguments_of_its_own_works_outside_the_forward_too(patched):
    model, plain, handle = patched(TABLE)
    x = torch.ones(1, 3)
    for _ in range(3):
        assert torch.equal(model.table(x), plain.table(x))
    assert counts(handle, "table.forward") == (2, 1, {})


def test_writing_into_a_tensor_that_counts_by_identity_is_a_miss(patched):
    model, plain, handle = patched(TIME)
    given = toys.inputs()
    agree(model, plain, given, given)
    given["t"].add_(1)
    agree(model, plain, given, given)
    assert counts(handle, "time.forward") == (2, 2, {})


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: setattr(m.table, "theta", 3.0),
        lambda m: m.table.axes.append(5),
        lambda m: m.table.base.mul_(2),
        lambda m: m.table.register_buffer("base", torch.arange(64.0) + 1),
    ],
)
def test_the_owner_s_buffers_and_attributes_count(patched, edit):
    model, plain, handle = patched(TABLE)
    given = toys.inputs()
    agree(model, plain, given, given)
    edit(model), edit(plain)
    agree(model, plain, given, given)
    assert counts(handle, "table.forward")[:2] == (2, 2)


def test_the_weights_of_modules_that_the_site_reads_count(patched):
    model, plain, handle = patched(
        "- {at: blocks.0.forward, kind: context, key: {text: [shape], model.text: [identity]}, reads: [embed]}"
    )
    given = toys.inputs()
    agree(model, plain, given, given)
    with torch.no_grad():
        for each in (model, plain):
            each.embed.first.weight.mul_(2)
    agree(model, plain, given, given)
    assert counts(handle, "blocks.0.forward") == (2, 2, {})


def test_autocast_is_another_call(patched):
    model, plain, handle = patched(EMBED)
    given = toys.inputs()
    agree(model, plain, given, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(model, plain, given, given)
    agree(model, plain, given)
    assert counts(handle, "embed.forward") == (3, 2, {})


def test_while_gradients_are_recorded_a_site_with_weights_is_passed_through(patched):
    model, _, handle = patched(f"{EMBED}\n{TABLE}")
    given = toys.inputs()
    model(**given).sum().backward()
    assert model.embed.first.weight.grad is not None
    assert counts(handle, "embed.forward") == (0, 0, {"autograd is recording": 1})
    assert counts(handle, "table.forward") == (0, 1, {})


def test_what_inference_cached_serves_training(patched):
    model, plain, handle = patched(TABLE)
    given = toys.inputs()
    with torch.inference_mode():
        model(**given)
    for each in (model, plain):
        each(**given).sum().backward()
    assert torch.equal(model.embed.first.weight.grad, plain.embed.first.weight.grad)
    assert counts(handle, "table.forward") == (1, 1, {})


def test_threads_share_results(patched):
    model, plain, handle = patched(f"{TABLE}\n{TIME}\n{EMBED}")
    calls = [toys.inputs(size=4, seed=seed) for seed in range(3)]
    failures = []

    def work():
        try:
            for _ in range(20):
                agree(model, plain, *calls)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    hits, misses, bypassed = counts(handle, "embed.forward")
    assert hits + misses == 240 and not bypassed and misses < 20


# What a result depends on besides the call.


def test_the_value_of_a_function_counts(patched, monkeypatch):
    monkeypatch.setattr(toys, "rank", [0])
    model, plain, handle = patched("- {at: table.forward, kind: rope, key: {x: [shape]}, reads: ['toys:my_rank']}")
    for rank in (0, 0, 1, 1, 0):
        toys.rank[0] = rank
        agree(model, plain, toys.inputs())
    assert counts(handle, "table.forward") == (3, 2, {})


def test_a_star_in_reads_is_what_it_is_in_the_address(patched):
    site = "- {at: blocks.*.last.forward, kind: context, key: {input: [shape], model.text: [identity]}, "
    model, plain, handle = patched(site + "reads: [blocks.*.first]}")
    given = toys.inputs()
    agree(model, plain, given, given)
    before = counts(handle, "blocks.*.last.forward")
    for each in (model, plain):
        with torch.no_grad():
            each.blocks[1].first.weight.mul_(2)
    agree(model, plain, given)
    hits, misses, _ = counts(handle, "blocks.*.last.forward")
    assert (hits - before[0], misses - before[1]) == (1, 1)


# A key that is too coarse, or a result that is written into.


def test_a_key_that_is_too_coarse_switches_the_site_off(patched):
    model, plain, handle = patched("- {at: time.forward, kind: timestep, key: {t: [shape]}}")
    first, second = toys.inputs(), toys.inputs() | {"t": torch.tensor([7.0, 9.0])}
    agree(model, plain, first)
    with pytest.warns(UserWarning, match=r"toy: time.forward \(.*\): a cached result differs from a fresh one") as seen:
        agree(model, plain, second, first, second)
    assert len(seen) == 1
    row = toys.row(handle, "time.forward")
    assert any(note.startswith("switched off: a cached result differs") for note in row.notes)
    assert row.nbytes == 0


def test_check_never_believes_the_spec(patched):
    model, plain, handle = patched("- {at: time.forward, kind: timestep, key: {t: [shape]}}", check="never")
    first, second = toys.inputs(), toys.inputs() | {"t": torch.tensor([7.0, 9.0])}
    with torch.no_grad():
        assert torch.equal(model(**first), plain(**first))
        assert not torch.equal(model(**second), plain(**second))


def test_check_always_recomputes_every_hit(patched):
    model, plain, _ = patched(TABLE, check="always")
    agree(model, plain, *[toys.inputs()] * 4)
    assert model.table._made == 4


def test_a_result_that_somebody_wrote_into_is_not_used_again(patched):
    model, plain, handle = patched(TABLE)
    given = toys.inputs()
    agree(model, plain, given, given)
    model.seen.zero_()
    with pytest.warns(UserWarning, match="somebody wrote into a cached result") as seen:
        agree(model, plain, given, given)
    assert len(seen) == 1
    assert toys.row(handle, "table.forward").notes[0].startswith("switched off: somebody wrote into")


# Where and as what a result is kept.


def test_a_dtype_is_converted_to_once(patched):
    model, _, handle = patched("- {at: table.forward, kind: rope, key: {x: [shape]}, dtype: float16}")
    for _ in range(3):
        model(**toys.inputs())
        assert model.seen.dtype == torch.float16
    assert counts(handle, "table.forward") == (2, 1, {})
    assert toys.row(handle, "table.forward").nbytes == 8


def test_on_the_device_of_the_model_means_where_its_first_tensor_argument_is(patched):
    model, plain, handle = patched("- {at: table.forward, kind: rope, key: {x: [shape]}, device: model}")
    agree(model, plain, *[toys.inputs()] * 3)
    assert model.seen.device == torch.device("cpu")
    assert counts(handle, "table.forward") == (2, 1, {})


def test_what_an_earlier_forward_left_behind_is_cleared_and_put_back(patched):
    before = toys.Lazy().left
    model, plain, handle = patched(
        "- {at: lazy.forward, kind: rope, key: {x: [shape]}, clears: [lazy.left]}",
        cls=toys.Holder,
        prepare=lambda model: setattr(model.lazy, "left", torch.full((3,), 5.0)),
    )
    assert before is None and model.lazy.left is None
    left = handle.patched_models[0].patches[0]._leftovers._values[0]
    handle.remove()
    assert model.lazy.left is left and left.eq(5).all()


def test_results_that_are_too_large_are_passed_through(patched):
    model, plain, handle = patched(TABLE, max_bytes=15)
    agree(model, plain, toys.inputs(), toys.inputs())
    assert counts(handle, "table.forward") == (0, 2, {"a result of 0.0 MiB is larger than max_bytes": 2})


def test_sites_share_the_budget(patched):
    model, plain, handle = patched(f"{TABLE}\n{TIME}", max_bytes=47)
    agree(model, plain, *[toys.inputs()] * 3)
    assert handle.nbytes <= 47
    reasons = {reason for row in handle.stats() for reason in row.bypassed}
    assert reasons == {"no room beside what the last forwards used; a larger max_bytes would keep it"}


# Fixes.


BIND = "- {at: prepare_mask, kind: mask, bind: {window: model.window}}"


def test_an_override_that_upstream_ignores_is_passed_on_only_with_fixes(patched):
    model, plain, _ = patched(BIND)
    agree(model, plain, toys.inputs() | {"window": 3})
    fixed, _, handle = patched(BIND, fixes=True)
    given = toys.inputs()
    with torch.no_grad():
        fixed(**given)  # which leaves an attribute on the model that was not there before
        for window in (3, 2, 3):
            expected = plain(**given) - plain.prepare_mask(4, 1) + plain.prepare_mask(4, window)
            assert torch.allclose(fixed(**given, window=window), expected)
    assert counts(handle, "prepare_mask") == (1, 3, {})
    assert "fixes on" in str(handle)


def test_an_override_that_the_caller_does_not_give_overrides_nothing(patched):
    model, plain, _ = patched(BIND, fixes=True)
    agree(model, plain, toys.inputs(), toys.inputs() | {"window": None})


def test_an_override_of_an_argument_that_is_not_given_by_position_is_given_by_name(patched):
    seen = []

    def note(model):
        below = model.table.forward

        @functools.wraps(below)
        def forward(*args, **kwargs):
            seen.append(kwargs)
            return below(*args, **kwargs)

        model.table.forward = forward

    fixed, plain, _ = patched(
        "- {at: table.forward, kind: rope, key: {x: [shape]}, bind: {device: model.window}}", prepare=note, fixes=True
    )
    agree(fixed, plain, toys.inputs() | {"window": 3})
    assert seen == [{"device": 3}]
