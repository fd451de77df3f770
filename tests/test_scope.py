"""Which forward are we inside: nested, raising, interrupted, in threads; and its arguments by name."""

from __future__ import annotations

import copy
import functools
import pickle
import threading

import pytest
import torch

from dit_patch.sites import scope
from dit_patch.sites.scope import Scope, current


class Model(torch.nn.Module):
    """Calls `inside` in its forward."""

    def __init__(self, inside=lambda: None):
        super().__init__()
        self.inside = inside

    def forward(self, x, y=None, *, flag=True):
        self.inside()
        return x


def decorated(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return wrapper


class Decorated(Model):
    @decorated
    @torch.no_grad()
    def forward(self, first, second=2, third=None):
        self.inside()
        return first


class Seen:
    """A scope on a model that notes the frame in the middle of each forward, and those that finished."""

    def __init__(self, model):
        self.model, self.frames, self.finished = model, [], []
        self.scope = Scope(model, self.finished.append)
        model.inside = lambda: self.frames.append(current())


@pytest.fixture(autouse=True)
def nothing_left():
    assert current() is None
    yield
    assert current() is None


X = torch.zeros(1)


def test_inside_a_forward_there_is_a_frame_and_outside_there_is_none():
    seen = Seen(Model())
    seen.model(X)
    seen.model(X)
    assert [frame.model for frame in seen.frames] == [seen.model, seen.model]
    assert seen.frames == seen.finished
    assert seen.frames[0] is not seen.frames[1]


@pytest.mark.parametrize("cls, names", [(Model, ["x", "y", "flag"]), (Decorated, ["first", "second", "third"])])
def test_arguments_are_found_by_name_however_they_were_given(cls, names):
    seen = Seen(cls())
    first, second, _ = names
    seen.model(X, 5)
    seen.model(X, **{second: 6})
    seen.model(**{second: 7, first: X})
    seen.model(X)
    assert [frame.argument(first) is X for frame in seen.frames] == [True] * 4
    assert [frame.argument(second) for frame in seen.frames] == [5, 6, 7, None]
    assert [frame.argument("nothing") for frame in seen.frames] == [None] * 4


def test_names_are_seen_through_decorators():
    assert scope.parameters(Decorated()) == ["first", "second", "third"]


def test_the_device_is_that_of_the_first_tensor():
    seen = Seen(Model())
    seen.model(3, y=torch.zeros(1, device="meta"))
    seen.model(3)
    assert [frame.device for frame in seen.frames] == [torch.device("meta"), None]


def test_a_model_inside_another_has_a_frame_of_its_own():
    inner, outer = Seen(Model()), Seen(Model())
    around = []
    outer.model.inside = lambda: (around.append(current()), inner.model(X), around.append(current()))
    outer.model(X)
    assert [frame.model for frame in around] == [outer.model] * 2
    assert around[0] is around[1]
    assert inner.frames[0].model is inner.model
    assert inner.frames[0].parent is around[0]


def test_a_forward_that_raises_leaves_no_frame_and_is_not_counted_as_finished():
    seen = Seen(Model())

    def fail():
        seen.frames.append(current())
        raise ValueError("inside")

    seen.model.inside = fail
    with pytest.raises(ValueError, match="inside"):
        seen.model(X)
    assert current() is None
    assert len(seen.frames) == 1 and seen.finished == []


def test_what_a_forward_left_to_do_is_done_even_when_it_raises_latest_first():
    seen, done = Seen(Model()), []

    def fail():
        for number in (1, 2):
            current().on_exit("test", lambda number=number: done.append(number))
        raise ValueError

    seen.model.inside = fail
    with pytest.raises(ValueError):
        seen.model(X)
    assert done == [2, 1]


def test_an_inner_forward_that_raises_leaves_the_outer_frame():
    inner, outer = Seen(Model()), Seen(Model())

    def fail():
        raise ValueError

    def inside():
        frame = current()
        with pytest.raises(ValueError):
            inner.model(X)
        assert current() is frame

    inner.model.inside, outer.model.inside = fail, inside
    outer.model(X)
    assert len(outer.finished) == 1


def test_what_an_interrupt_leaves_behind_is_gone_at_the_next_forward():
    # torch runs no hooks for a KeyboardInterrupt.
    seen, done = Seen(Model()), []

    def interrupt():
        current().on_exit("test", lambda: done.append(True))
        raise KeyboardInterrupt

    seen.model.inside = interrupt
    with pytest.raises(KeyboardInterrupt):
        seen.model(X)
    assert not done
    seen.model.inside = lambda: seen.frames.append(current())
    seen.model(X)
    assert done == [True]
    assert seen.frames[0].parent is None
    assert current() is None


def test_threads_do_not_see_each_other():
    seen, meet = Seen(Model()), threading.Barrier(4, timeout=20)
    wrong = []

    def inside():
        mine = current()
        meet.wait()
        if current() is not mine or mine.argument("y") != threading.get_ident():
            wrong.append(mine)
        meet.wait()

    seen.model.inside = inside
    threads = [
        threading.Thread(target=lambda: [seen.model(X, threading.get_ident()) for _ in range(20)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(seen.finished) == 80


def test_removing_takes_both_hooks_away():
    model = Model()
    before = {name: dict(value) for name, value in vars(model).items() if isinstance(value, dict)}
    seen = Seen(model)
    assert scope.scope_of(model) is seen.scope
    seen.scope.remove()
    seen.scope.remove()
    assert {name: dict(value) for name, value in vars(model).items() if isinstance(value, dict)} == before
    assert scope.scope_of(model) is None
    model(X)
    assert seen.frames == [None]


def test_removing_in_the_middle_of_a_forward_leaves_no_frame():
    seen = Seen(Model())
    seen.model.inside = seen.scope.remove
    seen.model(X)
    assert current() is None


def test_an_interrupt_in_a_model_inside_another_leaves_nothing_either():
    inner, outer = Seen(Model()), Seen(Model())

    def interrupt():
        raise KeyboardInterrupt

    inner.model.inside, outer.model.inside = interrupt, lambda: inner.model(X)
    with pytest.raises(KeyboardInterrupt):
        outer.model(X)
    outer.model.inside = lambda: outer.frames.append(current())
    outer.model(X)
    assert outer.frames[0].parent is None


def test_removing_after_an_interrupt_leaves_no_frame():
    seen = Seen(Model())

    def interrupt():
        raise KeyboardInterrupt

    seen.model.inside = interrupt
    with pytest.raises(KeyboardInterrupt):
        seen.model(X)
    seen.scope.remove()
    assert current() is None


def test_a_frame_is_not_entered_while_compiling(monkeypatch):
    seen = Seen(Model())
    monkeypatch.setattr(scope, "_is_compiling", lambda: True)
    seen.model(X)
    assert seen.frames == [None]


class Plain(torch.nn.Module):
    def forward(self, x):
        return x + 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_in_a_copy_the_hooks_do_nothing_and_can_be_dropped(copied):
    model, frames = Plain(), []
    Scope(model, frames.append)
    twin = copied(model)
    assert torch.equal(twin(X), X + 1)
    assert frames == []
    assert scope.scope_of(twin) is None
    scope.forget_copies(twin)
    assert not any((twin._forward_hooks, twin._forward_pre_hooks, twin._forward_hooks_always_called))
    assert not any((twin._forward_hooks_with_kwargs, twin._forward_pre_hooks_with_kwargs))
    assert scope.scope_of(model) is not None
