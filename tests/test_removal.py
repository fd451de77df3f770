"""Ours and other libraries' layers on one real module, in random order: the call is always right, and all goes away."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dit_patch.sites import layers

accelerate_hooks = pytest.importorskip("accelerate.hooks")
diffusers_hooks = pytest.importorskip("diffusers.hooks.hooks")
transformer_wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")

torch.set_num_threads(1)
LATENTS = torch.zeros(1, 4, 2, 4, 4)


class Rope:
    """A real WanRotaryPosEmbed with other libraries' layers on it; `trace` says which of them the last call met."""

    def __init__(self):
        self.module = transformer_wan.WanRotaryPosEmbed(12, (1, 2, 2), 32)
        self.trace = []
        self.closures = {}

    def call(self):
        """The result, and the foreign layers on the way, or the exception that the foreign layers brought about."""
        self.trace.clear()
        try:
            result = self.module(LATENTS)
        except (AttributeError, RecursionError) as error:
            return type(error), []
        return [tensor.sum().item() for tensor in result], [each for each in self.trace if each[0] != "ours"]

    def add_accelerate(self, number):
        trace = self.trace

        class Hook(accelerate_hooks.ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                trace.append(("accelerate", number))
                return args, kwargs

        accelerate_hooks.add_hook_to_module(self.module, Hook())

    def remove_accelerate(self):
        accelerate_hooks.remove_hook_from_module(self.module)

    def add_diffusers(self, name, replaces):
        trace = self.trace

        class Hook(diffusers_hooks.ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                trace.append(("diffusers", name))
                return args, kwargs

        class Replacing(Hook):
            def new_forward(self, module, *args, **kwargs):
                trace.append(("diffusers, instead", name))
                return self.fn_ref.original_forward(*args, **kwargs)

        registry = diffusers_hooks.HookRegistry.check_if_exists_or_initialize(self.module)
        registry.register_hook(Replacing() if replaces else Hook(), name)

    def remove_diffusers(self, name):
        self.module._diffusers_hook.remove_hook(name, recurse=False)

    def add_closure(self, number, named):
        below, own, trace = self.module.forward, "forward" in vars(self.module), self.trace

        def forward(*args, **kwargs):
            trace.append(("closure", number))
            return below(*args, **kwargs)

        self.closures[number] = below, own
        self.module.forward = functools.wraps(below)(forward) if named else forward

    def remove_closure(self, number):
        below, own = self.closures.pop(number)
        if own:
            self.module.forward = below
        else:
            vars(self.module).pop("forward", None)

    def add_ours(self, number):
        def layer(original, instance, args, kwargs):
            self.trace.append(("ours", number))
            return original(*args, **kwargs)

        return layers.install(self.module, "forward", layer)

    def bound(self):
        """Whether the module has its class's own forward, from its class or as an attribute of its own."""
        forward = vars(self.module).get("forward")
        return forward is None or (type(forward) is types.MethodType and forward.__func__ is type(self.module).forward)


@dataclass
class Others:
    """Which layers of other libraries are on both models, and what these have done to each other."""

    hooks: list[str] = field(default_factory=list)  # of diffusers, in the order they came
    replacing: set[str] = field(default_factory=set)  # hooks with a forward of their own
    ousted: set[str] = field(default_factory=set)  # replacing hooks that came directly over one that has gone since
    accelerate: int | None = None  # how many hooks of diffusers accelerate's came over; None while it is off
    is_bypassed: bool = False  # accelerate's hook is on, and another library has taken it out of the way of the calls
    is_mixed: bool = False  # a closure has gone from between hooks: what each will put back is anybody's guess
    is_broken: bool = False  # without us, too, the call is not what it was: nothing is to be held to that


class Removal(RuleBasedStateMachine):
    """Layers come and go; after each step both models still compute the same.

    `patched` gets our layers and the foreign ones, `plain` the foreign ones only. `ours` are the layers that are on,
    by number, `reachable` those of them that nothing another library did can have dropped.
    """

    closures_too = False

    @initialize()
    def start(self):
        self.patched, self.plain = Rope(), Rope()
        self.expected, _ = self.plain.call()
        self.ours = {}
        self.gone = []
        self.reachable = set()
        self.others = Others()
        self.number = 0

    def both(self, operation, *args):
        for rope in (self.patched, self.plain):
            getattr(rope, operation)(*args)

    def fresh(self):
        self.number += 1
        return self.number

    def taken_away(self):
        """A foreign layer goes; where that puts back what it once found, layers of ours that came later are dropped."""
        if self.patched.closures or self.others.is_bypassed or self.others.is_mixed:
            self.reachable.clear()

    @precondition(lambda self: len(self.ours) < 3)
    @rule()
    def install(self):
        number = self.fresh()
        self.ours[number] = self.patched.add_ours(number)
        self.reachable.add(number)

    @precondition(lambda self: self.ours)
    @rule(data=st.data())
    def remove(self, data):
        number = data.draw(st.sampled_from(sorted(self.ours)))
        layer = self.ours.pop(number)
        layers.remove(layer)
        self.reachable.discard(number)
        self.gone.append(layer)

    @precondition(lambda self: self.others.accelerate is None)
    @rule()
    def accelerate_comes(self):
        self.both("add_accelerate", self.fresh())
        self.others.accelerate = len(self.others.hooks)

    # With a diffusers hook over it, accelerate leaves a forward behind that cannot be called.
    @precondition(lambda self: self.others.accelerate is not None and len(self.others.hooks) <= self.others.accelerate)
    @rule()
    def accelerate_goes(self):
        self.taken_away()
        self.both("remove_accelerate")
        self.others.accelerate, self.others.is_bypassed = None, False

    @precondition(lambda self: len(self.others.hooks) < 3)
    @rule(replaces=st.booleans())
    def diffusers_comes(self, replaces):
        name = f"hook {self.fresh()}"
        self.both("add_diffusers", name, replaces)
        self.others.hooks.append(name)
        if replaces:
            self.others.replacing.add(name)

    @precondition(lambda self: self.others.hooks)
    @rule(data=st.data())
    def diffusers_goes(self, data):
        name = data.draw(st.sampled_from(self.others.hooks))
        self.taken_away()
        if name in self.others.ousted:
            self.reachable.clear()
        # Diffusers points a hook past its own `new_forward` when the hook below goes, and back to it at its own end.
        self.others.ousted |= self.others.replacing & set(self.others.hooks[self.others.hooks.index(name) + 1 :][:1])
        self.both("remove_diffusers", name)
        if self.others.accelerate is not None and self.others.hooks.index(name) < self.others.accelerate:
            self.others.accelerate -= 1
            self.others.is_bypassed = True
        self.others.hooks.remove(name)

    @precondition(lambda self: self.closures_too and len(self.patched.closures) < 2)
    @rule(named=st.booleans())
    def a_closure_comes(self, named):
        self.both("add_closure", self.fresh(), named)

    @precondition(lambda self: self.closures_too and self.patched.closures)
    @rule(data=st.data())
    def a_closure_goes(self, data):
        self.taken_away()
        self.others.is_mixed = self.others.is_mixed or self.others.accelerate is not None or bool(self.others.hooks)
        self.both("remove_closure", data.draw(st.sampled_from(sorted(self.patched.closures))))

    @invariant()
    def the_call_is_as_without_us(self):
        if self.others.is_broken:
            return
        plain = self.plain.call()
        self.others.is_broken = plain[0] != self.expected
        if self.others.is_broken:
            assert self.closures_too, "other libraries' hooks alone must not break each other here"
            return
        assert self.patched.call() == plain
        met = {number for kind, number in self.patched.trace if kind == "ours"}
        assert met <= set(self.ours), "a removed layer acted"
        assert self.reachable <= met, "a live layer was not reached"
        for number, layer in self.ours.items():
            assert layers.installed(layer) or number not in met or self.closures_too

    def teardown(self):
        if not hasattr(self, "patched") or self.others.is_broken:
            return
        for name in reversed(self.others.hooks):
            self.both("remove_diffusers", name)
        if self.others.accelerate is not None:
            self.both("remove_accelerate")
        for number in sorted(self.patched.closures, reverse=True):
            self.both("remove_closure", number)
        plain = self.plain.call()
        if plain[0] != self.expected:
            return
        for layer in self.ours.values():
            layers.remove(layer)
        for layer in [*self.gone, *self.ours.values()]:
            assert layers.remove(layer) or not self.plain.bound()
        assert self.patched.call() == plain
        self.nothing_is_left()

    def nothing_is_left(self):
        ours, plain = (vars(rope.module) for rope in (self.patched, self.plain))
        assert ours.keys() - {"forward"} == plain.keys() - {"forward"}
        assert self.patched.bound() or not self.plain.bound()
        assert "forward" not in ours or "forward" in plain
        for name in ours.keys() - {"forward", "_diffusers_hook"}:
            assert not isinstance(ours[name], layers.Wrapped)
        seen = []
        for holder, attribute in layers.slots(self.patched.module, "forward"):
            value = vars(holder).get(attribute)
            seen.append(type(value))
        assert layers.Wrapped not in seen


class RemovalWithClosures(Removal):
    closures_too = True


BOUNDED = settings(
    deadline=None,
    max_examples=400,
    stateful_step_count=25,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def test_layers_of_ours_and_of_hook_libraries_come_and_go_in_any_order():
    run_state_machine_as_test(Removal, settings=BOUNDED)


def test_a_closure_of_somebody_else_may_drop_our_layer_but_nothing_else_goes_wrong():
    run_state_machine_as_test(RemovalWithClosures, settings=BOUNDED)
