"""What is stored: within a budget of bytes shared by all sites, the least recently used going first."""

from __future__ import annotations

import collections
import threading
import weakref

import torch

from dit_patch.memo.results import tensors_in
from dit_patch.memo.store import LAST, Budget, Cache, Entry

Pair = collections.namedtuple("Pair", "one two")


def entry(nbytes=100, alive=(), value=None):
    tensor = torch.zeros(nbytes, dtype=torch.uint8) if value is None else value
    return Entry(tensor, list(tensors_in(tensor)), nbytes, list(alive))


def caches(max_bytes, count=2):
    budget = Budget(max_bytes)
    return budget, *(Cache(budget) for _ in range(count))


def forwards_go_by(budget, count=LAST):
    for _ in range(count):
        budget.begin()


# Room.


def test_all_caches_of_a_budget_share_it():
    budget, one, other = caches(250)
    one.put("a", entry())
    other.put("a", entry())
    assert (budget.used, one.nbytes, other.nbytes) == (200, 100, 100)
    forwards_go_by(budget)
    one.put("b", entry())
    assert (budget.used, one.nbytes, other.nbytes) == (200, 100, 100)
    assert list(one.entries) == ["b"] and list(other.entries) == ["a"]
    assert (one.evictions, other.evictions) == (1, 0)


def test_what_was_not_used_for_longest_goes_first_whatever_cache_it_is_in():
    budget, one, other = caches(300)
    first, second, third = entry(), entry(), entry()
    one.put("first", first), other.put("second", second), one.put("third", third)
    one.hit(first)
    forwards_go_by(budget)
    one.put("fourth", entry())
    assert list(other.entries) == []
    assert list(one.entries) == ["first", "third", "fourth"]
    one.hit(third)
    forwards_go_by(budget)
    one.put("fifth", entry())
    assert list(one.entries) == ["third", "fourth", "fifth"]


def test_as_many_go_as_it_takes_and_no_more():
    budget, one, other = caches(300)
    for name in "abc":
        one.put(name, entry())
    forwards_go_by(budget)
    other.put("large", entry(150))
    assert list(one.entries) == ["c"]
    assert (budget.used, one.evictions) == (250, 2)


def test_an_entry_just_as_large_as_the_budget_fits():
    budget, one, other = caches(100)
    other.put("a", entry(10))
    assert budget.fits(100) and not budget.fits(101)
    forwards_go_by(budget)
    one.put("b", entry(100))
    assert (list(one.entries), list(other.entries), budget.used) == (["b"], [], 100)


def test_what_one_of_the_last_forwards_used_is_not_given_up():
    budget, one, other = caches(300)
    kept = entry()
    one.put("kept", kept), one.put("a", entry()), one.put("b", entry())
    for _ in range(2 * LAST):
        forwards_go_by(budget, LAST - 1)
        one.hit(kept)
    assert other.put("c", entry()) and other.put("d", entry())
    assert not other.put("e", entry())
    assert (list(one.entries), list(other.entries), budget.used) == (["kept"], ["c", "d"], 300)
    forwards_go_by(budget)
    assert other.put("e", entry()) and list(one.entries) == []


def test_what_is_asked_for_in_turns_and_does_not_fit_hits_as_far_as_it_fits():
    budget, one, _ = caches(250)
    for _ in range(3):
        budget.begin()
        for name in "abcd":
            if name in one.entries:
                one.hit(one.entries[name])
            else:
                one.put(name, entry())
    assert (list(one.entries), one.hits, one.evictions) == (["a", "b"], 4, 0)


def test_a_key_stored_again_takes_the_old_entry_s_place_and_bytes():
    budget, one, _ = caches(1000)
    one.put("a", entry(100))
    newer = entry(50)
    one.put("a", newer)
    assert one.entries == {"a": newer}
    assert (budget.used, one.evictions) == (50, 0)


