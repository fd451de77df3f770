"""One attribute, wrapped and unwrapped in any order, keeping its signature, below or above other libraries' hooks."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import types
import weakref

import pytest
import torch
import toys

from dit_patch.sites import layers


class Layer:
    """A layer that notes its calls and adds `by` to the result."""

    def __init__(self, by=0):
        self.by, self.calls = by, 0

    def __call__(self, original, instance, args, kwargs):
        self.calls += 1
        return original(*args, **kwargs) + self.by


@pytest.fixture
def table():
    return toys.Table()


X = torch.zeros(2, 3)


# The attribute afterwards is what it was.


def test_an_inherited_method_is_inherited_again_afterwards(table):
    before = dict(vars(table))
    layer = layers.install(table, "forward", Layer())
    assert vars(table)["forward"] is layer
    assert layers.remove(layer)
    assert vars(table) == before


def test_a_method_of_the_instance_s_own_is_the_same_object_afterwards(table):
    own = table.forward = functools.partial(toys.Table.forward, table)
    layer = layers.install(table, "forward", Layer())
    assert layers.remove(layer)
    assert vars(table)["forward"] is own


def test_a_staticmethod_is_wrapped_on_the_instance_alone():
    one, other = toys.build(), toys.build()
    layer = layers.install(one, "prepare_mask", Layer(by=7))
    assert torch.equal(one.prepare_mask(3), other.prepare_mask(3) + 7)
    assert layers.remove(layer)
    assert "prepare_mask" not in vars(one)
    assert isinstance(inspect.getattr_static(one, "prepare_mask"), staticmethod)


def test_a_function_of_a_module_is_the_same_object_afterwards():
    original = toys.shift
    layer = layers.install(toys, "shift", Layer(by=1))
    assert toys.shift(X).eq(2).all()
    assert layers.remove(layer)
    assert toys.shift is original


def test_the_forward_of_another_object_bound_to_the_instance_comes_back(table):
    other = toys.Table()
    bound = other.forward
    table.forward = bound
    layer = layers.install(table, "forward", Layer())
    table(X)
    assert other._made == 1 and table._made == 0
    assert layers.remove(layer)
    assert vars(table)["forward"] is bound


def test_removing_twice_is_harmless(table):
    layer = layers.install(table, "forward", Layer())
    assert layers.remove(layer) and layers.remove(layer)
    assert "forward" not in vars(table)


def test_removing_again_leaves_a_later_layer_alone(table):
    first = layers.install(table, "forward", Layer())
    layers.remove(first)
    second = layers.install(table, "forward", Layer(by=5))
    layers.remove(first)
    assert vars(table)["forward"] is second


# Layers over one another.


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("own", [False, True])
def test_layers_are_removed_in_any_order(table, order, own):
    if own:
        table.forward = functools.partial(toys.Table.forward, table)
    before, plain = dict(vars(table)), table(X)
    placed = [layers.install(table, "forward", Layer(by=10**number)) for number in range(3)]
    left = 111
    assert torch.equal(table(X), plain + left)
    for number in order:
        assert layers.remove(placed[number])
        left -= 10**number
        assert torch.equal(table(X), plain + left)
        assert [layers.installed(layer) for layer in placed].count(True) == str(left).count("1")
    assert vars(table) | {"_made": 0} == before | {"_made": 0}


def test_a_layer_removed_from_below_another_is_let_go(table):
    lower = Layer()
    below = layers.install(table, "forward", lower)
    layers.install(table, "forward", Layer())
    gone = weakref.ref(lower)
    layers.remove(below)
    del lower, below
    gc.collect()
    assert gone() is None


def test_two_handles_patch_one_function_and_go_in_either_order(tmp_path):
    one, other = toys.build(), toys.build()
    site = "- {at: 'forward:shift', kind: rotary, key: {x: [values]}}"
    original = toys.shift
    first = toys.patch(one, tmp_path / "one", site)
    second = toys.patch(other, tmp_path / "other", site)
    one(X), other(X), other(X)
    assert (toys.row(first, "forward:shift").misses, toys.row(first, "forward:shift").hits) == (1, 0)
    assert (toys.row(second, "forward:shift").misses, toys.row(second, "forward:shift").hits) == (1, 1)
    first.remove()
    assert toys.shift is not original
    other(X)
    assert toys.row(second, "forward:shift").hits == 2
    second.remove()
    assert toys.shift is original


# It looks like what it wraps.


@pytest.mark.parametrize(
    "owner, name",
    [(toys.Table(), "forward"), (toys.build(), "prepare_mask"), (toys, "shift")],
    ids=["method", "staticmethod", "function"],
)
def test_name_signature_and_docstring_stay(owner, name):
    original = getattr(owner, name)
    layer = layers.install(owner, name, Layer())
    try:
        ours = getattr(owner, name)
        assert ours is layer
        assert inspect.signature(ours) == inspect.signature(original)
        assert (ours.__name__, ours.__doc__, ours.__qualname__) == (
            original.__name__,
            original.__doc__,
            original.__qualname__,
        )
        assert inspect.unwrap(ours) == inspect.unwrap(original)
    finally:
        layers.remove(layer)


def test_arguments_arrive_as_they_were_given(table):
    seen = []

    def wrapper(original, instance, args, kwargs):
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    layer = layers.install(table, "forward", wrapper)
    table.forward(X, 2.0, device="cpu")
    assert seen == [((X, 2.0), {"device": "cpu"})]
    layers.remove(layer)


def test_an_exception_passes_through(table):
    layer = layers.install(table, "forward", Layer())
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'shape'"):
        table(None)
    assert layers.remove(layer)


def test_a_copy_and_a_pickle_know_nothing_of_the_layer(table):
    wrapper = Layer(by=5)
    layer = layers.install(table, "forward", wrapper)
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert not isinstance(twin.forward, layers.Wrapped)
        assert twin.forward.__self__ is twin
        assert torch.equal(twin(X), toys.Table()(X))
    assert copy.copy(layer) == layer.__wrapped__
    assert wrapper.calls == 0
    layers.remove(layer)


def test_compilers_see_the_wrapped_function(table, monkeypatch):
    wrapper = Layer()
    layer = layers.install(table, "forward", wrapper)
    monkeypatch.setattr(layers, "_is_compiling", lambda: True)
    table(X)
    assert wrapper.calls == 0
    assert layer.__class__ is layers.Wrapped


# Inside somebody else's wrapper.


def closure_over(owner):
    """Wraps `owner.forward` as many programs do, with nothing that shows what is inside."""
    below = owner.forward
    owner.forward = lambda *args, **kwargs: below(*args, **kwargs)
    return below


def test_a_removed_layer_sleeps_in_a_closure_and_goes_at_the_first_call_after_it(table):
    wrapper = Layer(by=5)
    layer = layers.install(table, "forward", wrapper)
    below = closure_over(table)
    layers.remove(layer)
    assert torch.equal(table(X), toys.Table()(X))
    assert wrapper.calls == 0
    table.forward = below
    assert vars(table)["forward"] is layer
    assert torch.equal(table(X), toys.Table()(X))
    assert "forward" not in vars(table)
    assert wrapper.calls == 0


def test_removing_says_when_a_layer_stays_inside_a_wrapper_that_shows_it(table):
    layer = layers.install(table, "forward", Layer())
    below = table.forward
    table.forward = functools.wraps(below)(lambda *args, **kwargs: below(*args, **kwargs))
    assert layers.installed(layer)
    assert not layers.remove(layer)
    table(X)
    table.forward = below
    assert layers.remove(layer)
    assert "forward" not in vars(table)


def test_a_layer_that_was_dropped_is_not_installed(table):
    layer = layers.install(table, "forward", Layer())
    table.forward = types.MethodType(toys.Table.forward, table)
    assert not layers.installed(layer)
    assert layers.remove(layer)


def test_a_module_s_function_may_be_replaced_over_the_layer(monkeypatch):
    layer = layers.install(toys, "shift", Layer())
    ours = toys.shift
    monkeypatch.setattr(toys, "shift", lambda x: ours(x) * 2)
    assert not layers.installed(layer)
    layers.remove(layer)
    assert toys.shift(X).eq(2).all()
    monkeypatch.undo()
    assert toys.shift(X).eq(1).all()
    assert not isinstance(toys.shift, layers.Wrapped)


# Below and above accelerate's and diffusers' hooks.


class Hooks:
    """Another library's hook on a module: on, off, and how often it was met."""

    def __init__(self, module):
        self.module, self.calls = module, 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class Accelerate(Hooks):
    def on(self):
        hooks = pytest.importorskip("accelerate.hooks")
        hook = hooks.ModelHook()
        hook.pre_forward = self.pre_forward
        hooks.add_hook_to_module(self.module, hook)

    def off(self):
        pytest.importorskip("accelerate.hooks").remove_hook_from_module(self.module)


