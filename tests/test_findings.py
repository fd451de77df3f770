"""Findings: what can be noticed is a kind that code compares, and the words for it are made in one place."""

from __future__ import annotations

import pickle
import warnings

import pytest

from dit_patch.findings import DitPatchWarning, Finding, FindingKind, warn

DISPLACED = Finding(FindingKind.DISPLACED, "rope.forward", "Toy")


@pytest.mark.parametrize("name", FindingKind.__members__)
def test_each_kind_is_one_of_its_own(name):
    assert FindingKind[name].name == name


@pytest.mark.parametrize("kind", FindingKind)
def test_each_kind_has_words_for_the_report_or_for_a_warning(kind):
    finding = Finding(kind, "rope.forward", "{Toy}", 3)
    said = [getattr(finding, what) for what in ("note", "warning") if getattr(kind, what) is not None]
    assert said and all(said)


def test_a_warning_carries_its_finding_and_comes_from_whoever_is_meant():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn(DISPLACED)
    assert seen[0].category is DitPatchWarning and seen[0].message.finding == DISPLACED
    assert seen[0].filename == __file__
    assert str(seen[0].message).startswith("dit_patch: rope.forward was not reached in Toy.forward; something replaced")


def test_a_warning_that_comes_from_another_process_is_the_same():
    received = pickle.loads(pickle.dumps(DitPatchWarning(DISPLACED)))
    assert type(received) is DitPatchWarning and received.finding == DISPLACED
