"""What counts as the same call: its arguments, by facet and value, and the state around it."""

from __future__ import annotations

import collections
import enum
import types
import weakref

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_patch.errors import SiteError
from dit_patch.memo.context import context_key
from dit_patch.memo.keys import Content, Dependencies, Plan, Uncacheable, same_bits

NAMES = ("x", "y", "z")


def key(*args, facets=None, frame=None, **kwargs):
    """The key of a call `f(*args, **kwargs)` of f(x, y, z)."""
    plan = Plan(NAMES, facets or {}, "spec: f")
    return tuple(plan.parts(args, kwargs, frame))


def of(tensor, *facets):
    return key(tensor, facets={"x": facets})


# Arguments that are no tensors: always, by type and value.


class Color(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


class Other(enum.IntEnum):
    ONE = 1


Pair = collections.namedtuple("Pair", "one two")
DIFFERENT = [
    None, True, False, 1, 0, 2, 1.0, 0.0, -0.0, "1", b"1", "1.0", 1j, complex(0.0, -0.0), complex(0.0, 0.0),
    (1,), [1], (1.0,), (1, 2), ([1], 2), [(1,), 2], Pair(1, 2), {"a": 1}, {"a": 1.0}, {"b": 1}, {1: "a"}, [], (), {},
    [None],
    torch.float32, torch.float16, torch.device("cpu"), torch.device("meta"), torch.Size([1]), torch.Size([1, 2]),
    torch.channels_last, torch.strided, Color.RED, Number.ONE, Other.ONE, float("inf"), -float("inf"),
]  # fmt: skip


def test_values_of_different_types_or_bits_are_different_calls():
    collisions = [
        (one, other) for at, one in enumerate(DIFFERENT) for other in DIFFERENT[:at] if key(one) == key(other)
    ]
    assert collisions == []


def test_equal_values_are_the_same_call():
    for value in DIFFERENT:
        assert key(value) == key(value) and hash(key(value)) == hash(key(value))
    assert key([1, {"a": (2, 3.0)}]) == key([1, {"a": (2, 3.0)}])


def test_nan_is_the_same_call_as_nan():
    assert key(float("nan")) == key(float("nan"))


def test_a_list_in_a_key_does_not_change_with_the_list():
    fps, sizes = [16], {"h": [1]}
    before = key(fps, sizes)
    fps.append(24)
    sizes["h"][0] = 2
    assert before == key([16], {"h": [1]})


def test_a_position_and_a_keyword_are_told_apart_by_name():
    assert key(1, 2) != key(2, 1)
    assert key(x=1, y=2) != key(x=2, y=1)
    assert key(1, z=2) != key(1, y=2)


@pytest.mark.parametrize("value", [object(), {1, 2}, len, torch.Generator(), slice(1), types.SimpleNamespace()])
def test_an_object_that_cannot_be_part_of_a_key_is_a_reason_to_pass_through(value):
    with pytest.raises(Uncacheable, match=f"`y` is a {type(value).__qualname__}, which cannot be part of a key"):
        key(1, value)


def test_more_arguments_than_the_signature_has_are_passed_through():
    with pytest.raises(Uncacheable, match="more positional arguments"):
        key(1, 2, 3, 4)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.complex_numbers()
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner),
)


@settings(deadline=None, max_examples=200)
@given(anything, anything)
def test_two_values_share_a_key_just_if_they_are_written_the_same(one, other):
    assert (key(one) == key(other)) == (repr(one) == repr(other))


# Tensors: what the spec says of them.


def test_a_tensor_that_the_spec_does_not_name_is_an_error_that_says_what_to_write():
    with pytest.raises(SiteError) as caught:
        key(1, torch.ones(1))
    assert str(caught.value) == (
        "spec: f: `y` is a tensor, and `key` does not say what of it counts.\n"
        "    Add `y: [...]` with one or more of shape, dtype, device, identity, values."
    )


def test_a_tensor_inside_a_list_counts_by_the_facets_of_its_argument():
    assert of([torch.ones(1), torch.ones(2)], "shape") == of([torch.zeros(1), torch.zeros(2)], "shape")
    assert of([torch.ones(1), torch.ones(2)], "shape") != of([torch.ones(1), torch.ones(3)], "shape")
    with pytest.raises(SiteError, match="`x` is a tensor"):
        key([torch.ones(1)])


@pytest.mark.parametrize(
    "facet, other",
    [
        ("shape", torch.zeros(3, 2)),
        ("dtype", torch.zeros(2, 3, dtype=torch.float64)),
        ("device", torch.zeros(2, 3, device="meta")),
        ("identity", torch.zeros(2, 3)),
        ("values", torch.ones(2, 3)),
    ],
)
def test_a_facet_tells_apart_what_it_names_and_nothing_else(facet, other):
    one = torch.zeros(2, 3)
    assert of(one, facet) == of(one, facet)
    assert of(one, facet) != of(other, facet)
    if facet not in ("identity", "values"):
        assert of(one, *{"shape", "dtype", "device"} - {facet}) == of(other, *{"shape", "dtype", "device"} - {facet})


