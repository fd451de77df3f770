"""Two ranks over gloo on the CPU: diffusers' models sharded by FSDP2, context-parallel, and each rank on its own.

`distributed.py` is what torchrun runs, once for all cases; one process does alone what needs no other rank.
"""

from pathlib import Path

import pytest

pytest.importorskip("diffusers")

import torchrun
from distributed import CONTEXT, LIMIT, ORDERS, RANKS, SHARDED, STEPS, context_parallel, specs

from dit_patch.spec.mini import PASSES

PROGRAM = Path(__file__).with_name("distributed.py")
SHARDS = [f"sharded {name} {order}" for name in SHARDED for order in ORDERS]
SPLITS = [f"context {name} {order}" for name in CONTEXT for order in ORDERS]
GATHERED = "its weights are sharded by FSDP2, where changes in a shard leave no version behind"


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each rank reports, in order; and what a process alone does."""
    folder = tmp_path_factory.mktemp("distributed")
    alone, ranks = torchrun.reports(PROGRAM, folder, RANKS, LIMIT + 60, CUDA_VISIBLE_DEVICES="")
    return ranks, alone


@pytest.fixture
def ranks(reports, request):
    """The case of that name on each rank."""
    return of(reports, request.param)


def of(reports, name):
    kind, *words = name.split()
    model = words[0] if words else "wan"
    there = specs([model]) if kind == "sharded" else context_parallel([model])
    if not there:
        pytest.skip(f"this diffusers has no {model}, or cannot do it {kind}")
    return [rank[name] for rank in reports[0]]


def every(names):
    return pytest.mark.parametrize("ranks", names, indirect=True)


@every(SHARDS + SPLITS)
def test_every_rank_does_with_patches_what_it_does_without(ranks):
    for rank in ranks:
        assert len(rank["plain"]) == STEPS * len(PASSES)
        assert rank["patched"] == rank["plain"]


@every(SHARDS + SPLITS)
def test_what_one_rank_clears_the_other_still_has_and_neither_waits(ranks):
    clearing, keeping = ranks
    for rank in ranks:
        assert rank["after one rank's clear"] == rank["plain"]
    made = [misses(rank, "counts after one rank's clear") - misses(rank, "counts") for rank in (clearing, keeping)]
    assert made[0] > made[1] == 0


@every(SHARDS + SPLITS)
def test_other_weights_give_what_they_give_without_patches(ranks):
    for rank in ranks:
        assert rank["patched with other weights"] == rank["plain with other weights"]
        assert rank["plain with other weights"][0] != rank["plain"][0]
        assert rank["removed"] == rank["plain with other weights"]


@every(SHARDS)
def test_of_a_sharded_model_tables_hit_and_sites_with_weights_say_why_they_do_not(ranks):
    for rank in ranks:
        assert rank["sharded"] > 0
        tables = [hits for kind, hits, _, _ in rank["counts"].values() if kind == "rope"]
        assert tables and all(tables)
        reasons = [reason for _, _, _, bypassed in rank["counts"].values() for reason in bypassed]
        assert set(reasons) == {GATHERED}
        for kind, hits, _, bypassed in rank["counts"].values():
            assert not (hits and bypassed), kind


@every(SPLITS)
def test_of_a_split_model_everything_hits_as_in_one_process(ranks):
    for rank in ranks:
        whole, own = rank["tokens"]
        assert own * RANKS == whole
        assert not any(bypassed for _, _, _, bypassed in rank["counts"].values())
        kinds = {kind for kind, hits, _, _ in rank["counts"].values() if hits}
        assert kinds >= {"rope", "timestep", "context"}


def test_where_upstream_raises_the_patched_model_raises_the_same(reports):
    """Ring attention needs a backend that returns log-sum-exps, and diffusers has none for the CPU."""
    for rank in of(reports, "ring wan"):
        assert rank["patched"] == rank["plain"]
        if len(rank["plain"]) > 1:
            pytest.skip("this diffusers has ring attention on the CPU, and a patched model does as an unpatched one")
        assert rank["plain"][0].startswith("ValueError: Native attention")


# Step caching.


@pytest.fixture
def stepping(reports):
    pytest.importorskip("cache_dit", reason="needs cache-dit")
    if not specs(["wan"]):
        pytest.skip("diffusers/wan requires a newer diffusers")
    return reports


def test_ranks_that_generate_on_their_own_decide_on_their_own(stepping):
    """One of them has more steps than the other, which then waits for nobody."""
    ranks, alone = stepping
    for rank, expected in zip(ranks, alone["step cache"]):
        assert rank["step cache"] == expected
        assert any(expected["cached"].values())


def test_ranks_that_share_the_weights_skip_the_same_steps(stepping):
    """Alone they would not; and a rank that skips a block is waited for by one that does not."""
    ranks, alone = stepping
    one, other = (rank["step cache, sharded"] for rank in ranks)
    first, second = alone["step cache, as long"]
    assert first["cached"] != second["cached"]
    assert one["cached"] == other["cached"] and any(one["cached"].values())
    assert one["diffs"] == other["diffs"]
    assert one["made"] != other["made"]
    step, *_ = one["diffs"]["pass 1"]
    assert one["diffs"]["pass 1"][step] == pytest.approx(
        (first["diffs"]["pass 1"][step] + second["diffs"]["pass 1"][step]) / 2, rel=0.01
    )


def test_ranks_that_share_a_sequence_skip_the_same_steps_and_have_the_same_output(stepping):
    if not context_parallel(["wan"]):
        pytest.skip("this diffusers cannot split wan")
    one, other = (rank["step cache, context"] for rank in stepping[0])
    assert one == other and any(one["cached"].values())


def misses(rank, when):
    return sum(count for _, _, count, _ in rank[when].values())
