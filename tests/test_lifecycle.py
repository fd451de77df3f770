"""The life of a patch on diffusers' own Wan, small and with random weights. Begin reading here.

`wan.model` is patched, `wan.plain` is its twin with the same weights, which never is; `wan.calls()` are the forwards of
a generation of two steps, each with the prompt and with the negative prompt.
"""

import pytest
import torch

import dit_patch
from dit_patch.contribute import verify


def outputs(model, calls):
    return torch.stack([output for (output,) in verify.run(model, calls)])


def attributes(model):
    return [(name, list(vars(module))) for name, module in model.named_modules()]


def test_a_patched_model_puts_out_the_same_bits(wan):
    with dit_patch.apply(wan.model):
        patched = outputs(wan.model, wan.calls())
    assert torch.equal(patched, outputs(wan.plain, wan.calls()))


def test_the_report_tells_of_each_site_how_often_its_result_was_used_again(wan):
    with dit_patch.apply(wan.model) as handle:
        outputs(wan.model, wan.calls())
    rows = {row.at: (row.kind, row.hits, row.misses) for row in handle.stats()}
    assert rows["rope.forward"] == ("rope", 3, 1)  # goes by the size of the video
    assert rows["condition_embedder.text_embedder.forward"] == ("context", 2, 2)  # of each of the two prompts
    assert rows["condition_embedder.time_embedder.forward"] == ("timestep", 2, 2)  # of each of the two steps
    assert "rope.forward" in str(handle) and "lossless" in str(handle)


def test_weights_that_change_are_noticed(wan):
    calls = wan.calls()
    with dit_patch.apply(wan.model):
        before = outputs(wan.model, calls)
        with torch.no_grad():
            for model in (wan.model, wan.plain):
                model.condition_embedder.text_embedder.linear_1.weight.mul_(2)
        after = outputs(wan.model, calls)
    assert torch.equal(after, outputs(wan.plain, calls)) and not torch.equal(after, before)


def test_a_patch_that_was_overwritten_is_told_and_put_back_by_applying_again(wan):
    original = wan.model.rope.forward
    with dit_patch.apply(wan.model) as handle:
        wan.model.rope.forward = original
        with pytest.warns(UserWarning, match=r"rope\.forward was not reached"):
            outputs(wan.model, wan.calls())
        assert dit_patch.apply(wan.model) is handle
        outputs(wan.model, wan.calls())
    assert {row.at: row.hits for row in handle.stats()}["rope.forward"] == 3


def test_after_removal_the_model_is_as_it_was(wan):
    before = attributes(wan.model)
    handle = dit_patch.apply(wan.model)
    outputs(wan.model, wan.calls())
    assert attributes(wan.model) != before
    handle.remove()
    assert attributes(wan.model) == before
    assert wan.model.rope.forward.__func__ is type(wan.model.rope).forward
    assert torch.equal(outputs(wan.model, wan.calls()), outputs(wan.plain, wan.calls()))