class Diffusers(Hooks):
    def on(self):
        hooks = pytest.importorskip("diffusers.hooks.hooks")
        hook = hooks.ModelHook()
        hook.pre_forward = self.pre_forward
        hooks.HookRegistry.check_if_exists_or_initialize(self.module).register_hook(hook, "test")

    def off(self):
        self.module._diffusers_hook.remove_hook("test", recurse=False)


class Replacing(Diffusers):
    def on(self):
        hooks = pytest.importorskip("diffusers.hooks.hooks")

        class Hook(hooks.ModelHook):
            def new_forward(self, module, *args, **kwargs):
                return self.fn_ref.original_forward(*args, **kwargs)

        hook = Hook()
        hook.pre_forward = self.pre_forward
        hooks.HookRegistry.check_if_exists_or_initialize(self.module).register_hook(hook, "test")


HOOKS = pytest.mark.parametrize("kind", [Accelerate, Diffusers, Replacing])


def left(module):
    """What is left in the module, without the bound forward that both libraries leave behind themselves."""
    found = {name: value for name, value in vars(module).items() if name not in ("_made", "_diffusers_hook")}
    if getattr(found.get("forward"), "__func__", None) is type(module).forward:
        del found["forward"]
    return found


@HOOKS
@pytest.mark.parametrize("first_off", ["ours", "theirs"])
@pytest.mark.parametrize("first_on", ["ours", "theirs"])
def test_hooks_and_layers_come_and_go_in_any_order(table, kind, first_on, first_off):
    hook, wrapper = kind(table), Layer()
    before = left(table)
    if first_on == "theirs":
        hook.on()
        layer = layers.install(table, "forward", wrapper)
    else:
        layer = layers.install(table, "forward", wrapper)
        hook.on()
    table(X)
    assert (hook.calls, wrapper.calls) == (1, 1)
    assert layers.installed(layer)
    if first_off == "theirs":
        hook.off()
        table(X)
        assert (hook.calls, wrapper.calls) == (1, 2)
        assert layers.remove(layer)
    else:
        assert layers.remove(layer)
        table(X)
        assert (hook.calls, wrapper.calls) == (2, 1)
        hook.off()
    assert torch.equal(table(X), toys.Table()(X))
    assert layers.remove(layer)
    assert left(table) == before