def test_several_facets_all_count():
    one = torch.zeros(2)
    assert of(one, "shape", "dtype") == of(torch.ones(2), "shape", "dtype")
    assert of(one, "shape", "dtype") != of(torch.ones(2).half(), "shape", "dtype")
    assert of(one, "shape", "dtype") != of(torch.ones(3), "shape", "dtype")


def test_a_missing_tensor_is_another_call_than_a_tensor():
    for facet in ("shape", "dtype", "device", "identity", "values"):
        assert of(None, facet) != of(torch.zeros(()), facet)


def test_a_tensor_of_another_type_is_passed_through():
    with FakeTensorMode():
        fake = torch.zeros(2)
    with pytest.raises(Uncacheable, match="FakeTensor, which is not a plain tensor"):
        of(fake, "shape")


def test_an_argument_of_the_model_s_forward_counts_by_its_facets():
    facets = {"x": ("shape",), "model.t": ("values",)}
    frame = types.SimpleNamespace(argument=lambda name: {"t": torch.tensor([float(at)])}[name], refusal=None)
    results = []
    for at in (0, 0, 1):  # noqa: B007 (the frame reads it)
        results.append(key(torch.ones(1), facets=facets, frame=frame))
    assert results[0] == results[1] != results[2]


# Identity: the same memory, unchanged.


def test_identity_is_kept_by_another_view_of_the_same_elements():
    tensor = torch.arange(6.0)
    assert of(tensor.view(2, 3), "identity") == of(tensor.view(2, 3), "identity")
    assert of(tensor[:], "identity") == of(tensor, "identity") == of(tensor.detach(), "identity")
    assert of(tensor[:1].expand(4), "identity") == of(tensor[:1].expand(4), "identity")


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[1:],
        lambda t: t[:-1],
        lambda t: t[::2],
        lambda t: t.view(2, 4),
        lambda t: t.view(torch.int32),
        lambda t: t.view(torch.complex64),
        lambda t: t.clone(),
    ],
)
def test_identity_tells_views_apart(view):
    tensor = torch.arange(8.0)
    assert of(tensor, "identity") != of(view(tensor), "identity")


def test_identity_tells_offset_and_stride_apart_where_the_shape_is_the_same():
    tensor = torch.zeros(4, 4)
    views = [tensor, tensor.t(), tensor.view(-1)[:4].expand(4, 4), tensor[:, :1].expand(4, 4), tensor[1:2].expand(4, 4)]
    assert len({of(view, "identity") for view in views}) == len(views)
    conjugate = torch.zeros(2, dtype=torch.complex64)
    assert of(conjugate, "identity") != of(conjugate.conj(), "identity")


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1),
        lambda t: t.zero_(),
        lambda t: t.__setitem__(0, 0.0),
        lambda t: t.view(-1)[:1].fill_(0),
        lambda t: t.copy_(t.clone()),
        lambda t: t.detach().mul_(1),
    ],
)
def test_identity_changes_with_every_write(write):
    tensor = torch.ones(4)
    before = of(tensor, "identity")
    write(tensor)
    assert of(tensor, "identity") != before


def test_identity_of_an_inference_tensor_cannot_be_told():
    with torch.inference_mode():
        tensor = torch.ones(1)
    with pytest.raises(Uncacheable, match="inference tensor has no version"):
        of(tensor, "identity")


@pytest.mark.parametrize("facet", ["identity", "values"])
def test_a_tensor_that_autograd_records_is_passed_through(facet):
    tensor = torch.ones(1, requires_grad=True)
    with pytest.raises(Uncacheable, match="autograd is recording"):
        of(tensor, facet)
    with torch.no_grad():
        of(tensor, facet)
    of(tensor, "shape")


def test_a_followed_tensor_is_alive_as_long_as_any_view_of_it_and_not_kept_so():
    tensor = torch.ones(4)
    plan, dependencies = Plan(NAMES, {"x": ("identity",)}, "f"), Dependencies()
    plan.parts((tensor,), {}, None, dependencies)
    (alive,) = dependencies.alive
    view, gone = torch.empty(0).set_(tensor.untyped_storage()), weakref.ref(tensor)
    del tensor
    assert gone() is None and alive()
    del view
    assert not alive()


def test_only_what_counts_by_identity_is_followed():
    plan, dependencies = (
        Plan(NAMES, {"x": ("shape",), "y": ("values",), "z": ("shape", "identity")}, "f"),
        Dependencies(),
    )
    plan.parts((torch.ones(1), torch.ones(1)), {"z": [torch.ones(1), torch.ones(1)]}, None, dependencies)
    assert len(dependencies.alive) == 2


