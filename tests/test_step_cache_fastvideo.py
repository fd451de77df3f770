"""Step caching in FastVideo's own pipelines: generations, passes, experts and clips are told apart without help."""

import logging
from dataclasses import replace

import pytest
import torch
from conftest import skip_unless_installed

pytest.importorskip("cache_dit", reason="needs cache-dit")

import fastvideo_pipelines as pipelines
import stepping

import dit_patch
from dit_patch import StepCacheError
from dit_patch.memo.keys import same_bits
from dit_patch.spec.registry import Registry

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="these pipelines are put together for the CPU"),
    pytest.mark.filterwarnings("ignore:dit_patch. step cache of"),
]

DEPTH = {"num_layers": 4}
CASES = {  # with how many passes a step has
    "wan": (DEPTH, 2),
    "wan22": (DEPTH, 2),
    "wan_i2v": (DEPTH, 2),
    "hunyuan": ({"num_layers": 3, "num_single_layers": 3}, 1),
    "hunyuan15": (DEPTH, 2),
    "matrixgame3": (DEPTH, 1),
    "matrixgame3_base": (DEPTH, 2),
}


@pytest.fixture(scope="module", autouse=True)
def fastvideo():
    skip_unless_installed(Registry(plugins=False).get("fastvideo/wan"))
    logger = logging.getLogger("fastvideo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def make(name, steps):
    tiny = pipelines.make(name, **CASES[name][0])
    tiny.case = replace(tiny.case, request={**tiny.case.request, "num_inference_steps": steps})
    return tiny


def transformers(tiny):
    return {name: module for name, module in tiny.pipeline.modules.items() if name.startswith("transformer")}


@pytest.mark.parametrize("name", CASES)
def test_each_generation_is_a_fresh_pipelines(name):
    steps = 10 if name == "wan22" else 6  # enough for each of two experts
    tiny, other = make(name, steps), make(name, steps)
    forwards = dict.fromkeys(transformers(tiny), 0)
    for key, model in transformers(tiny).items():
        model.register_forward_hook(lambda *_, key=key: forwards.__setitem__(key, forwards[key] + 1))
    passes = CASES[name][1]
    with dit_patch.apply(tiny.pipeline, step_cache=stepping.EAGER) as handle:
        for seed in (0, 1, 0):
            forwards = dict.fromkeys(forwards, 0)
            made = pipelines.run(tiny, seed)
            rows = handle.step_stats()
            assert len({row.label for row in rows}) == passes, rows
            for model, count in forwards.items():
                clips = 3 if name.startswith("matrixgame3") else 1  # of which the last one is told
                own = [row for row in rows if row.model == model]
                assert all(row.steps * passes * clips == count for row in own), (own, count)
            with dit_patch.apply(other.pipeline, step_cache=stepping.EAGER):
                assert same_bits(made, pipelines.run(other, seed))
        assert any(row.cached for row in rows)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "matrixgame3_base"])
def test_nothing_cached_is_the_pipelines_own_output(name):
    tiny, plain = make(name, 4), make(name, 4)
    with dit_patch.apply(tiny.pipeline, step_cache={**stepping.EAGER, "threshold": 0}):
        for seed in (0, 1):
            assert same_bits(pipelines.run(tiny, seed), pipelines.run(plain, seed))
    assert same_bits(pipelines.run(tiny, 0), pipelines.run(plain, 0))
    assert not any("forward" in vars(stage) or "progress_bar" in vars(stage) for stage in tiny.pipeline.stages)


def test_experts_are_told_their_own_numbers_of_steps():
    tiny = make("wan22", 9)
    with dit_patch.apply(tiny.pipeline, step_cache={**stepping.EAGER, "mask": "fast"}) as handle:
        told = {}
        for each in handle.step_caches:
            begins = each.tracker.listener.on_start
            each.tracker.listener.on_start = lambda steps, name=each.name, begins=begins: (
                told.__setitem__(name, steps),
                begins(steps),
            )
        pipelines.run(tiny, 0)
        assert told == {row.model: row.steps for row in handle.step_stats()}
        assert len(told) == 2


def test_an_interrupted_generation_leaves_nothing():
    tiny, other = make("wan", 6), make("wan", 6)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt

    with dit_patch.apply(tiny.pipeline, step_cache=stepping.EAGER):
        hook = tiny.transformer.blocks[0].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            pipelines.run(tiny, 0)
        hook.remove()
        made = pipelines.run(tiny, 1)
    with dit_patch.apply(other.pipeline, step_cache=stepping.EAGER):
        assert same_bits(made, pipelines.run(other, 1))


@pytest.mark.parametrize("name", ["matrixgame2", "causal_wan"])
def test_causal_pipelines_refuse(name):
    tiny = pipelines.make(name)
    before = [list(vars(stage)) for stage in tiny.pipeline.stages]
    with pytest.raises(StepCacheError, match="KV cache"):
        dit_patch.apply(tiny.pipeline, step_cache="quality")
    assert [list(vars(stage)) for stage in tiny.pipeline.stages] == before
    with dit_patch.apply(tiny.pipeline) as handle:  # the exact caches alone are fine
        assert handle.options.step_cache is None
