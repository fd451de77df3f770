"""Forwards that overlap, nest or break off: each sees its own frame, and none leaves anything behind."""

import threading

import pytest
import torch
from torch.overrides import _get_current_function_mode

from dit_patch import apply
from dit_patch.contribute import verify
from dit_patch.sites import scope


class Stop(BaseException):
    """Like KeyboardInterrupt: torch runs no hooks for it."""


def stopping_at(module, reason):
    def stop(*_):
        raise reason

    return module.register_forward_pre_hook(stop)


class TestThreads:
    def test_four_of_them_share_a_model_and_its_caches(self, each):
        each.apply()
        work = [each.calls(steps=3, size=number % 3, generation=number) for number in range(4)]
        expected = [verify.run(each.plain, calls) for calls in work]
        differences, start = [None] * 4, threading.Barrier(4)

        def run(number):
            start.wait()
            outputs = [verify.run(each.model, work[number]) for _ in range(5)]
            differences[number] = [verify.first_difference(one, expected[number]) for one in outputs]

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert differences == [[None] * 5] * 4
        forwards = 5 * sum(map(len, work))
        for row in each.handle.stats():
            calls = row.hits + row.misses + sum(row.bypassed.values())
            assert ".." in row.at or calls % forwards == 0, row
        rope = next(row for row in each.handle.stats() if row.at == "rope.forward")
        assert rope.hits > forwards / 2 and rope.hits + rope.misses == forwards

    def test_patching_and_unpatching_while_another_runs(self, wan):
        calls = wan.calls()
        expected = verify.run(wan.plain, calls)
        done, differences = threading.Event(), []

        def run():
            while not done.is_set():
                differences.append(verify.first_difference(verify.run(wan.model, calls), expected))

        thread = threading.Thread(target=run)
        thread.start()
        for _ in range(20):
            handle = apply(wan.model)
            handle.clear()
            handle.remove()
        done.set()
        thread.join()
        assert differences and set(differences) == {None}
        assert verify.first_difference(verify.run(wan.model, calls), expected) is None

    def test_an_interrupt_in_one_does_not_touch_the_others_frame(self, wan):
        wan.apply()
        calls, inside = wan.calls(), []

        def run():
            try:
                wan.model(**calls[0])
            except Stop:
                inside.append(scope.current())

        hook = stopping_at(wan.model.blocks[0], Stop)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        hook.remove()
        assert scope.current() is None
        assert wan.agree(calls)


class TestTwoOfOneClass:
    def test_taking_one_back_leaves_the_other_patched(self, tiny):
        one, other = tiny("diffusers/wan"), tiny("diffusers/wan")
        calls = one.calls()
        for each in (one, other):
            each.apply()
            assert each.agree(calls)
        assert one.handle is not other.handle
        one.handle.remove()
        assert one.agree(calls) == {}
        assert other.agree(calls)["rope.forward"] == len(calls)

    def test_they_do_not_share_results(self, tiny):
        one, other = tiny("diffusers/wan"), tiny("diffusers/wan")
        for model in other.both:
            with torch.no_grad():
                model.condition_embedder.text_embedder.linear_1.weight.mul_(2)
        calls = one.calls()
        one.apply()
        other.apply()
        for _ in range(2):
            one.agree(calls)
            other.agree(calls)
        assert one.hits() == other.hits()


class TestNesting:
    def test_a_model_called_inside_another_has_a_frame_of_its_own(self, tiny):
        outer, inner = tiny("diffusers/hunyuan_video"), tiny("diffusers/wan")
        inner_calls = inner.calls()
        for each in (outer, inner):
            each.apply()
        results = []
        for ours, theirs in ((outer.model, inner.model), (outer.plain, inner.plain)):
            outputs = []
            results.append(outputs)
            ours.x_embedder.register_forward_hook(
                lambda *_, model=theirs, outputs=outputs: outputs.extend(verify.run(model, inner_calls)) or None
            )
        calls = outer.calls()
        hits = outer.agree(calls)
        assert verify.first_difference(*results) is None
        assert hits["rope.forward"] == len(calls) - 1
        assert hits["time_text_embed.timestep_embedder.forward"], "the outer frame is back after the inner one"
        assert inner.hits()["rope.forward"] == len(calls) * len(inner_calls) - 1
        assert scope.current() is None

    def test_a_model_called_inside_itself_is_right(self, each):
        calls = each.calls()
        block = {model: next(iter(getattr(model, "blocks", None) or model.transformer_blocks)) for model in each.both}
        inner = each.calls(generation=1)
        for model in each.both:
            busy = []

            def again(*_, model=model, busy=busy):
                if not busy:
                    busy.append(True)
                    model.found = model(**inner[0])[0]
                    busy.clear()

            block[model].register_forward_pre_hook(again)
        each.apply()
        for _ in range(2):
            each.agree(calls)
            assert torch.equal(each.model.found, each.plain.found)
        assert each.hits()["rope.forward"] == 4 * len(calls) - 1
        assert scope.current() is None


class TestBreakingOff:
    @pytest.mark.parametrize("reason", [ValueError, KeyboardInterrupt, Stop])
    def test_the_next_forward_is_right_and_nothing_stays(self, each, reason):
        calls = each.calls()
        each.apply()
        each.agree(calls)
        block = getattr(each.model, "blocks", None) or each.model.transformer_blocks
        hook = stopping_at(block[0], reason)
        with torch.no_grad(), pytest.raises(reason):
            each.model(**calls[0])
        hook.remove()
        assert _get_current_function_mode() is None
        assert each.agree(calls)["rope.forward"] == len(calls)
        assert scope.current() is None

    @pytest.mark.parametrize("then", ["the next forward", "remove"])
    def test_within_a_span(self, hunyuan, then):
        """Its mode is on just then."""
        calls = hunyuan.calls()
        hunyuan.apply()
        hunyuan.agree(calls)

        def stop(*_):
            raise Stop

        hook = hunyuan.model.context_embedder.register_forward_hook(stop)
        with torch.no_grad(), pytest.raises(Stop):
            hunyuan.model(**calls[0])
        hook.remove()
        if then == "remove":
            hunyuan.handle.remove()
        hits = hunyuan.agree(calls)
        assert bool(hits) == (then != "remove")
        assert scope.current() is None and _get_current_function_mode() is None

    def test_within_a_span_and_then_inside_somebodys_mode(self, hunyuan):
        """The mode that was left on is taken away, and not the one above it."""
        call = hunyuan.calls()[0]
        hunyuan.apply()

        def stop(*_):
            raise Stop

        hook = hunyuan.model.context_embedder.register_forward_hook(stop)
        with torch.no_grad(), pytest.raises(Stop):
            hunyuan.model(**call)
        hook.remove()
        with torch.device("cpu"):
            theirs = _get_current_function_mode()
            hunyuan.agree([call])
            assert _get_current_function_mode() is theirs
        assert _get_current_function_mode() is None

    def test_within_a_site(self, wan):
        calls = wan.calls()
        wan.apply()
        hook = stopping_at(wan.model.condition_embedder.text_embedder.linear_1, Stop)
        with torch.no_grad(), pytest.raises(Stop):
            wan.model(**calls[0])
        hook.remove()
        wan.agree(calls)
        assert wan.agree(calls) and scope.current() is None
