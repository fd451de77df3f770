"""What a spec can say of one site, on small models: keys, replacements, stand-ins, addresses, and spans."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
import types

import pytest
import torch
import toys

from dit_patch.errors import SiteError
from dit_patch.memo import keys
from dit_patch.memo.keys import same_bits
from dit_patch.spec.fingerprint import fingerprint
from dit_patch.upstream import torch_internals

TABLE = "- {at: table.forward, kind: rope, key: {x: [shape]}}"
TIME = "- {at: time.forward, kind: timestep, key: {t: [identity]}}"
EMBED = "- {at: embed.forward, kind: context, key: {text: [identity]}}"
SPAN = "- {at: embed..blocks.0, kind: mask, key: {model.mask: [identity]}}"


@pytest.fixture
def patched(tmp_path):
    """`patched(sites)`: a toy model, its unpatched twin, and the handle of a spec with these sites."""
    handles = []

    def make(sites, cls=toys.Toy, prepare=None, **options):
        model, plain = toys.build(cls), toys.build(cls)
        if prepare is not None:
            prepare(model)
        handles.append(toys.patch(model, tmp_path / str(len(handles)), sites, **options))
        return model, plain, handles[-1]

    yield make
    for handle in handles:
        handle.remove()


def agree(model, plain, *calls):
    """Both give the same bits for each call; calls are made without autograd."""
    with torch.no_grad():
        for call in calls:
            assert same_bits(model(**call), plain(**call))


def counts(handle, at):
    row = toys.row(handle, at)
    return row.hits, row.misses, dict(row.bypassed)


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


# A key that is too coarse, or a result that is written into.


def test_a_key_that_is_too_coarse_switches_the_site_off_and_the_right_result_is_returned(patched):
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


# Addresses.


def test_a_star_stands_for_every_child_each_with_results_of_its_own(patched):
    model, plain, handle = patched("- {at: blocks.*.forward, kind: context, key: {text: [values]}}")
    given = toys.inputs()
    agree(model, plain, given, given, given)
    row = toys.row(handle, "blocks.*.forward")
    assert (row.targets, row.hits, row.misses) == (2, 4, 2)


def test_a_staticmethod_of_the_model(patched):
    model, plain, handle = patched("- {at: prepare_mask, kind: mask}")
    agree(model, plain, toys.inputs(), toys.inputs(), {"x": torch.ones(1, 6)})
    assert counts(handle, "prepare_mask") == (1, 2, {})


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


def test_a_subclass_in_another_module_that_inherits_forward_uses_its_parent_s_globals(patched):
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


def test_an_override_that_upstream_ignores_is_passed_on_only_when_fixes_are_asked_for(patched):
    model, plain, _ = patched(BIND)
    agree(model, plain, toys.inputs() | {"window": 3})
    fixed, _, handle = patched(BIND, fixes=True)
    given = toys.inputs()
    with torch.no_grad():
        for window in (3, 2, 3):
            expected = plain(**given) - plain.prepare_mask(4, 1) + plain.prepare_mask(4, window)
            assert torch.allclose(fixed(**given, window=window), expected)
    assert counts(handle, "prepare_mask") == (1, 2, {})
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


# Stand-ins for results that nobody reads.


def test_a_stand_in_is_nan_in_the_shape_of_the_result_and_takes_no_memory(patched):
    model, plain, handle = patched("- {at: table.forward, kind: rope, unused: true}")
    with torch.no_grad():
        for _ in range(3):
            result = model(**toys.inputs())
            assert result.isnan().all()
    plain(**toys.inputs())
    assert model.seen.shape == plain.seen.shape and model.seen.dtype == plain.seen.dtype
    assert model.seen.untyped_storage().nbytes() == 4
    assert model.table._made == 1
    assert counts(handle, "table.forward") == (2, 1, {})


def test_after_clearing_a_stand_in_is_made_anew(patched):
    model, _, handle = patched("- {at: table.forward, kind: rope, unused: true}")
    model(**toys.inputs())
    handle.clear()
    model(**toys.inputs())
    assert model.table._made == 2


def test_a_result_is_unused_only_with_what_makes_it_so(patched):
    site = "- {at: table.forward, kind: rope, key: {x: [shape]}, unused_with: [model.mask, model.window]}"
    model, plain, handle = patched(site)
    agree(model, plain, toys.inputs() | {"window": 1})
    for mask in ([MASK, None], [None]):
        with torch.no_grad(), contextlib.suppress(AttributeError):  # the toy wants a tensor
            model(**toys.inputs() | {"mask": mask, "window": 1})
        assert not model.seen.isnan().any()
    with torch.no_grad():
        model(**toys.inputs() | {"mask": MASK, "window": 1})
    assert model.seen.isnan().all()


# While a CUDA graph is captured. There is no GPU here: torch is made to say what it would say on one.


@pytest.fixture
def cuda(monkeypatch):
    """A current CUDA stream, by number, and whether a graph is being captured on it."""
    state = types.SimpleNamespace(stream=1, capturing=False)
    for module in (keys, torch_internals):
        monkeypatch.setattr(module, "is_cuda_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(keys, "raw_stream", lambda device: state.stream)
    return state


def capture(cuda):
    cuda.stream, cuda.capturing = 7, True  # capture has a stream of its own


def test_a_graph_takes_what_depends_on_no_content_and_computes_the_rest_itself(patched, cuda):
    model, plain, handle = patched(f"{TABLE}\n{EMBED}")
    given = toys.inputs()
    agree(model, plain, given, given, given)
    made = model.table._made, model.embed._made
    capture(cuda)
    agree(model, plain, given)
    assert (model.table._made, model.embed._made) == (made[0], made[1] + 1)
    assert counts(handle, "table.forward") == (3, 1, {})
    assert counts(handle, "embed.forward")[2] == {"a CUDA graph is being captured": 1}
    cuda.stream, cuda.capturing = 2, False
    agree(model, plain, given)
    assert counts(handle, "table.forward")[:2] == (3, 2), "another stream's table"


def test_a_graph_takes_nothing_that_is_not_there_or_not_checked(patched, cuda):
    model, plain, handle = patched(TABLE)
    agree(model, plain, toys.inputs())
    capture(cuda)
    agree(model, plain, toys.inputs(), {"x": torch.randn(2, 6)})
    assert counts(handle, "table.forward") == (0, 1, {"a CUDA graph is being captured": 2})
    assert handle.nbytes == 16


def test_a_graph_takes_stand_ins_and_proven_replacements(patched, cuda):
    unused = "- {at: table.forward, kind: rope, unused: true}"
    replaced = f"- {{at: time.forward, kind: timestep, use: '{GOOD}', source: '{SOURCE}'}}"
    model, _, _ = patched(f"{unused}\n{replaced}")
    fresh, _, _ = patched(f"{unused}\n{replaced}")
    model(**toys.inputs())
    made = model.table._made, model.time._made
    capture(cuda)
    model(**toys.inputs())
    assert model.seen.isnan().all() and (model.table._made, model.time._made) == made
    fresh(**toys.inputs())
    assert not fresh.seen.isnan().any() and fresh.time._made == 1


def test_a_graph_takes_from_a_span_what_no_tensor_went_into(patched, cuda):
    model, plain, handle = patched(
        "- {at: ..first, kind: rope}\n- {at: first..last, kind: context, key: {model.mask: [identity]}}",
        cls=toys.Counting,
    )
    given = {"x": torch.randn(3, 2), "rows": [2, 0], "mask": [torch.zeros(2)]}
    agree(model, plain, given, given, given)
    before = counts(handle, "..first"), counts(handle, "first..last")
    capture(cuda)
    agree(model, plain, given)
    assert model.seen[3][0] is model.seen[0][0]
    assert counts(handle, "..first") == (before[0][0] + 2, before[0][1], {})
    assert counts(handle, "first..last") == before[1]


# Results that are put through a function.


def test_a_result_is_put_through_what_then_names(patched):
    model, plain, handle = patched("- {at: table.forward, kind: rope, then: 'toys:negated'}")
    with torch.no_grad():
        model(**toys.inputs()), plain(**toys.inputs())
    assert torch.equal(model.seen, -plain.seen)
    assert counts(handle, "table.forward") == (1, 0, {})
    handle.remove()
    model(**toys.inputs())
    assert torch.equal(model.seen, plain.seen)


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


# Replacements.

SOURCE = fingerprint(toys.Sinusoid.forward)
GOOD, OFF = "toys:good_sinusoid", "toys:sinusoid_off_by_a_bit"


def use(function, key="", source=SOURCE):
    return f"- {{at: time.forward, kind: timestep, use: '{function}', source: '{source}'{key}}}"


KEY = ", key: {t: [identity]}"


@pytest.mark.parametrize("key, computed", [("", [1, 1, 1]), (KEY, [1, 1, 1])], ids=["called each time", "memoised"])
def test_a_replacement_is_held_to_the_original_once_for_each_signature(patched, key, computed):
    model, plain, handle = patched(use(GOOD, key))
    given = toys.inputs()
    made = []
    for _ in range(3):
        agree(model, plain, given)
        made.append(model.time._made)
    assert made == computed
    agree(model, plain, given | {"t": torch.tensor([1.0])}, given | {"t": torch.tensor([1.0])})
    assert toys.row(handle, "time.forward").notes == () or key


def test_a_replacement_that_is_one_bit_off_is_caught_and_the_original_used(patched):
    model, plain, handle = patched(use(OFF))
    with pytest.warns(UserWarning, match=f"{OFF} is not equal to the original here; the original is used") as seen:
        agree(model, plain, *[toys.inputs()] * 3)
    assert len(seen) == 1
    assert "switched off: its replacement is not equal to the original here" in toys.row(handle, "time.forward").notes


def test_with_a_key_the_original_is_memoised_instead(patched):
    model, plain, handle = patched(use(OFF, KEY))
    given = toys.inputs()
    with pytest.warns(UserWarning, match="is not equal to the original here") as seen:
        agree(model, plain, given, given, given)
    assert len(seen) == 1
    assert counts(handle, "time.forward") == (2, 1, {})


def test_check_never_believes_a_replacement(patched):
    model, plain, _ = patched(use(OFF), check="never")
    with torch.no_grad():
        assert not torch.equal(model.time(torch.ones(1)), plain.time(torch.ones(1)))
    assert model.time._made == 1  # by the replacement itself


def test_a_replacement_for_another_source_is_not_used(patched):
    with pytest.warns(UserWarning, match=rf"{SOURCE}, and {GOOD} was written for 0+;"):
        model, plain, handle = patched(use(GOOD, KEY, source="0" * 12))
    given = toys.inputs()
    agree(model, plain, given, given, given)
    assert model.time._made == 2
    assert toys.row(handle, "time.forward").notes == (f"{GOOD} is for another version of the original, and not used",)


def test_without_a_key_such_a_site_is_left_alone(patched):
    with pytest.warns(UserWarning, match="the original is used"):
        model, plain, handle = patched(f"{use(GOOD, source='0' * 12)}\n{TABLE}")
    agree(model, plain, toys.inputs())
    assert "forward" not in vars(model.time)
    assert toys.row(handle, "time.forward").targets == 0


@pytest.mark.parametrize("function", ["toys:nothing", "nowhere:nothing"])
def test_a_replacement_that_does_not_exist_is_an_error(patched, function):
    with pytest.raises(SiteError, match=rf"`{function}` cannot be found"):
        patched(use(function))


# The code between two submodules.

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


def test_an_optional_site_that_is_there_with_a_wrong_argument_is_an_error_all_the_same(patched):
    with pytest.raises(SiteError, match="it has no parameter `nothing`"):
        patched("- {at: table.forward, kind: rope, optional: true, key: {nothing: [shape]}}")