@HOOKS
def test_a_layer_goes_below_a_hook_that_is_there_already(table, kind):
    order = []

    class Noting(kind):
        def pre_forward(self, module, *args, **kwargs):
            order.append("theirs")
            return args, kwargs

    Noting(table).on()

    def wrapper(original, instance, args, kwargs):
        order.append("ours")
        return original(*args, **kwargs)

    layers.install(table, "forward", wrapper)
    table(X)
    assert order == ["theirs", "ours"]


@HOOKS
def test_removing_twice_under_a_hook_that_came_later_says_that_all_is_gone(table, kind):
    # Such a hook's `__wrapped__` still names what it found.
    layer = layers.install(table, "forward", Layer())
    kind(table).on()
    assert layers.remove(layer)
    assert layers.remove(layer)


def test_layers_above_below_and_between_two_libraries_hooks(table):
    accelerate, diffusers = Accelerate(table), Diffusers(table)
    wrappers, before = [Layer() for _ in range(3)], left(table)
    placed = [layers.install(table, "forward", wrappers[0])]
    accelerate.on()
    placed.append(layers.install(table, "forward", wrappers[1]))
    diffusers.on()
    placed.append(layers.install(table, "forward", wrappers[2]))
    table(X)
    assert [accelerate.calls, diffusers.calls, *(each.calls for each in wrappers)] == [1, 1, 1, 1, 1]
    assert layers.remove(placed[1])
    diffusers.off()
    assert layers.remove(placed[0])
    accelerate.off()
    table(X)
    assert [accelerate.calls, diffusers.calls, *(each.calls for each in wrappers)] == [1, 1, 1, 1, 2]
    assert layers.remove(placed[2])
    assert left(table) == before


def test_a_hook_whose_new_forward_was_taken_out_by_diffusers_itself_is_seen_through(table):
    # Removing the lower hook points the upper one past its own `new_forward`.
    hooks = pytest.importorskip("diffusers.hooks.hooks")

    class Hook(hooks.ModelHook):
        def new_forward(self, module, *args, **kwargs):
            return self.fn_ref.original_forward(*args, **kwargs)

    registry = hooks.HookRegistry.check_if_exists_or_initialize(table)
    registry.register_hook(hooks.ModelHook(), "lower")
    registry.register_hook(Hook(), "upper")
    registry.remove_hook("lower", recurse=False)
    wrapper = Layer()
    layer = layers.install(table, "forward", wrapper)
    table(X)
    assert wrapper.calls == 1
    assert layers.remove(layer)
    table(X)
    assert wrapper.calls == 1


def test_hooks_that_other_libraries_left_in_a_circle_do_not_hang(table):
    hooks = pytest.importorskip("accelerate.hooks")
    Accelerate(table).on()
    Diffusers(table).on()
    hook = table._hf_hook
    del table._hf_hook  # as if it had never been there: accelerate hooks its own hook again
    hooks.add_hook_to_module(table, hook)
    layer = layers.install(table, "forward", Layer())
    layers.installed(layer)
    layers.remove(layer)
