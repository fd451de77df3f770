"""One layer on a function that models share, however many of them are patched."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch
import toys

import dit_patch
from dit_patch.sites import layers, scope
from dit_patch.sites.shared import SharedPlacement, Switch
from dit_patch.spec import mini
from dit_patch.spec.registry import Registry


def plus(amount):
    """A site that adds to what the original gives."""

    def site(original, instance, args, kwargs):
        return original(*args, **kwargs) + amount

    return site


@pytest.fixture
def module():
    found = types.ModuleType("found")
    found.double = lambda x: 2 * x
    return found


class Running:
    """A forward of `model`, for as long as it lasts."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        scope._current.set(scope.Frame(self.model, {}, (), {}, scope.current()))

    def __exit__(self, *_):
        scope._current.set(scope.current().parent)


def count(module):
    return len(list(layers.layers_on(module, "double")))


def test_each_model_has_its_own_site_in_one_layer(module):
    models, sites = [torch.nn.Identity() for _ in range(20)], [plus(at) for at in range(20)]
    placements = [SharedPlacement(module, "double", site, model) for site, model in zip(sites, models)]
    for placement in placements:
        placement.install()
    assert count(module) == 1 and not any(placement.is_displaced for placement in placements)
    for at, model in enumerate(models):
        with Running(model):
            assert module.double(5) == 10 + at
    assert module.double(5) == 10, "outside of forwards"
    with Running(torch.nn.Identity()):
        assert module.double(5) == 10, "a model that is not patched"


def test_the_last_takes_the_layer_away(module):
    original = module.double
    models, sites = [torch.nn.Identity() for _ in range(3)], [plus(at) for at in range(3)]
    placements = [SharedPlacement(module, "double", site, model) for site, model in zip(sites, models)]
    for placement in placements:
        placement.install()
    for placement in (placements[1], placements[0], placements[0]):
        placement.remove()
        assert count(module) == 1 and placement.is_displaced
    placements[2].remove()
    assert module.double is original


def test_two_sites_of_one_model_work_one_around_the_other(module):
    model, inner, outer = torch.nn.Identity(), plus(1), plus(10)
    placements = [SharedPlacement(module, "double", site, model) for site in (inner, outer)]
    for placement in placements:
        placement.install()
    with Running(model):
        assert module.double(5) == 21
        placements[0].remove()
        assert module.double(5) == 20
    placements[1].remove()
    assert count(module) == 0


def test_a_freed_site_goes_by_itself_and_the_layer_with_the_last(module):
    model, sites = torch.nn.Identity(), [plus(1), plus(2)]
    placements = [SharedPlacement(module, "double", site, model) for site in sites]
    for placement in placements:
        placement.install()
    sites.pop()
    gc.collect()
    with Running(model):
        assert module.double(5) == 11
    sites.pop()
    gc.collect()
    assert count(module) == 0


def test_a_layer_below_another_library_s_stays_and_a_new_one_comes_on_top(module):
    models, sites = [torch.nn.Identity(), torch.nn.Identity()], [plus(1), plus(2)]
    placements = [SharedPlacement(module, "double", site, model) for site, model in zip(sites, models)]
    placements[0].install()
    ours = module.double
    module.double = lambda x: ours(x) * 100
    placements[1].install()
    for model, expected in zip(models, (1100, 1002)):
        with Running(model):
            assert module.double(5) == expected
    assert type(module.double) is layers.Wrapped and isinstance(module.double.installer, Switch)


def test_many_patched_models_share_one_layer_and_leave_nothing():
    spec = Registry().get("diffusers/wan")
    case = spec.mini.case()
    models = [mini.build(spec, case) for _ in range(12)]
    calls = list(mini.forwards(case, case.sizes[0], steps=1))
    address = spec.sites[-1].address
    with torch.no_grad():
        expected = [model(**calls[0])[0] for model in models]
        handles = [dit_patch.apply(model) for model in models]
        owner, name = handles[0].patched_models[0].sites[str(address)][0].attribute.owner, address.name
        assert len(list(layers.layers_on(owner, name))) == 1
        for model, wanted in zip(models, expected):
            assert toys.same_bits(model(**calls[0])[0], wanted)
    gone = [weakref.ref(model) for model in models]
    del models, model, handles
    gc.collect()
    assert [each() for each in gone] == [None] * 12
    assert not list(layers.layers_on(owner, name))
