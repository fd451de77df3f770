"""From a pipeline to the models in it, and from an address to the attributes behind it; nothing is changed."""

from __future__ import annotations

import types

import pytest
import torch
import toys

from dit_patch.errors import SiteError, UnsupportedModelError
from dit_patch.sites import resolve, scope
from dit_patch.sites.pipeline_models import find_models, find_stages, is_compiled_in, unwrap
from dit_patch.spec.address import Address
from dit_patch.upstream.torch_internals import is_compiled


def pipeline(**components):
    return types.SimpleNamespace(components=components)


def places(model, at, label, pipeline=None):
    found = resolve.places(Address.parse(at), model, label, pipeline)
    return [(owner, name) for owner, name, _ in found]


# The models inside.


def test_a_model_alone_is_called_model():
    model = toys.build()
    assert find_models(model) == {"model": model}


def test_the_modules_of_a_pipeline_come_by_name_in_order_and_nothing_else():
    one, other = toys.build(), torch.nn.Linear(1, 1)
    found = find_models(pipeline(scheduler=object(), transformer=one, vae=None, text_encoder=other))
    assert list(found.items()) == [("transformer", one), ("text_encoder", other)]


def test_a_pipeline_may_keep_its_parts_in_modules_as_fastvideo_does():
    model = toys.build()
    assert find_models(types.SimpleNamespace(modules={"transformer": model, "scheduler": 1})) == {"transformer": model}


def test_a_module_with_children_is_not_taken_for_a_pipeline():
    # torch modules have `modules`, too.
    model = torch.nn.Sequential(toys.build())
    assert find_models(model) == {"model": model}


def test_a_model_under_two_names_is_found_once():
    model = toys.build()
    assert find_models(pipeline(transformer=model, transformer_2=model)) == {"transformer": model}


def test_a_model_and_its_compiled_wrapper_are_one():
    model = toys.build()
    assert find_models(pipeline(transformer=torch.compile(model), transformer_2=model)) == {"transformer": model}


@pytest.mark.parametrize("target", [None, 3, "wan", object(), toys.Toy, {"transformer": 1}])
def test_what_is_neither_is_named(target):
    with pytest.raises(UnsupportedModelError, match=r"expected a pipeline or a torch.nn.Module, got .*") as caught:
        find_models(target)
    assert str(caught.value).endswith(f"({type(target).__qualname__})")


# Wrappers.


def test_compiled_and_parallel_wrappers_are_seen_through_however_deep():
    model = toys.build()
    assert unwrap(model) is model
    assert unwrap(torch.compile(model)) is model
    assert unwrap(torch.nn.DataParallel(model)) is model
    assert unwrap(torch.compile(torch.nn.DataParallel(model))) is model


@pytest.mark.parametrize("name", ["DistributedDataParallel", "FullyShardedDataParallel"])
def test_distributed_wrappers_are_known_by_name(name):
    wrapper = type(name, (torch.nn.Module,), {})()
    wrapper.module = model = toys.build()
    assert unwrap(wrapper) is model


def test_a_module_that_merely_has_a_child_called_module_is_no_wrapper():
    wrapper = torch.nn.Module()
    wrapper.module = toys.build()
    assert unwrap(wrapper) is wrapper


def test_what_runs_compiled_is_told():
    model, whole, inside = toys.build(), toys.build(), toys.build()
    assert not is_compiled(model)
    assert is_compiled(torch.compile(model))
    whole.compile()
    assert is_compiled(whole)
    inside.embed.compile()
    assert not is_compiled(inside)
    assert resolve.is_compiled_along(inside, "embed.first")
    assert not resolve.is_compiled_along(inside, "blocks.0.first")
    assert resolve.is_compiled_along(inside, "gone.for.good")


# Addresses.


def test_an_address_names_attributes_of_submodules():
    model = toys.build()
    assert places(model, "table.forward", "here") == [(model.table, "forward")]
    assert places(model, "prepare_mask", "here") == [(model, "prepare_mask")]
    assert places(model, "blocks.1.last.forward", "here") == [(model.blocks[1].last, "forward")]


def test_a_star_is_each_child_at_one_step():
    model = toys.build()
    blocks = list(model.blocks)
    assert places(model, "blocks.*.forward", "here") == [(block, "forward") for block in blocks]
    assert places(model, "blocks.*.last.forward", "here") == [(block.last, "forward") for block in blocks]
    assert len(resolve.submodules(model, "blocks.*.*", "here")) == 4
    assert resolve.submodules(model, "", "here") == [model]


def test_of_what_a_star_stands_for_only_those_count_that_go_on_as_the_address_does():
    model = toys.build()
    model.blocks[0].last = None
    assert places(model, "blocks.*.last.forward", "here") == [(model.blocks[1].last, "forward")]
    assert resolve.branches(model, "blocks.*.last", "here") == [(model.blocks[1].last, ("1",))]
    assert resolve.fill_stars("blocks.*.first.*", ("1",)) == "blocks.1.first.*"
    model.blocks[1].last = None
    with pytest.raises(SiteError, match="blocks.0 has no submodule `last`"):
        places(model, "blocks.*.last.forward", "here")


