"""What is handed out for a result that nobody reads takes no memory, and shows if somebody reads it after all."""

import contextlib

import pytest
import torch
import toys
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from toys import agree, counts

from dit_patch.sites.stand_in import stand_in


def test_tensors_keep_their_shapes_and_hold_one_number_that_is_none():
    one, (two, three) = stand_in(
        (torch.ones(2, 3), [torch.ones(4, dtype=torch.int64), torch.ones(1, dtype=torch.cfloat)])
    )
    assert (one.shape, one.dtype, two.shape, two.dtype) == ((2, 3), torch.float32, (4,), torch.int64)
    assert one.isnan().all() and three.isnan().all() and two.eq(0).all()
    assert one.untyped_storage().nbytes() == 4


def test_they_are_where_and_what_the_spec_wants():
    made = stand_in([torch.ones(2, dtype=torch.float64)], torch.device("meta"), torch.float32)[0]
    assert (made.device.type, made.dtype) == ("meta", torch.float32)
    assert made.to("meta").float() is made, "so that the caller copies nothing"


def test_containers_and_plain_values_stay():
    assert stand_in({"n": 3, "t": (None, "x")}) == {"n": 3, "t": (None, "x")}


def test_a_block_mask_s_fits_no_sequence():
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 256, 256, device="cpu", _compile=False)
    made = stand_in(mask)
    assert type(made) is type(mask) and made.kv_num_blocks.numel() == 1
    query = torch.randn(1, 1, 256, 8)
    flex_attention(query, query, query, block_mask=mask)
    with pytest.raises(ValueError, match="block_mask"):
        flex_attention(query, query, query, block_mask=made)


# In a model.

MASK = torch.tensor([1.0, 0.0, 1.0])


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
