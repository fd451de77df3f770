"""Compilers and exporters see the model as if nobody had patched it; what runs beside compiled code still hits."""

import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import dit_patch
from dit_patch.contribute import verify

pytestmark = pytest.mark.spread()

WHOLE = "compiled as a whole"


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counter() -> CompileCounterWithBackend:
    """A backend that runs the graphs as they are, and counts them."""
    return CompileCounterWithBackend("eager")


def whole(model, backend):
    return torch.compile(model, fullgraph=True, backend=backend)


def of_a_fresh_process(compile, model, calls):
    """The outputs of the compiled model and the number of its graphs, with nothing learnt from compilations before."""
    torch._dynamo.reset()
    graphs = counter()
    return verify.run(compile(model, graphs), calls), graphs.frame_count


def in_another_thread(run):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


class TestAWholeCompiledModel:
    @pytest.mark.parametrize(
        "name, order", [("diffusers/wan", "apply, compile"), ("diffusers/hunyuan_video", "compile, apply")]
    )
    def test_it_computes_the_same_from_as_many_graphs(self, tiny, name, order):
        each = tiny(name)

        def patched(model, backend):
            if order == "apply, compile":
                each.handle = dit_patch.apply(model)
                return whole(model, backend)
            model = whole(model, backend)
            with pytest.warns(UserWarning, match=WHOLE):
                each.handle = dit_patch.apply(model)
            return model

        calls = each.calls(steps=1) + each.calls(steps=1, size=1)
        ours, our_graphs = of_a_fresh_process(patched, each.model, calls)
        theirs, their_graphs = of_a_fresh_process(whole, each.plain, calls)
        assert verify.first_difference(ours, theirs) is None
        assert our_graphs == their_graphs > 0

    def test_one_compiled_in_place_is_left_alone_just_so(self, wan):
        graphs = counter()
        for model in wan.both:
            model.compile(fullgraph=True, backend=graphs)
        with pytest.warns(UserWarning, match=WHOLE):
            wan.apply()
        assert wan.agree(wan.calls()) == {}
        assert graphs.frame_count == 2

    def test_patching_after_it_ran_costs_one_compilation_at_most_and_so_does_removal(self, wan):
        calls, graphs = wan.calls(steps=1), counter()
        model, plain = whole(wan.model, graphs), whole(wan.plain, counter())
        verify.run(model, calls)
        assert graphs.frame_count == 1
        with pytest.warns(UserWarning, match=WHOLE):
            wan.handle = dit_patch.apply(model)
        wan.agree(calls, model, plain)
        assert graphs.frame_count <= 2
        wan.handle.remove()
        wan.agree(calls, model, plain)
        assert graphs.frame_count <= 3

    def test_the_model_inside_it_still_hits_when_called_itself(self, each):
        each.apply()
        calls, model = each.calls(), whole(each.model, counter())
        verify.run(model, calls)
        assert each.agree(calls)["rope.forward"] == len(calls) - 1
        assert verify.first_difference(verify.run(model, calls), verify.run(each.plain, calls)) is None

    @pytest.mark.parametrize(
        "order, collect_in", [(1, lambda run: run()), (-1, in_another_thread)], ids=["this thread", "another thread"]
    )
    def test_another_model_may_be_freed_while_it_compiles(self, tiny, order, collect_in):
        """Both have layers on one function of diffusers, and the compiler has gone through both."""
        compiled, freed = tiny("diffusers/wan"), tiny("diffusers/wan")
        for each in (freed, compiled)[::order]:
            each.apply()
        gone = weakref.ref(freed.model)
        del freed.model, freed.handle
        freed.handle = None

        def collect(graph, inputs):
            collect_in(gc.collect)
            assert gone() is None
            return graph.forward

        calls = compiled.calls()
        compiled.agree(calls, torch.compile(compiled.model, fullgraph=True, backend=collect))
        compiled.handle.remove()
        gc.collect()
        assert not compiled.layers_on_globals()

    def test_a_graph_break_leaves_both_halves_right(self, wan):
        wan.apply()
        broken = wan.model.blocks[0].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        model = torch.compile(wan.model, backend="eager")
        wan.agree(wan.calls() + wan.calls(size=1), model)
        broken.remove()


