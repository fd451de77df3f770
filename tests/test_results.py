"""One walk over nested results: what is in them, put into containers again, compared, and made as an own copy."""

import collections

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from dit_patch.memo import results
from dit_patch.memo.results import Container, copier, flatten, map_tensors, same, tensors_in
from dit_patch.sites.stand_in import stand_in

Pair = collections.namedtuple("Pair", "one two")


def nested(tensor):
    return collections.OrderedDict(a=(tensor, [tensor, "x"]), b=Pair(tensor, None), c={"d": ()})


def test_what_is_taken_apart_can_be_put_together_again():
    value = nested(torch.ones(1))
    leaves, rebuild = flatten(value)
    assert [type(leaf).__name__ for leaf in leaves] == ["Tensor", "Tensor", "str", "Tensor", "NoneType"]
    again = rebuild(range(5))
    assert again == collections.OrderedDict(a=(0, [1, 2]), b=Pair(3, 4), c={"d": ()})
    assert type(again) is collections.OrderedDict and type(again["b"]) is Pair


def test_what_can_be_stored():
    tensor = torch.ones(1)
    value = (tensor, None, 1, 1.0, True, "a", torch.float32, torch.device("cpu"), {"a": [tensor]}, Pair(tensor, 2))
    assert list(tensors_in(value)) == [tensor] * 3


@pytest.mark.parametrize("value", [object(), {1, 2}, (torch.ones(1), len), {"a": [object()]}])
def test_what_cannot_be_stored_is_named(value):
    with pytest.raises(TypeError, match=r"a (object|set|builtin_function_or_method) cannot be stored"):
        list(tensors_in(value))


def test_mapping_over_tensors_keeps_the_containers():
    value = collections.OrderedDict(a=(torch.ones(1), [torch.ones(1)]), b=Pair(torch.ones(1), None))
    doubled = map_tensors(lambda tensor: tensor * 2, value)
    assert type(doubled) is collections.OrderedDict and type(doubled["b"]) is Pair
    assert [tensor.item() for tensor in tensors_in(doubled)] == [2.0, 2.0, 2.0]
    assert [tensor.item() for tensor in tensors_in(value)] == [1.0, 1.0, 1.0]


def test_a_block_mask_stays_as_it_is_and_its_tensors_are_found():
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 256, 256, device="cpu", _compile=False)
    made = map_tensors(torch.zeros_like, [mask, torch.ones(1)])
    assert made[0] is mask and made[1].eq(0).all()
    assert any(tensor is mask.kv_num_blocks for tensor in tensors_in([mask]))


@pytest.mark.parametrize(
    "one, other",
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ((1, 2), [1, 2]),
        (Pair(1, 2), (1, 2)),
        ([1, [2]], [1, [2, 3]]),
        ([0.0], [-0.0]),
        ({"a": torch.ones(1)}, {"a": torch.ones(1, dtype=torch.float64)}),
    ],
)
def test_containers_that_differ_are_not_the_same(one, other):
    assert same(one, one) and same(other, other) and not same(one, other)


def test_nan_is_the_same_as_itself_wherever_it_is():
    value = {"a": [float("nan")], "b": (torch.tensor(float("nan")),)}
    assert same(value, {"a": [float("nan")], "b": (torch.tensor(float("nan")),)})


def test_only_what_can_be_changed_is_copied():
    tensor = torch.ones(1)
    assert copier((tensor, Pair(tensor, (1, None)))) is None
    copy = copier((tensor, [tensor]))
    assert copy()[1] is not copy()[1] and copy()[1][0] is tensor


def test_a_copy_keeps_its_names_when_the_value_loses_one():
    value = {"a": 1, "b": 2}
    copy = copier(value)
    del value["a"]
    assert copy() == {"a": 1, "b": 2}


def test_a_row_of_the_table_is_all_that_a_new_container_needs(monkeypatch):
    class Output:
        def __init__(self, sample, extra):
            self.sample, self.extra = sample, extra

    row = Container(
        is_one=lambda value: type(value) is Output,
        items=lambda value: (value.sample, value.extra),
        rebuild=lambda kind, names, items: kind(*items),
    )
    value = Output(torch.ones(2), [torch.ones(1)])
    with pytest.raises(TypeError, match="a .*Output cannot be stored"):
        list(tensors_in(value))
    monkeypatch.setattr(results, "CONTAINERS", (*results.CONTAINERS, row))
    assert len(list(tensors_in(value))) == 2
    assert map_tensors(torch.zeros_like, value).extra[0].eq(0).all()
    assert same(value, Output(torch.ones(2), [torch.ones(1)])) and not same(value, Output(torch.ones(2), []))
    assert copier(value)().sample is value.sample
    assert stand_in(value).sample.isnan().all()
