"""Our block patterns are cache-dit's, whose numbers specs state."""

import pytest

from dit_patch.step_cache.block_pattern import PATTERNS


@pytest.mark.parametrize("number", PATTERNS)
def test_a_pattern_takes_and_returns_what_cache_dits_of_that_number_does(number):
    caching = pytest.importorskip("cache_dit.caching", reason="needs cache-dit")
    theirs = caching.ForwardPattern[f"Pattern_{number}"]
    assert (PATTERNS[number].inputs, PATTERNS[number].outputs) == (tuple(theirs.In), tuple(theirs.Out))
