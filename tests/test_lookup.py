"""A memoised call: computed once, checked at its first hit, switched off rather than believed when it is wrong."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from dit_patch.findings import DitPatchWarning, FindingKind
from dit_patch.memo.keys import Dependencies
from dit_patch.memo.lookup import Memo
from dit_patch.memo.results import same, tensors_in
from dit_patch.memo.store import Budget

MEGABYTE = 1 << 20


class Call:
    """One call that counts how often it is computed; `key` and `signature` as a site would give them."""

    def __init__(self, function, *, key="key", signature="signature", sources=(), stored=(), alive=()):
        self.function, self.key, self._signature = function, key, signature
        self._sources, self._stored, self._alive = list(sources), list(stored), list(alive)
        self.computed = 0

    def compute(self):
        self.computed += 1
        return self.function()

    def dependencies(self):
        dependencies = Dependencies()
        for tensor in self._alive:
            dependencies.follow(tensor)
        return dependencies

    def signature(self):
        return self._signature

    def sources(self):
        return self._sources

    def stored(self):
        return self._stored


def memo(check="first", max_bytes=MEGABYTE):
    return Memo("toy: rope.forward", Budget(max_bytes), check)


def ask(memo, call):
    """As a site asks: `ready` first, `recall` where that leaves it open."""
    entry = memo.get(call.key)
    return memo.recall(call.key, call) if entry is None else entry.result()


def counts(memo):
    return memo.cache.hits, memo.cache.misses, dict(memo.bypassed)


# Hits and misses.


def test_a_call_is_computed_once_and_checked_once():
    site, call = memo(), Call(lambda: torch.ones(3))
    with torch.no_grad():
        results = [ask(site, call) for _ in range(5)]
    assert all(result is results[0] for result in results)
    assert call.computed == 2
    assert counts(site) == (4, 1, {})


def test_other_keys_of_a_signature_that_was_checked_are_not_checked_again():
    site = memo()
    calls = [Call(lambda: torch.ones(3), key=number) for number in range(2)]
    for call in calls * 3:
        ask(site, call)
    assert sum(call.computed for call in calls) == 2 + 2  # all stored before the first hit: each is checked
    later = [Call(lambda: torch.ones(3), key=number) for number in range(2, 4)]
    for call in later * 3:
        ask(site, call)
    assert [call.computed for call in later] == [1, 1]


def test_later_hits_are_checked_at_growing_distances():
    site, call = memo(), Call(lambda: torch.ones(3))
    computed = []
    for _ in range(600):
        ask(site, call)
        computed.append(call.computed)
    checked = [at for at in range(1, 600) if computed[at] > computed[at - 1]]
    assert checked == [1, 9, 65, 513]  # the hit after the 8th, the 64th, the 512th


def test_a_later_check_that_finds_another_result_switches_the_site_off():
    site, values = memo(), [torch.ones(3)]
    call = Call(lambda: values[0].clone())
    for _ in range(9):
        ask(site, call)
    values[0] = torch.zeros(3)
    with pytest.warns(DitPatchWarning, match="too coarse"):
        assert torch.equal(ask(site, call), torch.zeros(3))
    assert site.off is not None


def test_a_result_that_somebody_has_marked_for_gradients_is_made_anew():
    site, call = memo(), Call(lambda: torch.ones(3))
    with torch.no_grad():
        first = ask(site, call)
        ask(site, call)
    first.requires_grad_()
    second = ask(site, call)
    assert not second.requires_grad and second is not first
    assert call.computed == 3


def test_what_goes_out_while_autograd_records_is_not_what_is_stored():
    site, call = memo(), Call(lambda: torch.ones(3))
    first, second = ask(site, call), ask(site, call)
    first.requires_grad_().retain_grad()
    assert not second.requires_grad and second.data_ptr() == first.data_ptr()
    assert not ask(site, call).requires_grad and call.computed == 2


def test_another_signature_is_checked_again():
    site = memo()
    for signature in ("a", "b"):
        call = Call(lambda: torch.ones(3), key=signature, signature=signature)
        ask(site, call), ask(site, call), ask(site, call)
        assert call.computed == 2


def test_check_never_trusts_and_check_always_recomputes_each_hit():
    trusting, doubting = memo("never"), memo("always")
    for site, computed in ((trusting, 1), (doubting, 5)):
        call = Call(lambda: torch.ones(3))
        with torch.no_grad():
            results = [ask(site, call) for _ in range(5)]
        assert call.computed == computed
        assert all(result is results[0] for result in results)
        assert counts(site) == (4, 1, {})


def test_results_can_be_used_under_inference_mode_and_in_training():
    site = memo()
    weight = torch.ones(3, requires_grad=True)
    call = Call(lambda: weight * 2)
    with torch.inference_mode():
        first = ask(site, call)
    assert not first.is_inference() and not first.requires_grad
    (ask(site, call) * weight).sum().backward()
    assert weight.grad.eq(2).all()


def test_an_exception_leaves_nothing_behind_and_may_be_followed_by_a_result():
    site, answers = memo(), [ZeroDivisionError(), torch.ones(1)]

    def function():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    call = Call(function)
    with pytest.raises(ZeroDivisionError):
        ask(site, call)
    assert not site.cache.entries and torch.is_grad_enabled()
    assert ask(site, call).eq(1).all()


def test_the_time_of_a_result_is_the_shortest_that_was_seen():
    site, naps = memo("always"), [0.02, 0.001, 0.02]
    call = Call(lambda: time.sleep(naps.pop(0)))
    for _ in range(3):
        ask(site, call)
    assert 0.001 <= site.seconds < 0.02


def test_a_result_whose_key_can_never_come_again_is_dropped():
    site, tensor = memo(), torch.ones(4)
    ask(site, Call(lambda: torch.ones(100), key="dead", alive=[tensor]))
    del tensor
    ask(site, Call(lambda: torch.ones(1), key="alive"))
    assert list(site.cache.entries) == ["alive"]


# A cache that cannot lie.


def test_a_key_that_is_too_coarse_is_caught_at_the_first_hit():
    site, number = memo(), iter(range(10))
    call = Call(lambda: torch.tensor(float(next(number))))
    assert ask(site, call) == 0
    with pytest.warns(
        UserWarning, match="dit_patch: toy: rope.forward: a cached result differs from a fresh one"
    ) as seen:
        assert ask(site, call) == 1
    assert len(seen) == 1
    assert site.off.kind is FindingKind.TOO_COARSE
    assert not site.cache.entries
    assert counts(site) == (0, 1, {site.off.note: 1})


def test_a_key_that_becomes_too_coarse_with_another_signature_is_caught_there():
    site, number = memo(), iter(range(10))
    good = Call(lambda: torch.ones(1), key="good", signature="a")
    bad = Call(lambda: torch.tensor(float(next(number))), key="bad", signature="b")
    ask(site, good), ask(site, good), ask(site, bad)
    with pytest.warns(UserWarning, match="too coarse"):
        assert ask(site, bad) == 1


def test_check_always_catches_a_change_at_any_hit():
    site, number = memo("always"), iter([0, 0, 0, 1])
    call = Call(lambda: torch.tensor(next(number)))
    for _ in range(3):
        assert ask(site, call) == 0
    with pytest.warns(UserWarning, match="too coarse"):
        assert ask(site, call) == 1


def test_a_table_that_was_written_into_is_dropped():
    site, call = memo(), Call(lambda: torch.ones(3))
    for _ in range(3):
        table = ask(site, call)
    table.mul_(5)
    with pytest.warns(UserWarning, match="somebody wrote into a cached result") as seen:
        assert ask(site, call).eq(1).all()
    assert len(seen) == 1
    assert site.off.kind is FindingKind.WRITTEN_INTO and not site.cache.entries


@pytest.mark.parametrize("check", ["first", "always", "never"])
def test_a_write_is_noticed_before_the_first_check_too(check):
    site, call = memo(check), Call(lambda: [torch.ones(3)])
    ask(site, call)[0][1:].zero_()
    with pytest.warns(UserWarning, match="wrote into"):
        assert ask(site, call)[0].eq(1).all()


def test_a_write_under_inference_mode_is_noticed():
    site, call = memo("never"), Call(lambda: torch.ones(3))
    with torch.inference_mode():
        ask(site, call).add_(1)
        with pytest.warns(UserWarning, match="wrote into"):
            assert ask(site, call).eq(1).all()


def test_a_site_that_was_switched_off_says_so_once():
    site = memo()
    with pytest.warns(UserWarning) as seen:
        site.switch_off(FindingKind.TOO_COARSE)
        site.switch_off(FindingKind.WRITTEN_INTO)
    assert [str(each.message) for each in seen] == [
        "dit_patch: toy: rope.forward: a cached result differs from a fresh one: its key is too coarse. Switched off."
    ]
    assert site.off.kind is FindingKind.TOO_COARSE


@pytest.mark.parametrize(
    "fresh",
    [
        torch.tensor([0.0, 1.0]).double(),
        torch.tensor([-0.0, 1.0]),
        torch.tensor([[0.0, 1.0]]),
        torch.tensor([0.0, 9.0, 1.0])[::2],
        torch.nextafter(torch.tensor([0.0, 1.0]), torch.tensor(2.0)),
        (torch.tensor([0.0, 1.0]),),
        None,
    ],
    ids=["dtype", "sign of zero", "shape", "stride", "last bit", "container", "nothing"],
)
def test_results_that_differ_in_anything_are_not_the_same(fresh):
    stored = torch.tensor([0.0, 1.0])
    assert same(stored, stored.clone())
    assert not same(stored, fresh) and not same(fresh, stored)


def test_nested_results_are_compared_part_by_part():
    def make(last, count=2):
        return {"a": [torch.ones(2), None], "b": tuple(torch.tensor(last) for _ in range(count))}

    assert same(make(1.0), make(1.0))
    assert not same(make(1.0), make(2.0))
    assert not same(make(1.0), make(1.0, count=3))


@pytest.mark.parametrize(
    "one, other",
    [
        ((torch.ones(1), 1), (torch.ones(1), 2)),
        ([torch.ones(1)], [[torch.ones(1)]]),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}),
        (1, 2),
        ("a", "b"),
        ((None, torch.ones(1)), (torch.ones(1), None)),
    ],
)
def test_what_is_no_tensor_is_compared_too(one, other):
    assert same(one, one)
    assert not same(one, other)


def test_a_result_of_nan_is_the_same_as_itself():
    site, call = memo("always"), Call(lambda: torch.tensor([float("nan"), 1.0]))
    for _ in range(3):
        assert ask(site, call)[1] == 1
    assert counts(site) == (2, 1, {})


def test_numbers_in_a_result_of_nan_are_the_same_too():
    assert same((float("nan"), torch.ones(1)), (float("nan"), torch.ones(1)))


# What may be stored, and how.


def test_callers_may_change_the_list_or_dict_that_they_get():
    site, call = memo(), Call(lambda: [torch.ones(1), {"a": torch.ones(1)}])
    first = ask(site, call)
    first.append(torch.zeros(1))
    first[1].clear()
    for _ in range(2):
        result = ask(site, call)
        assert len(result) == 2 and result[1].keys() == {"a"}
        result.clear()
    assert site.off is None


def test_a_result_larger_than_the_budget_is_passed_through_with_the_reason():
    site, call = memo(max_bytes=MEGABYTE), Call(lambda: torch.ones(MEGABYTE))
    assert ask(site, call).shape == ask(site, call).shape == (MEGABYTE,)
    assert call.computed == 2
    assert counts(site) == (0, 2, {"a result of 4.0 MiB is larger than max_bytes": 2})


def test_a_result_counts_with_the_whole_memory_that_it_keeps_alive_and_once():
    site = memo()

    def function():
        table = torch.ones(1000)
        return table[:10], table[10:20], torch.ones(5)

    ask(site, Call(function))
    assert site.cache.nbytes == 4000 + 20


def test_what_others_count_already_is_not_counted_again():
    site, held = memo(), torch.ones(1000)
    ask(site, Call(lambda: held[:10], stored=[held]))
    assert site.cache.nbytes == 0


@pytest.mark.parametrize(
    "view", [lambda t: t, lambda t: t[1:], lambda t: t.t(), lambda t: (torch.ones(1), [t.view(-1)])]
)
def test_a_result_that_shares_memory_with_an_argument_is_stored_as_a_copy(view):
    site, argument = memo("never"), torch.ones(2, 2)
    call = Call(lambda: view(argument), sources=[argument])
    ask(site, call)
    expected = view(torch.ones(2, 2))
    argument.zero_()
    assert same(ask(site, call), expected)
    assert site.off is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_that_copy_can_be_used_under_inference_mode_and_in_training(mode):
    site, argument = memo(), torch.nn.Parameter(torch.ones(2, 2))
    call = Call(lambda: argument, sources=[argument])
    with mode():
        ask(site, call)
    kept = ask(site, call)
    assert not kept.is_inference() and not kept.requires_grad and counts(site) == (1, 1, {})


def test_an_overlapping_view_of_an_argument_is_not_stored():
    site, argument = memo(), torch.ones(2, 1)
    call = Call(lambda: argument.expand(2, 5), sources=[argument])
    assert ask(site, call).data_ptr() == argument.data_ptr()
    assert counts(site) == (0, 1, {"the result is an overlapping view of an argument": 1})


def test_an_overlapping_view_of_something_new_is_stored_as_it_is():
    site, call = memo(), Call(lambda: torch.ones(2, 1).expand(2, 5))
    for _ in range(3):
        assert ask(site, call).stride() == (1, 0)
    assert counts(site) == (2, 1, {})


@pytest.mark.parametrize(
    "value, reason",
    [
        (lambda: object(), "a object cannot be stored"),
        (lambda: torch.ones(1, device="meta"), "the result is not a plain tensor"),
        (lambda: (torch.ones(1), {1}), "a set cannot be stored"),
    ],
)
def test_what_cannot_be_stored_is_passed_through_with_the_reason(value, reason):
    site, call = memo(), Call(value)
    ask(site, call), ask(site, call)
    assert call.computed == 2
    assert counts(site) == (0, 2, {reason: 2})


def test_a_result_that_is_an_inference_tensor_is_passed_through():
    with torch.inference_mode():
        made = torch.ones(1)
    site = memo()
    assert ask(site, Call(lambda: made)) is made
    assert counts(site) == (0, 1, {"the result is not a plain tensor": 1})


def test_a_block_mask_is_stored_with_all_its_bytes():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def make():
        return flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256, device="cpu", BLOCK_SIZE=128)

    site, call = memo(), Call(make)
    mask = ask(site, call)
    tensors = [value for value in vars(mask).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 4
    assert site.cache.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert all(ask(site, call) is mask for _ in range(3))
    assert counts(site) == (3, 1, {})
    assert torch.equal(mask.to_dense(), make().to_dense())
    tensors[0].add_(1)
    with pytest.warns(UserWarning, match="wrote into"):
        assert torch.equal(ask(site, call).to_dense(), make().to_dense())


def test_many_threads_get_right_results_under_a_tight_budget():
    site, wrong = memo(max_bytes=2000), []

    def work():
        for number in range(300):
            value = float(number % 9)
            call = Call(lambda value=value: torch.full((100,), value), key=value)
            if not ask(site, call).eq(value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work) for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and site.off is None
    assert site.cache.budget.used == site.cache.nbytes <= 2000


# Flex block masks.


def block_mask(ends, size=256, extra=0):
    def causal(b, h, q, kv):
        return (kv < ends[q]) | (kv == q + extra)

    return create_block_mask(causal, None, None, size, size, device="cpu", _compile=False)


def test_block_masks_are_the_same_where_all_that_they_run_with_is():
    ends = torch.full((256,), 200)
    mask = block_mask(ends)
    assert same(mask, block_mask(ends.clone()))
    ends = ends.clone()
    ends[3] = 201  # within the same blocks
    assert torch.equal(block_mask(ends).kv_num_blocks, mask.kv_num_blocks)
    assert not same(mask, block_mask(ends))
    assert not same(mask, block_mask(torch.full((256,), 200), extra=1))
    assert not same(mask, block_mask(torch.full((256,), 200), size=128))


def test_what_a_block_mask_has_captured_is_held_and_watched():
    ends = torch.full((256,), 200)
    tensors = list(tensors_in(block_mask(ends)))
    assert any(tensor is ends for tensor in tensors)
