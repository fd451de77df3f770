"""What is left over: after an interrupt, after a removal during a forward, and of layouts that are no memory at all."""

import gc
import threading
import weakref

import pytest
import torch
from seams import case, known, warm

from dit_patch.contribute import verify
from dit_patch.sites import scope


@pytest.fixture(autouse=True)
def no_frame_is_left_to_the_next_test():
    yield
    scope._current.set(None)


def interrupted(model, call, error):
    """Run a forward that the user interrupts in a block."""

    def stop(*_):
        raise error

    hook = model.blocks[0].register_forward_pre_hook(stop)
    with pytest.raises(error), torch.no_grad():
        model(**call)
    hook.remove()


@pytest.mark.parametrize(
    "error",
    [case(f"life: {error.__name__}", error) for error in (KeyboardInterrupt, SystemExit, GeneratorExit, ValueError)],
)
def test_an_interrupt_keeps_neither_model_nor_inputs_alive(tiny, error):
    each = tiny("diffusers/wan")
    call = each.calls(1)[0]
    each.apply()
    interrupted(each.model, call, error)
    prompt, model = weakref.ref(call["encoder_hidden_states"]), weakref.ref(each.model)
    del call
    each.handle, each.model, each.case = None, None, None
    gc.collect()
    assert prompt() is None and model() is None
    assert scope.current() is None


@pytest.mark.parametrize(
    "error", [case(f"life: bits after {error.__name__}", error) for error in (KeyboardInterrupt, ValueError)]
)
def test_after_an_interrupt_the_bits_are_those_of_the_unpatched_model(wan, error):
    calls = wan.calls()
    warm(wan, calls)
    for model in wan.both:
        interrupted(model, calls[0], error)
    for _ in range(2):
        wan.agree(calls)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_after_an_interrupt_and_a_removal_nothing_is_kept_alive(tiny, error):
    each = tiny("diffusers/wan")
    call = each.calls(1)[0]
    each.apply()
    interrupted(each.model, call, error)
    prompt = weakref.ref(call["encoder_hidden_states"])
    each.handle.remove()
    each.handle = None
    del call
    gc.collect()
    assert prompt() is None and scope.current() is None


def in_another_thread(work):
    failed = []

    def run():
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, failed


@known("life: remove in another thread")
def test_remove_during_a_forward_of_another_thread_leaves_nothing_of_it(tiny):
    each = tiny("diffusers/wan")
    (call, *_) = each.calls(1)
    each.apply()
    inside, go_on, after = threading.Event(), threading.Event(), threading.Event()
    left = []

    def wait(*_):
        inside.set()
        assert go_on.wait(20)

    hook = each.model.blocks[0].register_forward_pre_hook(wait)

    def forward():
        with torch.no_grad():
            left.append(each.model(**call)[0].clone())
        left.append(scope.current())
        assert after.wait(20)

    thread, failed = in_another_thread(forward)
    assert inside.wait(20)
    each.handle.remove()
    each.handle = None
    hook.remove()
    go_on.set()
    while thread.is_alive() and len(left) < 2:
        thread.join(0.01)
    after.set()
    thread.join(20)
    assert failed == []
    assert left[1] is None
    assert torch.equal(left[0], verify.run(each.plain, [call])[0][0])


def test_remove_in_a_hook_of_the_forward_itself(wan):
    calls = wan.calls(1)
    warm(wan, calls)
    hook = wan.model.condition_embedder.register_forward_hook(lambda *_: wan.handle.remove())
    for _ in range(2):
        wan.agree(calls)
    hook.remove()
    assert scope.current() is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "layout", [case(f"life: {layout}", layout) for layout in ("to_sparse", "to_sparse_csr", "to_sparse_csc")]
)
def test_a_weight_of_another_layout_inside_a_site(wan, layout):
    """Sparse weights have no storage; where unpatched runs, patched does."""
    calls = wan.calls(1)
    warm(wan, calls)
    for model in wan.both:
        linear = model.condition_embedder.text_embedder.linear_1
        linear.weight = torch.nn.Parameter(getattr(linear.weight.detach(), layout)())
    for _ in range(3):
        wan.agree(calls)


def test_models_that_are_dropped_are_collected(tiny):
    each = tiny("diffusers/wan")
    calls = each.calls(1)
    warm(each, calls)
    model = weakref.ref(each.model)
    inputs = [weakref.ref(call["encoder_hidden_states"]) for call in calls]
    del calls
    each.handle, each.model = None, None
    gc.collect()
    assert model() is None and not any(reference() is not None for reference in inputs)
