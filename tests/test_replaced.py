"""A function that another one does the work of: held to the original, or the original itself."""

from __future__ import annotations

import pytest
import torch
import toys
from toys import TABLE, agree, counts

from dit_patch.errors import SiteError
from dit_patch.spec.fingerprint import fingerprint

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


def test_a_replacement_that_is_off_for_another_signature_is_caught_there(patched):
    model, plain, _ = patched(use("toys:sinusoid_off_for_one_sample"))
    agree(model, plain, toys.inputs(), toys.inputs())
    with pytest.warns(UserWarning, match="is not equal to the original here"):
        agree(model, plain, toys.inputs() | {"t": torch.tensor([1.0])})


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
