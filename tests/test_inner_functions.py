"""Functions that are defined inside others: read, replaced, and put back as they were."""

import inspect
import threading

import pytest
import torch
from toys import inside

from dit_patch.errors import SiteError
from dit_patch.sites import layers
from dit_patch.sites.inner_functions import InnerFunctions
from dit_patch.sites.resolve import places
from dit_patch.spec.address import Address
from dit_patch.spec.fingerprint import fingerprint


@pytest.fixture(autouse=True)
def as_it_was():
    code = inside.__code__
    yield
    assert inside.__code__ is code and not [name for name in inside.__globals__ if "<locals>" in name]


def doubled(x, by=1.0):
    return 2 * x


def test_they_are_read_by_name_and_called():
    assert set(vars(InnerFunctions(inside))) == {"twist", "spread"}
    assert InnerFunctions(inside).twist(3.0, 2.0) == 7.0
    assert inspect.getsource(InnerFunctions(inside).twist).lstrip().startswith("def twist(")
    assert list(inspect.signature(InnerFunctions(inside).twist).parameters) == ["x", "by"]


def test_one_is_replaced_and_the_others_are_not():
    before, original = inside(3.0), InnerFunctions(inside).twist
    InnerFunctions(inside).twist = doubled
    assert InnerFunctions(inside).twist is doubled
    assert inside(3.0) == 6.0 + before - original(3.0, 2.0)
    InnerFunctions(inside).twist = original
    assert inside(3.0) == before


def test_closures_and_functions_that_share_a_name_are_not_found():
    assert "uses" not in vars(InnerFunctions(inside)) and "<lambda>" not in vars(InnerFunctions(inside))
    with pytest.raises(AttributeError, match="'uses'"):
        InnerFunctions(inside).uses = doubled


def test_layers_of_two_owners_come_off_in_any_order():
    before = inside(3.0)

    def adding(by):
        return lambda original, instance, args, kwargs: original(*args, **kwargs) + by

    for first in (0, 1):
        placed = [layers.install(InnerFunctions(inside), "twist", adding(by)) for by in (10.0, 100.0)]
        assert inside(3.0) == before + 110.0
        assert layers.remove(placed.pop(first))
        assert inside(3.0) == before + (10.0 if first else 100.0)
        assert layers.installed(placed[0]) and layers.remove(placed[0])
        assert inside(3.0) == before


def test_its_fingerprint_is_that_of_its_own_source_wrapped_or_not():
    functions = InnerFunctions(inside)
    bare = fingerprint(functions.twist)
    layer = layers.install(functions, "twist", lambda original, instance, args, kwargs: 0.0)
    assert fingerprint(layers.innermost(functions, "twist")) == bare != fingerprint(functions.spread)
    layers.remove(layer)


def test_a_call_that_began_before_it_was_put_back_ends_with_the_original():
    entered, go_on, results = threading.Event(), threading.Event(), []

    def wait(x):
        entered.set()
        assert go_on.wait(10)
        return x

    layer = layers.install(InnerFunctions(inside), "twist", lambda original, instance, args, kwargs: -1.0)
    thread = threading.Thread(target=lambda: results.append(inside(3.0, first=wait)))
    thread.start()
    assert entered.wait(10)
    layers.remove(layer)
    go_on.set()
    thread.join()
    assert results == [inside(3.0)]


def test_compiled_code_sees_the_original_and_does_not_break():
    x = torch.arange(4.0)
    layer = layers.install(InnerFunctions(inside), "twist", lambda original, instance, args, kwargs: None)
    try:
        torch._dynamo.reset()
        compiled = torch.compile(inside, fullgraph=True, backend="eager")
        inside_out = compiled(x)
    finally:
        layers.remove(layer)
    assert torch.equal(inside_out, inside(x))


def test_an_address_names_one_and_says_what_there_is_instead():
    model = torch.nn.Module()
    owner, name, _ = places(Address.parse("toys:inside.<locals>.twist"), model, "here")[0]
    assert getattr(owner, name)(3.0, 2.0) == 7.0
    with pytest.raises(SiteError, match="here: `inside` defines no function `twits` of its own; did you mean `twist`"):
        places(Address.parse("toys:inside.<locals>.twits"), model, "here")
    for path in ("outside", "Table", "inside.twist", "Table.theta"):
        with pytest.raises(SiteError, match=f"here: toys has no function `{path}` that is plain Python"):
            places(Address.parse(f"toys:{path}.<locals>.twist"), model, "here")
