"""What a module inside a site reads: attributes, objects, functions and their variables, changed after a warm-up."""

import collections
import contextvars
import functools
import operator
import os
import random
import types
from dataclasses import dataclass

import numpy
import pytest
import torch
from seams import assert_seen, case

VARIABLE = contextvars.ContextVar("gain", default=1.0)
NUMBERS = [1.0]
GAIN = 1.0


class Activation(torch.nn.Module):
    """Stands in for a site's activation, and multiplies by whatever `gain` is or gives."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return torch.nn.functional.silu(x) * self.read()

    def read(self):
        return self.gain() if callable(self.gain) else self.gain


class Object:
    """A plain object that can be called."""

    def __init__(self, gain=1.0):
        self.gain = gain

    def __call__(self):
        return self.gain

    def method(self):
        return self.gain


class Slotted:
    __slots__ = ("gain",)

    def __init__(self):
        self.gain = 1.0

    def __call__(self):
        return self.gain


@dataclass
class Settings:
    gain: float = 1.0


class Property(Activation):
    scale = 1.0

    @property
    def scaled(self):
        return self.scale

    def read(self):
        return self.scaled


class Nested(Activation):
    """Reads a number deep inside what it has."""

    def read(self):
        gain = self.gain
        while not isinstance(gain, (float, torch.Tensor, numpy.floating)):
            if isinstance(gain, dict):
                gain = next(iter(gain.values()))
            elif isinstance(gain, (list, tuple, collections.deque, numpy.ndarray)):
                gain = gain[0]
            elif isinstance(gain, set):
                gain = max(gain)
            else:
                gain = gain.gain
        return gain


def closure():
    gain = 1.0

    def get():
        return gain

    def put(value):
        nonlocal gain
        gain = value

    return get, put


def put_closure(act):
    act.gain.put(2.0)


def of_closure():
    get, put = closure()
    get.put = put
    return Activation(get)


def of_global():
    return Activation(lambda: GAIN)


def put_global(act):
    globals()["GAIN"] = 2.0


def of_default():
    def get(gain=1.0):
        return gain

    return Activation(get)


def put_default(act):
    act.gain.__defaults__ = (2.0,)


def put_code(act):
    act.gain.__code__ = (lambda gain=1.0: gain * 2).__code__


def put_class(act):
    class Other(Activation):
        def read(self):
            return 2.0

    act.__class__ = Other


def put_method(act):
    act.read = types.MethodType(lambda self: 2.0, act)


def put_storage(act):
    act.gain.data = torch.tensor(2.0)


def of_buffer():
    act = Activation(None)
    del act.gain
    act.register_buffer("gain", torch.tensor(1.0), persistent=False)
    return act


def put_property(act):
    type(act).scale = 2.0


def of_partial():
    return Activation(functools.partial(operator.mul, 1.0, 1.0))


def put_partial(act):
    act.gain.__setstate__((operator.mul, (1.0, 2.0), {}, {}))


def of_keywords():
    return Activation(functools.partial(lambda *, gain: gain, gain=1.0))


def put_keywords(act):
    act.gain.keywords["gain"] = 2.0


INSIDE = {
    "number": (lambda: Activation(1.0), lambda act: setattr(act, "gain", 2.0)),
    "list": (lambda: Nested([1.0]), lambda act: act.gain.__setitem__(0, 2.0)),
    "dict": (lambda: Nested({"gain": 1.0}), lambda act: act.gain.update(gain=2.0)),
    "set": (lambda: Nested({1.0}), lambda act: act.gain.add(2.0)),
    "deque": (lambda: Nested(collections.deque([1.0])), lambda act: act.gain.appendleft(2.0)),
    "list in a dict in a tuple": (lambda: Nested(({"a": [1.0]},)), lambda act: act.gain[0]["a"].insert(0, 2.0)),
    "object": (lambda: Activation(Object()), lambda act: setattr(act.gain, "gain", 2.0)),
    "object in an object": (lambda: Nested(Object(Object())), lambda act: setattr(act.gain.gain, "gain", 2.0)),
    "object in a list": (lambda: Nested([Object()]), lambda act: setattr(act.gain[0], "gain", 2.0)),
    "object with slots": (lambda: Activation(Slotted()), lambda act: setattr(act.gain, "gain", 2.0)),
    "dataclass": (lambda: Nested(Settings()), lambda act: setattr(act.gain, "gain", 2.0)),
    "namespace": (lambda: Nested(types.SimpleNamespace(gain=1.0)), lambda act: setattr(act.gain, "gain", 2.0)),
    "bound method of an object": (
        lambda: Activation(Object().method),
        lambda act: setattr(act.gain.__self__, "gain", 2.0),
    ),
    "closure": (of_closure, put_closure),
    "global": (of_global, put_global),
    "global list": (lambda: Activation(lambda: NUMBERS[0]), lambda act: NUMBERS.__setitem__(0, 2.0)),
    "default of an argument": (of_default, put_default),
    "code of a function": (of_default, put_code),
    "arguments of a partial": (of_partial, put_partial),
    "keywords of a partial": (of_keywords, put_keywords),
    "class of a module": (lambda: Activation(1.0), put_class),
    "attribute of a class": (lambda: Property(1.0), put_property),
    "method of an instance": (lambda: Activation(1.0), put_method),
    "context variable": (lambda: Activation(VARIABLE.get), lambda act: VARIABLE.set(2.0)),
    "environment": (
        lambda: Activation(lambda: float(os.environ["SEAMS_GAIN"])),
        lambda act: os.environ.__setitem__("SEAMS_GAIN", "2"),
    ),
    "array": (lambda: Nested(numpy.ones(1)), lambda act: act.gain.__setitem__(0, 2.0)),
    "tensor written": (lambda: Activation(torch.tensor(1.0)), lambda act: act.gain.mul_(2)),
    "tensor replaced": (lambda: Activation(torch.tensor(1.0)), lambda act: setattr(act, "gain", torch.tensor(2.0))),
    "tensor with other memory": (lambda: Activation(torch.tensor(1.0)), put_storage),
    "tensor in a list": (lambda: Nested([torch.tensor(1.0)]), lambda act: act.gain[0].mul_(2)),
    "tensor of an object": (lambda: Nested(Object(torch.tensor(1.0))), lambda act: act.gain.gain.mul_(2)),
    "buffer replaced": (of_buffer, lambda act: setattr(act, "gain", torch.tensor(2.0))),
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Puts back what all modules share."""
    token = VARIABLE.set(1.0)
    monkeypatch.setenv("SEAMS_GAIN", "1")
    monkeypatch.setitem(globals(), "GAIN", 1.0)
    monkeypatch.setattr(Property, "scale", 1.0)
    NUMBERS[0] = 1.0
    yield
    VARIABLE.reset(token)