class TestCompiledBlocks:
    @pytest.mark.parametrize(
        "name, order", [("diffusers/wan", "compile, apply"), ("diffusers/hunyuan_video", "apply, compile")]
    )
    def test_what_is_beside_them_hits_and_they_compile_as_often(self, tiny, name, order):
        each = tiny(name)

        def blocks(model, backend):
            model.compile_repeated_blocks(fullgraph=True, backend=backend)
            return model

        def patched(model, backend):
            for step in order.split(", "):
                each.apply() if step == "apply" else blocks(model, backend)
            return model

        calls = each.calls() + each.calls(size=1) + each.calls()
        ours, our_graphs = of_a_fresh_process(patched, each.model, calls)
        kinds = {site.kind for site in each.spec.sites if each.hits()[site.at]}
        theirs, their_graphs = of_a_fresh_process(blocks, each.plain, calls)
        assert verify.first_difference(ours, theirs) is None
        assert {"rope", "timestep", "context"} <= kinds
        assert our_graphs == their_graphs > 0

    def test_patching_between_two_forwards_compiles_only_blocks_with_a_site_once_more(self, each):
        graphs, calls = counter(), each.calls()
        each.model.compile_repeated_blocks(fullgraph=True, backend=graphs)
        verify.run(each.model, calls)
        before = graphs.frame_count
        each.apply()
        assert each.agree(calls)
        each.handle.remove()
        each.agree(calls)
        # Every kind of block turns queries and keys; HunyuanVideo's token refiner has `norm1.forward` in it.
        inside = len(each.spec.blocks) + sum("refiner_blocks" in site.at for site in each.spec.sites)
        assert graphs.frame_count <= before + inside

    def test_a_span_that_begins_in_one_is_left_alone_and_says_so(self, hunyuan):
        hunyuan.model.compile_repeated_blocks(fullgraph=True, backend="eager")  # `context_embedder` is one, too
        hunyuan.apply()
        hunyuan.agree(hunyuan.calls())
        span = next(row for row in hunyuan.handle.stats() if ".." in row.at)
        assert (span.hits, span.misses) == (0, 0)
        assert span.notes == ("inside compiled code, which is left alone",)

    def test_a_span_that_ends_in_one_is_left_alone_and_says_so(self, hunyuan):
        """Its mode would still be on inside the compiled block, and have it compiled again."""

        def blocks(model, backend):
            for block in model.transformer_blocks:
                block.compile(fullgraph=True, backend=backend)
            return model

        calls = hunyuan.calls()
        hunyuan.apply()
        ours, our_graphs = of_a_fresh_process(blocks, hunyuan.model, calls)
        span = next(row for row in hunyuan.handle.stats() if ".." in row.at)
        assert (span.hits, span.misses, span.bypassed) == (0, 0, {"the submodule after it is compiled": len(calls)})
        theirs, their_graphs = of_a_fresh_process(blocks, hunyuan.plain, calls)
        assert verify.first_difference(ours, theirs) is None
        assert our_graphs == their_graphs > 0

    def test_sites_inside_compiled_code_are_reported_and_not_warned_about(self, hunyuan):
        hunyuan.model.compile_repeated_blocks(fullgraph=True, backend="eager")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hunyuan.apply()
            hunyuan.agree(hunyuan.calls())
        assert "inside compiled code" in str(hunyuan.handle)


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    def test_the_exported_program_is_that_of_the_unpatched_model(self, wan, strict):
        calls = wan.calls()
        wan.apply()
        wan.agree(calls)
        with torch.no_grad():
            ours, theirs = (torch.export.export(model, (), calls[0], strict=strict) for model in wan.both)
        assert [node.target for node in ours.graph.nodes] == [node.target for node in theirs.graph.nodes]
        assert wan.agree(calls, ours.module(), theirs.module()) == {}

    def test_forwards_after_an_export_are_right_and_hit(self, wan):
        calls = wan.calls()
        wan.apply()
        with torch.no_grad():
            torch.export.export(wan.model, (), calls[0])
        assert sum(row.hits + row.misses for row in wan.handle.stats()) == 0
        assert wan.agree(calls)["rope.forward"] == len(calls) - 1


class TestFakeTensors:
    def test_nothing_fake_is_kept_and_nothing_real_is_handed_out(self, each):
        calls = each.calls()
        each.apply()
        each.agree(calls)
        held = {row.at: (row.hits, row.misses) for row in each.handle.stats()}
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in calls[0].items()}
            assert isinstance(each.model(**fake)[0], FakeTensor)
        assert "fake tensors" in each.reasons()
        assert held == {row.at: (row.hits, row.misses) for row in each.handle.stats()}
        assert each.agree(calls)

    def test_a_model_of_fake_weights_stays_uncached(self, wan):
        with FakeTensorMode() as mode:
            fake_model = type(wan.model)(**wan.case.config).eval()
            handle = dit_patch.apply(fake_model)
            with torch.no_grad():
                fake_model(**{name: mode.from_tensor(x) for name, x in wan.calls()[0].items()})
        assert handle.nbytes == 0
        handle.remove()


class TestFunctorch:
    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_a_transform_over_the_model_is_passed_through(self, wan):
        """`grad` with respect to the latents, and a batch of them at once, once with cached results there already."""
        call = wan.calls()[0]
        wan.apply()
        wan.agree([call, call])

        def derivative(model):
            rest = {name: value for name, value in call.items() if name != "hidden_states"}
            return torch.func.grad(lambda x: model(hidden_states=x, **rest)[0].square().sum())(call["hidden_states"])

        assert torch.equal(derivative(wan.model), derivative(wan.plain))
        assert "a functorch transform" in wan.reasons()
        batch = torch.stack([call["encoder_hidden_states"]] * 2) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)

        def over_prompts(model):
            rest = {name: value for name, value in call.items() if name != "encoder_hidden_states"}
            with torch.no_grad():
                return torch.func.vmap(lambda x: model(encoder_hidden_states=x, **rest)[0])(batch)

        assert torch.equal(over_prompts(wan.model), over_prompts(wan.plain))
        assert wan.agree([call, call])