def test_the_address_of_a_freed_tensor_never_stands_for_a_new_one(tmp_path):
    # Without dependencies, keys of freed timesteps met a different value in 111 of 200 trials.
    model = toys.build()
    site = "- {at: time.forward, kind: timestep, key: {t: [identity]}}"
    handle = toys.patch(model, tmp_path, site, check="never")
    fresh = toys.Sinusoid()
    with torch.no_grad():
        for trial in range(200):
            t = torch.full((2,), float(trial))
            assert torch.equal(model.time(t), fresh(t)), f"trial {trial}"
            assert torch.equal(model.time(t), fresh(t))
            del t
    assert (toys.row(handle, "time.forward").hits, toys.row(handle, "time.forward").misses) == (200, 200)
    handle.remove()


# Values: the same bits.

BIG = 4096


@pytest.mark.parametrize("size", [1, 3, BIG], ids=["in the key", "odd", "as a copy"])
class TestValues:
    def test_equal_content_is_the_same_call(self, size):
        one, other = torch.full((size,), 2.5), torch.full((size,), 2.5)
        assert of(one, "values") == of(other, "values")
        assert hash(of(one, "values")) == hash(of(other, "values"))

    def test_zero_and_minus_zero_differ(self, size):
        assert of(torch.zeros(size), "values") != of(-torch.zeros(size), "values")

    def test_nan_equals_itself(self, size):
        nan = torch.full((size,), float("nan"))
        assert of(nan, "values") == of(nan.clone(), "values")

    def test_shape_and_dtype_count(self, size):
        zeros = torch.zeros(size)
        assert of(zeros, "values") != of(zeros[None], "values")
        assert of(zeros, "values") != of(zeros.view(torch.int32), "values")

    def test_layout_does_not(self, size):
        tensor = torch.arange(2.0 * size).view(2, size)
        assert of(tensor, "values") == of(tensor.t().contiguous().t(), "values")
        assert of(tensor[:, :1], "values") == of(tensor[:, :1].clone(), "values")

    def test_lazy_conjugation_is_seen_through(self, size):
        tensor = torch.full((size,), 1 + 2j)
        assert of(tensor.conj(), "values") == of(tensor.conj().resolve_conj(), "values") != of(tensor, "values")

    def test_the_caller_may_write_into_the_tensor_afterwards(self, size, tmp_path):
        model = toys.build()
        handle = toys.patch(model, tmp_path, "- {at: time.forward, kind: timestep, key: {t: [values]}}", check="never")
        fresh = toys.Sinusoid()
        t = torch.ones(size)
        for value in (1.0, 2.0, 1.0, 2.0, 3.0):
            t.fill_(value)
            assert torch.equal(model.time(t), fresh(t))
        assert (toys.row(handle, "time.forward").misses, toys.row(handle, "time.forward").hits) == (3, 2)
        handle.remove()


def test_empty_tensors_by_value():
    assert of(torch.empty(0), "values") == of(torch.empty(0), "values")
    assert of(torch.empty(0), "values") != of(torch.empty(0, 2), "values")


def test_a_kept_content_is_a_copy_without_history():
    tensor = torch.zeros(BIG)
    content = Content(tensor)
    content.keep()
    tensor.add_(1)
    assert content == Content(torch.zeros(BIG)) != Content(tensor)


def test_same_bits_of_one_number_with_any_stride():
    for tensor in (torch.arange(6.0)[::2][:1], torch.arange(8.0).view(2, 4)[:, :1][1:], torch.arange(4.0)[2]):
        assert same_bits(tensor, tensor.clone())
        assert not same_bits(tensor, tensor + 1)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex128]
)
def test_same_bits_of_every_dtype(dtype):
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    assert same_bits(tensor, tensor.clone())
    assert same_bits(tensor.t(), tensor.t().contiguous())
    assert not same_bits(tensor, 1 - tensor if dtype != torch.bool else ~tensor)
    assert not same_bits(tensor, tensor[0])


# Around the call.


def test_autocast_and_its_dtype_count():
    around = [context_key()]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            around.append(context_key())
            with torch.autocast("cpu", enabled=False):
                assert context_key() in (around[0], ((), None, None))
    assert len(set(around)) == 3


def test_grad_mode_does_not_count():
    with torch.no_grad():
        without = context_key()
    with torch.inference_mode():
        assert context_key() == without == context_key()


def test_under_fake_tensors_nothing_is_kept():
    with FakeTensorMode(), pytest.raises(Uncacheable, match="fake tensors"):
        context_key()


def test_inside_a_functorch_transform_nothing_is_kept():
    def function(x):
        with pytest.raises(Uncacheable, match="functorch"):
            context_key()
        return x

    torch.func.vmap(function)(torch.ones(2))


def test_under_jit_tracing_nothing_is_kept():
    def function(x):
        with pytest.raises(Uncacheable, match="tracing"):
            context_key()
        return x + 1

    torch.jit.trace(function, (torch.ones(2),), check_trace=False)
