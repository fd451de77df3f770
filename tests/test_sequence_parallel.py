"""Sequence parallelism on the CPU: two ranks over gloo, FastVideo's own classes, each rank patched for itself.

`sequence_parallel.py` is what torchrun runs, here once for all cases; one process does the same alone beside it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchrun
from conftest import skip_unless_installed
from sequence_parallel import CASES, LIMIT, RANKS, ROPE, SIZES, SPECS, STEPS

from dit_patch.spec.mini import PASSES

PROGRAM = Path(__file__).with_name("sequence_parallel.py")

# FastVideo 0.2.1 gives each rank's causal attention a table for all ranks' frames, which the relativistic one alone
# cuts to size; and Wan needs timesteps for the rank's own tokens, where the pipeline's stage has one for every token.
RAISES = ["fastvideo/causal_wan", "fastvideo/causal_wan whole_window", "fastvideo/causal_wan no_cache"]
RAISES += ["fastvideo/wan ti2v"]
RUNS = [name for name in CASES if name not in RAISES]
SHARDED = [name for name in RUNS if "hidden_states" in CASES[name].split]
# Each rank passes the whole video, and they attend to all of them together: no process alone does that.
REPEATED = [name for name in RUNS if CASES[name].spec == "fastvideo/matrixgame3"]
ROPED = [
    name for name, case in CASES.items() if any(site.at == ROPE and not site.unused for site in SPECS[case.spec].sites)
]


class Reports(NamedTuple):
    """What the ranks report of one case, in order, and what a process alone does."""

    ranks: list[dict[str, Any]]
    alone: dict[str, Any]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    for spec in SPECS.values():
        skip_unless_installed(spec)
    if torch.cuda.is_available():
        pytest.skip("FastVideo takes a GPU where there is one, and each rank one of its own")
    folder = tmp_path_factory.mktemp("sequence_parallel")
    alone, ranks = torchrun.reports(PROGRAM, folder, RANKS, LIMIT + 60)
    return {name: Reports([rank[name] for rank in ranks], alone[name]) for name in CASES}


def joined(parts):
    """Lists of digests one after the other, for each forward or table."""
    return [sum(each, []) for each in zip(*parts, strict=True)]


def misses(rank, before, after):
    """How many misses each site had from one moment to another."""
    return {at: after[1] - rank[before][at][1] for at, after in rank[after].items()}


@pytest.mark.parametrize("name", CASES)
def test_each_rank_computes_the_same_with_patches_and_after_removal(reports, name):
    for rank in (*reports[name].ranks, reports[name].alone):
        assert rank["patched"] == rank["plain"]
        assert rank["removed"] == rank["plain"][: len(rank["removed"])]


@pytest.mark.parametrize("name", RUNS)
def test_each_rank_reports_the_hits_of_one_process_over_both_generations(reports, name):
    forwards = len(reports[name].alone["plain"])
    assert forwards >= SIZES * STEPS * len(PASSES)
    for rank in reports[name].ranks:
        assert len(rank["plain"]) == forwards
        assert rank["counts"] == reports[name].alone["counts"]
        assert not any(bypassed for _, _, bypassed in rank["counts"].values())
        if name in ROPED:
            assert rank["counts"][ROPE] == [forwards - SIZES, SIZES, 0]


@pytest.mark.parametrize("name", RAISES)
def test_where_upstream_raises_the_patched_model_raises_the_same(reports, name):
    for rank in reports[name].ranks:
        [plain], [patched] = rank["plain"], rank["patched"]
        assert patched == plain
        assert plain.startswith("RuntimeError: The size of tensor a")
    assert len(reports[name].alone["plain"]) >= SIZES * STEPS * len(PASSES)


@pytest.mark.parametrize("name", [name for name in RUNS if name not in SHARDED + REPEATED])
def test_each_rank_puts_out_what_one_process_does(reports, name):
    ranks, alone = reports[name].ranks, reports[name].alone
    if any(rank["plain"] != alone["plain"] for rank in ranks):
        pytest.skip("on this machine sums depend on how many tokens there are: unpatched ranks differ, too")
    assert all(rank["patched"] == alone["patched"] for rank in ranks)


def test_ranks_with_frames_of_their_own_put_out_the_parts_of_what_one_process_does(reports):
    # Not with actions: those reach a rank's frames through attention over that rank's frames alone.
    ranks, alone = reports["fastvideo/matrixgame2_bidirectional no_actions"]
    if joined(rank["plain"] for rank in ranks) != alone["plain"]:
        pytest.skip("on this machine sums depend on how many tokens there are: unpatched ranks differ, too")
    assert joined(rank["patched"] for rank in ranks) == alone["patched"]


@pytest.mark.parametrize("name", SHARDED)
def test_each_rank_keeps_the_tables_of_its_own_frames(reports, name):
    ranks, alone = reports[name]
    tables = [[table["cos and sin"] for table in each["tables"]] for each in (*ranks, alone)]
    for *own, whole in zip(*tables, strict=True):
        assert own[0] != own[1]
        assert joined(own) == whole


@pytest.mark.parametrize("name", [name for name in ROPED if name not in SHARDED])
def test_where_ranks_do_not_divide_the_table_each_has_the_whole(reports, name):
    first, *others = ([table["cos and sin"] for table in rank["tables"]] for rank in reports[name].ranks)
    assert first
    assert all(tables == first for tables in others)


@pytest.mark.parametrize("name", ROPED)
def test_rank_and_size_of_the_group_are_in_the_key_of_a_table(reports, name):
    ranks, alone = reports[name]
    expected = [*((rank, [number, RANKS]) for number, rank in enumerate(ranks)), (alone, [0, 1])]
    for each, key in expected:
        assert each["tables"]
        assert all(table["rank and size"] == key for table in each["tables"])


@pytest.mark.parametrize("name", CASES)
def test_a_rank_that_becomes_another_one_gets_the_tables_of_that_one(reports, name):
    ranks = reports[name].ranks
    for rank, other in zip(ranks, reversed(ranks)):
        assert rank["patched as another rank"] == rank["plain as another rank"]
        if name in SHARDED:
            assert rank["plain as another rank"] != rank["removed"]
        if name in ROPED:
            assert misses(rank, "counts after one rank's clear", "counts as another rank")[ROPE] == 1
            assert rank["tables as another rank"][-1] == other["tables"][0]


@pytest.mark.parametrize("name", CASES)
def test_what_one_rank_clears_the_other_still_has_and_neither_waits_for_the_other(reports, name):
    clearing, keeping = reports[name].ranks
    for rank in (clearing, keeping):
        assert rank["after one rank's clear"] == rank["removed"]
    cleared, kept = (misses(rank, "counts", "counts after one rank's clear") for rank in (clearing, keeping))
    assert sum(kept.values()) < sum(cleared.values())
    assert all(count <= cleared[at] for at, count in kept.items())
    if name in ROPED:
        assert (cleared[ROPE], kept[ROPE]) == (1, 0)


@pytest.mark.parametrize("name", CASES)
def test_ranks_that_share_a_sequence_must_skip_the_same_blocks(reports, name):
    assert [rank["groups"] for rank in reports[name].ranks] == [[RANKS]] * RANKS
    assert reports[name].alone["groups"] == []