class Stage:
    def __init__(self, **parts):
        vars(self).update(parts)

    def _initialize_kv_cache(self):
        return []


def test_an_address_in_the_pipeline_is_a_method_of_the_stages_that_run_the_model():
    model, other = toys.build(), toys.build()
    runs, runs_compiled = Stage(transformer=model), Stage(transformer_2=torch.compile(model), transformer=model)
    pipe = types.SimpleNamespace(stages=[Stage(), runs, Stage(transformer=other), runs_compiled, runs, 3])
    assert find_stages(pipe, model) == [runs, runs_compiled]
    found = places(model, "pipeline:_initialize_kv_cache", "here", pipe)
    assert found == [(runs, "_initialize_kv_cache"), (runs_compiled, "_initialize_kv_cache")]
    with pytest.raises(SiteError, match="has a method `nothing`; the stages that do: Stage, Stage"):
        places(model, "pipeline:nothing", "here", pipe)
    with pytest.raises(SiteError, match="the stages that do: none"):
        places(model, "pipeline:_initialize_kv_cache", "here", model)


@pytest.mark.parametrize("address", ["toys:nothing", "nowhere:f", "toys:rank"])
def test_a_function_that_is_none_is_an_error(address):
    with pytest.raises(SiteError, match=f"here: `{address}` (cannot be found|is a list, which cannot be called)"):
        resolve.function(Address.parse(address), "here")
    assert resolve.function(Address.parse("toys:shift"), "here") is toys.shift


def test_a_forward_of_its_own_is_told_from_an_inherited_one():
    class Decorated(toys.Toy):
        forward = torch.no_grad()(toys.Toy.forward)

    class Own(toys.Toy):
        def forward(self, x):
            return x

    own = {cls: scope.has_own_forward(toys.build(cls), ("toys.Toy",)) for cls in (toys.Toy, toys.Child, Decorated, Own)}
    assert own == {toys.Toy: False, toys.Child: False, Decorated: False, Own: True}


def test_a_part_of_a_pipeline_that_runs_compiled_is_told():
    model, whole = toys.build(), toys.build()
    assert is_compiled_in(pipeline(transformer=torch.compile(model)), model)
    assert not is_compiled_in(pipeline(transformer=model, other=torch.compile(whole)), model)
    assert is_compiled_in(torch.compile(model), model)


def test_a_block_whose_forward_was_replaced_by_compiled_code_is_told():
    model = toys.build()
    assert not is_compiled(model.embed)
    model.embed.forward = torch.compile(model.embed.forward)
    assert is_compiled(model.embed) and resolve.is_compiled_along(model, "embed.first")


def test_compiled_submodules_are_seen_through():
    model = toys.build()
    table = model.table
    model.table = torch.compile(model.table)
    assert places(model, "table.forward", "here") == [(table, "forward")]


def test_a_global_is_named_by_its_module_or_as_forward_sees_it():
    model = toys.build()
    assert places(model, "toys:shift", "here") == [(toys, "shift")]
    assert places(model, "forward:shift", "here") == [(toys, "shift")]
    assert places(toys.build(toys.Child), "forward:shift", "here") == [(toys, "shift")]


def test_forward_is_seen_through_decorators():
    class Decorated(toys.Toy):
        forward = torch.no_grad()(toys.Toy.forward)

    assert places(toys.build(Decorated), "forward:shift", "here") == [(toys, "shift")]


@pytest.mark.parametrize(
    "at, message",
    [
        ("blocks.2.forward", "here: Toy.blocks has no submodule `2`\n    It has: 0, 1."),
        ("blocks.*.lasst.forward", "here: Toy.blocks.0 has no submodule `lasst`; did you mean `last`?"),
        ("prepare_masks", "here: a Toy has no method `prepare_masks`; did you mean `prepare_mask`?"),
        ("table.theta", "here: a Table has no method `theta`"),
        ("toys:shft", "here: toys has no function `shft`; did you mean `shift`?"),
        ("toys:annotations", "here: toys has no function `annotations`"),
        ("no.such.place:f", "here: cannot import `no.such.place`: No module named 'no'"),
    ],
)
def test_an_address_without_an_attribute_says_what_there_is(at, message):
    with pytest.raises(SiteError) as caught:
        places(toys.build(), at, "here")
    assert str(caught.value).startswith(message)


def test_nothing_is_changed():
    model = toys.build()
    compiled = torch.compile(model)
    before = toys.snapshot(model)
    places(model, "blocks.*.forward", "here")
    places(model, "forward:shift", "here")
    find_models(compiled)
    assert toys.same_snapshot(before, toys.snapshot(model))
