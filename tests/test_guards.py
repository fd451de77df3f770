"""What modules compute with besides their arguments: every change of it is noticed, and nothing of it is kept alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import toys
from torch.multiprocessing.reductions import StorageWeakRef

from dit_patch.memo.guards import numerics
from dit_patch.memo.keys import Uncacheable
from dit_patch.memo.model_guards import ModelGuards
from dit_patch.memo.site_guards import SiteGuards


class Watched:
    """A site whose results depend on one module, asked as the site asks."""

    def __init__(self, module, model=None, **options):
        self.world = ModelGuards(model or torch.nn.Sequential(module))
        self.site = SiteGuards([module], self.world.root, **options)
        self.world.add(self.site)

    def epoch(self):
        world = self.world.look()
        if self.site.refusal is not None:
            raise Uncacheable(self.site.refusal)
        return world, self.site.weights.epoch()


def state(module, **options):
    return Watched(module, **options)


class Both(torch.nn.Module):
    """Weights, a buffer, children and plain attributes."""

    def __init__(self):
        super().__init__()
        self.scale, self.name, self.axes, self.later = 1.0, "n", [1, 2], None
        self.linear = torch.nn.Linear(2, 2)
        self.deep = torch.nn.Sequential(torch.nn.Linear(2, 2))
        self.register_buffer("table", torch.zeros(2))
        self.eval()


def replace_parameter(module):
    module.linear.weight = torch.nn.Parameter(module.linear.weight.detach().clone())


def load(module):
    module.load_state_dict({name: tensor + 1 for name, tensor in module.state_dict().items()})


def new_data(module):
    module.linear.weight.data = module.linear.weight.detach().clone()


def no_grad(edit):
    def inside(module):
        with torch.no_grad():
            edit(module)

    return inside


CHANGES = {
    "a parameter in place": no_grad(lambda m: m.linear.weight.mul_(2)),
    "a parameter deep inside in place": no_grad(lambda m: m.deep[0].bias.add_(1)),
    "a parameter's data": new_data,
    "a parameter replaced": replace_parameter,
    "a parameter taken away": lambda m: setattr(m.linear, "bias", None),
    "a parameter deleted": lambda m: delattr(m.linear, "bias"),
    "a parameter added": lambda m: m.register_parameter("extra", torch.nn.Parameter(torch.ones(1))),
    "a buffer in place": lambda m: m.table.add_(1),
    "a buffer replaced": lambda m: setattr(m, "table", torch.zeros(2)),
    "a buffer resized": lambda m: m.table.resize_(100000),
    "a buffer added": lambda m: m.register_buffer("extra", torch.ones(1)),
    "a buffer added where there was none": lambda m: m.linear.register_buffer("extra", torch.ones(1)),
    "a buffer deleted": lambda m: delattr(m, "table"),
    "a child replaced": lambda m: setattr(m, "linear", m.deep[0]),
    "a child replaced deep inside": lambda m: m.deep.__setitem__(0, torch.nn.Identity()),
    "a child added": lambda m: m.deep.append(torch.nn.ReLU()),
    "a child added where there was none": lambda m: m.linear.add_module("extra", torch.nn.ReLU()),
    "weights loaded": load,
    "another dtype": lambda m: m.to(torch.float64),
    "a number": lambda m: setattr(m, "scale", 2.0),
    "a string": lambda m: setattr(m, "name", "other"),
    "a list in place": lambda m: m.axes.append(3),
    "an item of a list": lambda m: m.axes.__setitem__(0, 5),
    "a list replaced": lambda m: setattr(m, "axes", [2, 1]),
    "a list taken away": lambda m: setattr(m, "axes", None),
    "an attribute deleted": lambda m: delattr(m, "scale"),
    "an attribute that was none": lambda m: setattr(m, "later", 1),
    "a number that becomes a tensor": lambda m: setattr(m, "scale", torch.ones(3)),
    "matmul precision": lambda m: torch.set_float32_matmul_precision("medium"),
}


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_another_epoch(change, precision):
    module = Both()
    watched = state(module)
    with torch.no_grad():
        before = watched.epoch()
        assert watched.epoch() == before
        change(module)
        after = watched.epoch()
        assert after != before
        assert watched.epoch() == after


def test_a_list_that_came_later_counts_in_place_too():
    module = Both()
    watched = state(module)
    with torch.no_grad():
        watched.epoch()
        module.later = [1]
        before = watched.epoch()
        module.later.append(2)
        assert watched.epoch() != before


def test_an_attribute_may_hold_tensors_between_calls():
    # What a forward leaves in an attribute: None first, then one table, then another.
    module = Both()
    watched = state(module)
    with torch.no_grad():
        watched.epoch()
        for size in (2, 3, 3):
            module.later = torch.ones(size)
            watched.epoch()
            assert watched.epoch() == watched.epoch()


def test_moving_there_and_back_is_another_epoch_or_the_same_weights():
    module = Both()
    watched = state(module)
    with torch.no_grad():
        before, weight = watched.epoch(), module.linear.weight.detach().clone()
        module.to(torch.float16).to(torch.float32)
        assert watched.epoch() != before or torch.equal(weight, module.linear.weight)
        assert watched.epoch() != before


def test_a_child_replaced_counts_without_weights_too():
    module = torch.nn.Sequential(toys.Table())
    watched = state(module)
    before = watched.epoch()
    module[0] = toys.Table()
    assert watched.epoch() != before


def test_attributes_with_an_underscore_are_the_module_s_own_business():
    module = Both()
    watched = state(module)
    with torch.no_grad():
        before = watched.epoch()
        module._cache = torch.ones(2)
        module._calls = 3
        assert watched.epoch() == before


def test_of_the_model_itself_only_its_own_attributes_and_tensors_count():
    module = Both()
    watched = state(module, subtree=False)
    with torch.no_grad():
        before = watched.epoch()
        module.linear.weight.mul_(2)
        assert watched.epoch() == before
        module.table.add_(1)
        assert watched.epoch() != before


def test_training_mode_is_refused_with_advice_where_there_are_weights():
    module = Both().train()
    with torch.no_grad(), pytest.raises(Uncacheable, match=r"training mode; call `.eval\(\)`"):
        state(module).epoch()
    watched = state(toys.Table().train())
    before = watched.epoch()
    assert watched.epoch() == before


def test_a_mode_switched_and_switched_back_is_usable_again():
    module = Both()
    watched = state(module)
    with torch.no_grad():
        watched.epoch()
        module.train()
        with pytest.raises(Uncacheable):
            watched.epoch()
        module.eval()
        watched.epoch()


def test_recording_autograd_is_refused_where_weights_need_gradients():
    module = Both()
    with pytest.raises(Uncacheable, match="autograd is recording"):
        state(module).epoch()
    module.requires_grad_(False)
    state(module).epoch()
    state(toys.Table()).epoch()


def test_weights_on_the_meta_device_are_refused_until_they_are_there():
    module = Both().to("meta")
    watched = state(module)
    with torch.no_grad():
        with pytest.raises(Uncacheable, match="weights on the meta device"):
            watched.epoch()
        module.to_empty(device="cpu")
        watched.epoch()


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_a_submodule_is_refused_while_it_is_there(register):
    module = Both()
    watched = state(module)
    with torch.no_grad():
        watched.epoch()
        hook = getattr(module.deep[0], register)(lambda *_: None)
        with pytest.raises(Uncacheable, match="a hook is registered on a submodule"):
            watched.epoch()
        hook.remove()
        watched.epoch()


def test_a_hook_on_the_owner_itself_runs_around_the_call_and_is_fine():
    module = Both()
    watched = state(module)
    with torch.no_grad():
        watched.epoch()
        assert not watched.site.is_observed
        module.register_forward_hook(lambda *_: None)
        watched.epoch()
        assert watched.site.is_observed


def test_weights_of_a_type_of_their_own_are_refused():
    class Quantised(torch.Tensor):
        pass

    module = Both()
    module.linear.weight = torch.nn.Parameter(torch.ones(2, 2).as_subclass(Quantised))
    with torch.no_grad(), pytest.raises(Uncacheable, match="weights of type .*Quantised"):
        state(module).epoch()


def test_weights_made_in_inference_mode_cannot_be_followed():
    with torch.inference_mode():
        module = Both()
    with torch.no_grad(), pytest.raises(Uncacheable, match="inference_mode have no version"):
        state(module).epoch()


def test_replaced_weights_are_let_go_at_once_those_of_a_module_at_the_next_look():
    module = Both()
    watched = state(module)
    with torch.no_grad():
        watched.epoch()
        gone = weakref.ref(module.linear.weight), weakref.ref(module.table)
        replace_parameter(module)
        module.table = torch.ones(2)
        assert [ref() for ref in gone] == [None, None]
        gone = [weakref.ref(tensor) for tensor in (*module.parameters(), *module.buffers())]
        module.linear = module.deep = module.table = None
        watched.epoch()
        gc.collect()
        assert [ref() for ref in gone] == [None] * len(gone)


def test_storage_is_free_when_the_weights_have_moved():
    module = Both()
    watched = state(module)
    with torch.no_grad():
        watched.epoch()
        old = [StorageWeakRef(tensor.untyped_storage()) for tensor in module.parameters()]
        module.to(torch.float64)
        assert all(storage.expired() for storage in old)


def test_a_tensor_that_takes_a_freed_one_s_place_is_noticed():
    module = Both()
    watched = state(module)
    seen = set()
    with torch.no_grad():
        for _ in range(50):
            shape = module.linear.weight.shape
            del module.linear.weight
            module.linear.weight = torch.nn.Parameter(torch.randn(shape))
            seen.add(watched.epoch())
    assert len(seen) == 50


def test_numerics_count_without_weights_too(precision):
    table = state(toys.Table())
    with torch.no_grad():
        before = table.epoch()
        torch.set_float32_matmul_precision("medium")
        assert table.epoch() != before
    assert numerics() is not None


def test_a_merge_of_fastvideo_s_lora_is_seen_by_the_layer_s_own_flag():
    """The weights are changed through `.data`, which leaves no version behind."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = torch.nn.Linear(2, 2)
            self.merged, self.disable_lora, self.lora_alpha, self.lora_strength = False, False, 4, 1.0

    model = torch.nn.Sequential(Layer()).eval().requires_grad_(False)
    state = Watched(model)
    epoch = state.epoch()
    assert state.epoch() == epoch
    changes = [("merged", True), ("lora_strength", 0.5), ("lora_alpha", 2), ("disable_lora", True), ("merged", False)]
    for name, value in changes:
        model[0].base_layer.weight.data += 0.5
        setattr(model[0], name, value)
        assert state.epoch() > epoch, name
        epoch = state.epoch()


def test_what_cannot_be_looked_at_makes_sites_step_aside_and_no_forward_fail():
    class Gone:
        pass

    module = Both()
    watched = state(module)
    with torch.no_grad():
        watched.epoch()
        thing = Gone()
        module.proxy = weakref.proxy(thing)
        del thing
        with pytest.raises(Uncacheable, match="cannot be looked at .ReferenceError"):
            watched.epoch()
        del module.proxy
        watched.epoch()


def test_a_container_that_changes_while_it_is_looked_at_is_another_epoch():
    class Restless(dict):
        def __iter__(self):
            raise RuntimeError("dictionary changed size during iteration")

    module = Both()
    module.options = {"scale": 1.0}
    watched = state(module)
    with torch.no_grad():
        before = watched.epoch()
        module.options = Restless()
        with pytest.raises(Uncacheable, match="changed size during iteration"):
            watched.epoch()
        module.options = {"scale": 1.0}
        assert watched.epoch() > before
