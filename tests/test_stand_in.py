"""What is handed out for a result that nobody reads takes no memory, and shows if somebody reads it after all."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

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