def test_clearing_gives_the_bytes_back_and_keeps_the_counters():
    budget, one, other = caches(1000)
    held = entry()
    one.put("a", held), other.put("a", entry())
    one.hit(held), one.miss()
    one.clear()
    assert (one.nbytes, other.nbytes, budget.used) == (0, 100, 100)
    assert (one.hits, one.misses) == (1, 1)
    one.drop(held)
    assert budget.used == 100


def test_an_entry_hit_after_it_was_dropped_does_not_come_back():
    budget, one, _ = caches(1000)
    held = entry()
    one.put("a", held)
    one.clear()
    one.hit(held)
    assert (one.entries, budget.used, one.hits) == ({}, 0, 1)


def test_entries_that_can_never_be_asked_for_again_are_swept_out():
    budget, one, other = caches(1000)
    there = {"a": True, "b": True}
    one.put("a", entry(alive=[lambda: there["a"], lambda: there["b"]]))
    one.put("c", entry())
    one.put("d", entry())
    assert list(one.entries) == ["a", "c", "d"]
    there["b"] = False
    one.put("e", entry())
    assert list(one.entries) == ["c", "d", "e"]
    assert (budget.used, one.evictions) == (300, 0)


def test_a_chain_of_entries_whose_first_is_dead_goes_at_once():
    # A span's steps depend on one another's results.
    _, one, _ = caches(1000)
    there = [False]
    links = {}

    def link(name, alive):
        links[name] = entry(alive=[alive])
        one.put(name, links[name])

    there[0] = True
    link("first", lambda: there[0])
    link("second", lambda: "first" in one.entries)
    link("third", lambda: "second" in one.entries)
    there[0] = False
    one.put("other", entry())
    assert list(one.entries) == ["other"]


def test_threads_keep_the_books_straight():
    budget, *several = caches(1000, count=4)

    def work(cache):
        for number in range(200):
            held = entry(90)
            cache.put(number % 7, held)
            cache.hit(held)
            if number % 50 == 0:
                cache.clear()

    threads = [threading.Thread(target=work, args=(cache,)) for cache in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.used == sum(cache.nbytes for cache in several) <= 1000
    assert sum(cache.hits for cache in several) == 800


# What comes out.


def test_lists_and_dicts_are_fresh_each_time_and_their_tensors_shared():
    tensor = torch.ones(2)
    held = entry(value={"a": [tensor, (tensor, 1)], "b": Pair(tensor, "x")})
    with torch.no_grad():
        one, other = held.result(), held.result()
    assert one is not other and one["a"] is not other["a"]
    assert one["a"][0] is other["a"][0] is one["b"].one is tensor
    assert type(one["b"]) is Pair and one["b"].two == "x"
    one["a"].append(3)
    del one["b"]
    assert held.result().keys() == {"a", "b"} and len(held.result()["a"]) == 2


def test_a_list_inside_a_tuple_is_fresh_too():
    held = entry(value=(torch.ones(1), [torch.ones(1)]))
    held.result()[1].clear()
    assert len(held.result()[1]) == 1


def test_a_tensor_or_a_tuple_of_them_comes_out_as_it_is():
    for value in (torch.ones(1), (torch.ones(1), None), Pair(torch.ones(1), torch.ones(1))):
        with torch.no_grad():
            assert entry(value=value).result() is value


def test_an_entry_notices_a_write_to_any_of_its_tensors_and_to_their_views():
    tensors = [torch.ones(2), torch.ones(2)]
    held = entry(value=[tensors[0], {"a": tensors[1]}])
    assert not held.is_modified()
    tensors[1].view(2, 1)[0].zero_()
    assert held.is_modified()


def test_what_is_given_up_is_freed_at_once():
    budget, cache = caches(2000, count=1)
    kept = []
    for number in range(20):
        one = entry()
        assert cache.put(number, one)
        kept.append(weakref.ref(one))
    del one
    forwards_go_by(budget)
    assert cache.put("large", entry(1000))
    assert [each() is None for each in kept].count(True) == 10 == cache.evictions