@pytest.mark.parametrize(("make", "change"), [case(f"inside: {name}", *both) for name, both in INSIDE.items()])
def test_what_an_activation_inside_a_site_reads(wan, make, change):
    for model in wan.both:
        model.condition_embedder.text_embedder.act_1 = make()

    def edit(model):
        change(model.condition_embedder.text_embedder.act_1)

    assert_seen(wan, wan.calls(1), edit)


COUNTING = {
    "attribute": lambda act: vars(act).update(gain=act.gain + 1),
    "list": lambda act: act.counts.append(0.0),
    "random": lambda act: vars(act).update(gain=act.random.random()),
}


@pytest.mark.parametrize("count", [case(f"counting: {name}", count) for name, count in COUNTING.items()])
def test_an_activation_that_gives_something_else_each_time(wan, count):
    class Counting(Activation):
        def read(self):
            count(self)
            return self.gain + len(self.counts)

    for model in wan.both:
        model.condition_embedder.text_embedder.act_1 = Counting(1.0)
        model.condition_embedder.text_embedder.act_1.counts = []
        model.condition_embedder.text_embedder.act_1.random = random.Random(0)
    wan.apply()
    for _ in range(5):
        wan.agree(wan.calls(1))


def by_attribute(module, value):
    module.gain = value


def by_list(module, value):
    module.gain[0] = value


def by_object(module, value):
    module.gain.gain = value


SETS = {
    "attribute": (lambda: Nested(1.0), by_attribute),
    "list": (lambda: Nested([1.0]), by_list),
    "object": (lambda: Nested(Object()), by_object),
}
SCHEDULES = {
    "each forward": list(range(1, 13)),
    "first, then late": [1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3],
    "late": [1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3],
    "to and fro": [1, 2, 1, 2, 1, 2, 1, 1, 1, 2, 2, 2],
}


CASES = [
    case(f"set {at}: {how}, {when}", at, *SETS[how], SCHEDULES[when])
    for at in ("model", "condition_embedder", "blocks.0")
    for how in SETS
    for when in SCHEDULES
]


@pytest.mark.filterwarnings("ignore::dit_patch.findings.DitPatchWarning")
@pytest.mark.parametrize(("where", "make", "put", "schedule"), CASES)
def test_what_a_hook_sets_during_forwards(wan, where, make, put, schedule):
    """A strength that goes by the step, which a hook sets before, or behind, the site that reads it."""
    (call, *_) = wan.calls(1)
    for model in wan.both:
        model.condition_embedder.text_embedder.act_1 = make()
        values = iter(schedule)

        def set_it(*_, module=model.condition_embedder.text_embedder.act_1, values=values):
            put(module, float(next(values)))

        (model if where == "model" else model.get_submodule(where)).register_forward_pre_hook(set_it)
    wan.apply()
    for _ in schedule:
        wan.agree([call])
