"""No state ever leaks: each generation of one handle is what a fresh pipeline makes, whatever came before it.

Each group is about a way in which cache-dit alone goes wrong: counters and residuals that a generation leaves to the
next, guidance that is switched, sizes and errors, pipelines that share a process, hooks and offload, threads, copies.
"""

import copy
import pickle
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("cache_dit", reason="needs cache-dit")

import stepping
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import FlowMatchHeunDiscreteScheduler, WanTransformer3DModel
from test_step_cache import shape_of

import dit_patch
from dit_patch import DitPatchError, StepCacheError
from dit_patch.contribute import verify
from dit_patch.spec import mini
from dit_patch.spec.registry import Registry
from dit_patch.step_cache import requirements

pytestmark = pytest.mark.filterwarnings("ignore:dit_patch. step cache of")


@pytest.fixture(scope="module")
def wan():
    return stepping.wan()


@pytest.fixture(scope="module")
def hunyuan():
    return stepping.hunyuan()


@pytest.fixture(scope="module")
def fresh():
    """A pipeline of the same weights, with its handle made anew for each generation."""
    pipeline = stepping.wan()
    return lambda config=stepping.EAGER, **call: stepping.once(pipeline, config, **call)


@pytest.mark.parametrize("calibrator", [None, "taylorseer"])
def test_runs_of_4_30_and_8_steps_each_equal_a_fresh_pipelines(wan, fresh, calibrator):
    config = {**stepping.EAGER, "calibrator": calibrator}
    with dit_patch.apply(wan, step_cache=config) as handle:
        for steps in (4, 30, 8, 30, 4):
            made = stepping.latents(wan, steps)
            counts = stepping.cached(handle)
            assert torch.equal(made, fresh(config, steps=steps)), steps
            assert all(row.steps == steps for row in handle.step_stats())
            assert steps == 4 or all(counts.values())
            assert all(cached[0] >= 2 for cached in counts.values() if cached)  # its own warm-up


def test_same_seed_twice_and_another_prompt_between(wan, fresh):
    with dit_patch.apply(wan, step_cache=stepping.EAGER) as handle:
        first = stepping.latents(wan, seed=3)
        other = stepping.latents(wan, seed=4, prompt="a red balloon")
        assert torch.equal(first, stepping.latents(wan, seed=3))
        assert torch.equal(other, fresh(seed=4, prompt="a red balloon"))
        assert any(stepping.cached(handle).values())


def test_guidance_may_be_on_and_off_from_one_generation_to_the_next(wan, fresh, hunyuan):
    with dit_patch.apply(wan, step_cache=stepping.EAGER) as handle:
        for scale in (6.0, 1.0, 6.0, 1.0):
            assert torch.equal(stepping.latents(wan, guidance_scale=scale), fresh(guidance_scale=scale)), scale
            assert {row.label for row in handle.step_stats()} == ({"cond", "uncond"} if scale > 1 else {"cond"})
            assert all(stepping.cached(handle).values())
    with dit_patch.apply(hunyuan, step_cache=stepping.EAGER) as handle:
        for scale in (1.0, 3.0, 1.0):
            made = stepping.latents(hunyuan, true_cfg_scale=scale, negative_prompt="ugly", max_sequence_length=32)
            again = stepping.latents(hunyuan, true_cfg_scale=scale, negative_prompt="ugly", max_sequence_length=32)
            assert torch.equal(made, again)
            rows = handle.step_stats()
            assert {row.label for row in rows} == ({"cond", "uncond"} if scale > 1 else {"cond"})
            assert {row.blocks for row in rows} == {"transformer_blocks", "single_transformer_blocks"}
            assert all(row.cached for row in rows)


def test_the_resolution_may_change_with_a_threshold_that_never_looks(wan, fresh):
    with dit_patch.apply(wan, step_cache=stepping.ALWAYS):
        for size in ((32, 32, 5), (48, 32, 5), (32, 32, 9), (32, 32, 5)):
            assert torch.equal(stepping.latents(wan, size=size), fresh(stepping.ALWAYS, size=size)), size


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["between steps", "inside a block"])
def test_an_exception_or_a_cancellation_ends_the_generation(wan, fresh, error, where):
    def stop(pipeline, step, *_):
        if step == 5:
            raise error
        return {}

    with dit_patch.apply(wan, step_cache=stepping.EAGER):
        with pytest.raises(error):
            if where == "between steps":
                stepping.latents(wan, callback_on_step_end=stop)
            else:
                calls = []

                def fail(*_):
                    calls.append(1)
                    if len(calls) == 9:
                        raise error

                hook = wan.transformer.blocks[0].register_forward_hook(fail)
                try:
                    stepping.latents(wan)
                finally:
                    hook.remove()
        assert type(wan.transformer.blocks) is torch.nn.ModuleList and len(wan.transformer.blocks) == 6
        assert torch.equal(stepping.latents(wan, prompt="a red balloon"), fresh(prompt="a red balloon"))


def test_an_interrupted_first_step_of_a_bare_model_leaves_nothing():
    """The next generation begins with the very same latents and timestep, as another pass of that step would."""
    spec, case, model = bare()
    calls = stepping.steps(spec, case)
    ran = []

    def fail(*_):
        ran.append(1)
        if len(ran) == 3:  # in the second pass: the first forward ran twice, to prove parity
            raise Cancelled

    with dit_patch.apply(model, step_cache=stepping.ALWAYS) as handle:
        hook = model.blocks[1].register_forward_hook(fail)
        with pytest.raises(Cancelled):
            verify.run(model, calls)
        hook.remove()
        made = verify.run(model, calls)
        assert {row.label for row in handle.step_stats()} == {"pass 1", "pass 2"}
        assert all(row.steps == 7 for row in handle.step_stats())
        assert verify.first_difference(verify.run(model, calls), made) is None


def test_a_scheduler_swapped_in_later_is_heard(wan, fresh):
    other = stepping.euler(stepping.wan())
    pipeline = stepping.wan()
    with dit_patch.apply(pipeline, step_cache=stepping.EAGER):
        stepping.latents(pipeline)
        stepping.euler(pipeline)
        stepping.latents(pipeline)
        assert torch.equal(stepping.latents(pipeline), stepping.once(other, stepping.EAGER))


def test_schedulers_of_second_order_call_the_model_twice_a_step():
    pipeline, other = stepping.wan(), stepping.wan()
    for each in (pipeline, other):
        each.scheduler = FlowMatchHeunDiscreteScheduler()
    with dit_patch.apply(pipeline, step_cache=stepping.EAGER) as handle:
        told, loops = [], handle.step_caches[0].tracker.listener
        begins = loops.on_start
        loops.on_start = lambda steps: (told.append(steps), begins(steps))
        for steps in (6, 8, 6):
            made = stepping.latents(pipeline, steps)
            assert told[-1] == 2 * steps - 1
            assert all(row.steps == 2 * steps - 1 for row in handle.step_stats())
            assert torch.equal(made, stepping.once(other, stepping.EAGER, steps=steps))


def test_two_experts_count_their_own_steps():
    pipeline, other = stepping.wan22(boundary_ratio=0.7), stepping.wan22(boundary_ratio=0.7)
    with dit_patch.apply(pipeline, step_cache={**stepping.EAGER, "mask": "fast"}) as handle:
        for steps in (24, 16, 24):
            made = stepping.latents(pipeline, steps)
            rows = {row.model: row.steps for row in handle.step_stats()}
            assert sum(rows.values()) == steps and set(rows) == {"transformer", "transformer_2"}
            assert all(row.cached for row in handle.step_stats())
            assert [step_cache.report.announced_steps for step_cache in handle.step_caches] == [None, None]
            assert torch.equal(made, stepping.once(other, {**stepping.EAGER, "mask": "fast"}, steps=steps))


def test_two_experts_each_told_how_many_steps_it_gets():
    pipeline = stepping.wan22(boundary_ratio=0.7)
    with dit_patch.apply(pipeline, step_cache=stepping.EAGER) as handle:
        told = {}
        for step_cache in handle.step_caches:
            begins = step_cache.on_generation_start

            def note(steps, name=step_cache.name, begins=begins):
                told[name] = steps
                begins(steps)

            step_cache.tracker.listener.on_start = note
        stepping.latents(pipeline, 20)
        assert told == {row.model: row.steps for row in handle.step_stats()}


def test_two_pipelines_side_by_side_do_not_share_residuals(wan, fresh):
    second, never = stepping.wan(seed=1), stepping.wan(seed=2)
    expected = stepping.latents(never)
    with dit_patch.apply(wan, step_cache=stepping.EAGER):
        one = stepping.latents(wan)
        with dit_patch.apply(second, step_cache=stepping.ALWAYS):
            two = stepping.latents(second)
            assert torch.equal(stepping.latents(wan), one)
            assert torch.equal(stepping.latents(second), two)
        assert torch.equal(stepping.latents(wan), one)
        assert torch.equal(stepping.latents(never), expected)
    assert torch.equal(one, fresh())


def test_removal_restores_everything_in_its_order():
    pipeline = stepping.wan()
    plain = stepping.latents(pipeline)
    before, call, names = shape_of(pipeline.transformer), type(pipeline).__call__, set(vars(pipeline))
    scheduler = set(vars(pipeline.scheduler))
    handle = dit_patch.apply(pipeline, step_cache=stepping.ALWAYS)
    assert not torch.equal(stepping.latents(pipeline), plain)
    assert [name for name, _ in pipeline.transformer.named_parameters()] == before[1]
    handle.remove()
    handle.remove()
    assert shape_of(pipeline.transformer) == before
    assert type(pipeline).__call__ is call
    assert set(vars(pipeline)) == names
    assert {name for name in vars(pipeline.scheduler) if callable(getattr(pipeline.scheduler, name))} <= scheduler
    assert torch.equal(stepping.latents(pipeline), plain)


class Counting(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("hook_first", [True, False])
def test_accelerates_hooks_still_run_after_removal(fresh, hook_first):
    pipeline, hook = stepping.wan(), Counting()
    if hook_first:
        add_hook_to_module(pipeline.transformer, hook)
    handle = dit_patch.apply(pipeline, step_cache=stepping.EAGER)
    if not hook_first:
        add_hook_to_module(pipeline.transformer, hook)
    assert torch.equal(stepping.latents(pipeline), fresh())
    assert hook.calls == 20
    handle.remove()
    stepping.latents(pipeline)
    assert hook.calls == 40
    remove_hook_from_module(pipeline.transformer)
    assert (
        "forward" not in vars(pipeline.transformer)
        or pipeline.transformer.forward.__func__ is type(pipeline.transformer).forward
    )


def test_offload_before_and_after_never_drops_the_cache_silently(fresh):
    for offload_first in (True, False):
        pipeline = stepping.wan()

        def offloaded(pipeline=pipeline):
            # What enable_model_cpu_offload does at the end of each call, on a device that is there.
            remove_hook_from_module(pipeline.transformer)
            add_hook_to_module(pipeline.transformer, Counting())

        if offload_first:
            offloaded()
        with dit_patch.apply(pipeline, step_cache=stepping.EAGER) as handle:
            for _ in range(3):
                offloaded()
                assert torch.equal(stepping.latents(pipeline), fresh())
                assert all(stepping.cached(handle).values())


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offloading_survives_removal(fresh, level):
    from diffusers.hooks import apply_group_offloading

    pipeline = stepping.wan()
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    cpu = torch.device("cpu")
    apply_group_offloading(pipeline.transformer, cpu, cpu, offload_type=level, **options)
    plain = stepping.latents(pipeline)
    with dit_patch.apply(pipeline, step_cache=stepping.EAGER) as handle:
        assert torch.equal(stepping.latents(pipeline), fresh())
        assert all(stepping.cached(handle).values())
    assert torch.equal(stepping.latents(pipeline), plain)


def test_an_empty_module_list_is_left_alone():
    pipeline = stepping.wan()
    pipeline.transformer.extra = torch.nn.ModuleList([])
    stepping.latents(pipeline)
    before = shape_of(pipeline.transformer)
    with dit_patch.apply(pipeline, step_cache=stepping.EAGER) as handle:
        stepping.latents(pipeline)
        assert all(stepping.cached(handle).values())
    assert shape_of(pipeline.transformer) == before


def bare(blocks=4):
    spec = Registry(plugins=False).get("diffusers/wan")
    case = stepping.deep(spec, blocks)
    return spec, case, mini.build(spec, case)


@contextmanager
def a_forward_that_waits(model, calls):
    """In another thread, inside the first block, until it is told to go on; what it raises is noted."""
    inside, go, errors = threading.Event(), threading.Event(), []

    def wait(*_):
        inside.set()
        go.wait(30)

    def forward():
        try:
            verify.run(model, calls[:1])
        except Exception as error:
            errors.append(error)

    hook = model.blocks[0].register_forward_hook(wait)
    thread = threading.Thread(target=forward)
    thread.start()
    try:
        assert inside.wait(30)
        yield go, errors
    finally:
        hook.remove()
        go.set()
        thread.join()


def test_two_threads_in_one_forward_are_refused():
    spec, case, model = bare()
    calls = stepping.steps(spec, case)
    with dit_patch.apply(model, step_cache=stepping.EAGER):
        with a_forward_that_waits(model, calls) as (_, errors), pytest.raises(StepCacheError, match="another thread"):
            verify.run(model, calls[:1])
        assert type(model.blocks) is torch.nn.ModuleList and not errors


def test_another_thread_that_begins_while_a_forward_runs_is_refused():
    spec, case, model = bare()
    calls = stepping.steps(spec, case)
    with dit_patch.apply(model, step_cache=stepping.EAGER) as handle:
        with a_forward_that_waits(model, calls) as (go, _):
            handle.begin_generation()
            threading.Timer(2, go.set).start()  # or a second forward would wait in the same hook
            with pytest.raises(StepCacheError, match="another thread"):
                verify.run(model, calls[:1])
        assert type(model.blocks) is torch.nn.ModuleList


def test_two_threads_that_take_turns_within_a_generation_are_refused():
    spec, case, model = bare()
    calls = stepping.steps(spec, case)
    more, done, errors = threading.Event(), threading.Event(), []

    def other():
        try:
            verify.run(model, calls[2:4])
        except StepCacheError as error:
            errors.append(str(error))
        done.set()
        more.wait(30)

    with dit_patch.apply(model, step_cache=stepping.EAGER):
        verify.run(model, calls[:2])
        thread = threading.Thread(target=other)
        thread.start()
        assert done.wait(30)
        more.set()
        thread.join()
    assert len(errors) == 1 and "of its own" in errors[0]


def test_one_thread_after_the_other(wan, fresh):
    made = []
    with dit_patch.apply(wan, step_cache=stepping.EAGER):
        for _ in range(2):
            thread = threading.Thread(target=lambda: made.append(stepping.latents(wan)))
            thread.start()
            thread.join()
    assert len(made) == 2 and all(torch.equal(each, fresh()) for each in made)


def test_copies_and_pickles_are_plain():
    spec, case, model = bare()
    calls = stepping.steps(spec, case)
    plain = verify.run(mini.build(spec, case), calls)
    with dit_patch.apply(model, step_cache=stepping.ALWAYS):
        cached = verify.run(model, calls)
        assert verify.first_difference(verify.run(copy.deepcopy(model), calls), plain) is None
        assert verify.first_difference(verify.run(pickle.loads(pickle.dumps(model)), calls), plain) is None
        assert verify.first_difference(verify.run(model, calls), cached) is None


def test_another_configuration_is_an_error_and_the_same_one_the_same_handle(wan):
    with dit_patch.apply(wan, step_cache="quality") as handle:
        assert dit_patch.apply(wan, step_cache="quality") is handle
        assert dit_patch.apply(wan, step_cache={"threshold": 0.08, "calibrator": "taylorseer"}) is handle
        with pytest.raises(DitPatchError, match="other options"):
            dit_patch.apply(wan, step_cache="balanced")
        with pytest.raises(DitPatchError, match="other options"):
            dit_patch.apply(wan)


class Mine(WanTransformer3DModel):
    """For specs of its own."""


def test_a_wrong_pattern_is_refused_and_undone(tmp_path):
    spec, case, model = bare()
    model.__class__ = Mine
    text = spec.path.read_text().replace("pattern: 3", "pattern: 0")
    (tmp_path / "mine.yaml").write_text(text.replace(spec.classes[0], f"{Mine.__module__}.{Mine.__qualname__}"))
    calls = stepping.steps(spec, case)
    before = shape_of(model)
    with (
        dit_patch.apply(model, step_cache=stepping.EAGER, specs=[tmp_path]),
        pytest.raises(StepCacheError, match="a block returned Tensor, not hidden_states, encoder_hidden_states"),
    ):
        verify.run(model, calls)
    assert shape_of(model) == before


def test_loops_may_do_more_than_call_their_blocks():
    """One index per block, and work between blocks: a stand-in for the whole list would call each with the first's."""

    class Numbered(torch.nn.Module):
        def __init__(self, inner, scale):
            super().__init__()
            self.inner, self.scale = inner, scale

        def forward(self, hidden_states, *args, **kwargs):
            return self.inner(hidden_states, *args, **kwargs) * self.scale

    spec, case, model = bare(5)
    for number in range(5):
        model.blocks[number] = Numbered(model.blocks[number], 1 + 0.01 * number)
    calls = stepping.steps(spec, case)
    plain = verify.run(model, calls)
    with dit_patch.apply(model, step_cache={**stepping.EAGER, "threshold": 0}):
        assert verify.first_difference(verify.run(model, calls), plain) is None


def test_a_model_that_is_not_its_spec_is_refused_and_stays_usable():
    """Parity is proved on the first forward: this block list runs its blocks backwards, which no spec knows of."""
    spec, case, model = bare()
    calls = stepping.steps(spec, case)

    class Strange(torch.nn.ModuleList):
        def __iter__(self):
            return iter(list(super().__iter__())[::-1])

    model.blocks = Strange(list(model.blocks))
    plain = verify.run(model, calls)
    with dit_patch.apply(model, step_cache=stepping.EAGER) as handle:
        with pytest.raises(StepCacheError, match="not the uncached model's, bit for bit"):
            verify.run(model, calls)
        assert verify.first_difference(verify.run(model, calls), plain) is None
        assert "refused" in str(handle)
        assert any(row.hits for row in handle.stats())  # exact caches stay on


def test_forwards_outside_the_pipeline_leave_no_trace(wan, fresh):
    spec, case, _ = bare()
    arguments = {
        "hidden_states": torch.zeros(1, 16, 2, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.zeros(1, 16, 64),
    }
    with dit_patch.apply(wan, step_cache=stepping.EAGER):
        with torch.no_grad():
            wan.transformer(**arguments)
        first = stepping.latents(wan)
        with torch.no_grad():
            for _ in range(5):
                wan.transformer(**arguments)
        assert torch.equal(stepping.latents(wan), first)
    assert torch.equal(first, fresh())


def test_no_more_steps_in_a_row_are_cached_than_asked_for(wan):
    with dit_patch.apply(wan, step_cache={**stepping.ALWAYS, "max_continuous": 1}) as handle:
        stepping.latents(wan, 11)
        assert all(row.cached == (2, 4, 6, 8, 10) for row in handle.step_stats())


def test_diffusers_own_caching_is_refused(wan):
    from diffusers import FirstBlockCacheConfig

    pipeline = stepping.wan()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    before = shape_of(pipeline.transformer)
    with pytest.raises(StepCacheError, match="diffusers' own caching is on .FirstBlockCacheConfig.") as caught:
        dit_patch.apply(pipeline, step_cache="quality")
    assert "disable_cache()" in str(caught.value)
    assert shape_of(pipeline.transformer) == before
    pipeline = stepping.wan()
    with dit_patch.apply(pipeline, step_cache=stepping.EAGER):
        stepping.latents(pipeline)
        pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(StepCacheError, match="own caching"):
            stepping.latents(pipeline)
        pipeline.transformer.disable_cache()
        stepping.latents(pipeline)


def test_the_pipelines_own_model_given_alone(fresh):
    """Only the transformer is known: its cache_context and timesteps tell the rest."""
    pipeline = stepping.wan()
    with dit_patch.apply(pipeline.transformer, step_cache=stepping.EAGER) as handle:
        for steps in (10, 4, 12, 10):
            assert torch.equal(stepping.latents(pipeline, steps), fresh(steps=steps))
            assert {row.label for row in handle.step_stats()} == {"cond", "uncond"}


def test_applied_to_the_model_and_then_to_its_pipeline(fresh):
    pipeline = stepping.wan()
    handle = dit_patch.apply(pipeline.transformer, step_cache=stepping.EAGER)
    assert dit_patch.apply(pipeline, step_cache=stepping.EAGER) is handle
    assert handle.step_caches[0].tracker.listener.hears_loops
    assert torch.equal(stepping.latents(pipeline), fresh())
    handle.remove()
    assert not {"progress_bar", "maybe_free_model_hooks"} & set(vars(pipeline))


def test_release_gives_the_memory_back_at_the_end_of_each_generation(wan, fresh):
    with dit_patch.apply(wan, step_cache={**stepping.EAGER, "release": True}) as handle:
        for _ in range(2):
            assert torch.equal(stepping.latents(wan), fresh())
            rows = handle.step_stats()
            assert all(row.nbytes == 0 and row.cached and row.steps == 10 for row in rows)
            assert not any(gates.contexts for step_cache in handle.step_caches for gates in step_cache.block_lists)


def test_a_callers_own_loop_around_the_pipelines_parts(fresh):
    pipeline = stepping.wan()
    spec, case, _ = bare()
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    prompts = [torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]

    def loop(steps):
        x = latents
        pipeline.scheduler.set_timesteps(steps)
        for time in pipeline.scheduler.timesteps:
            with torch.no_grad():
                cond, uncond = (pipeline.transformer(x, time.expand(1), prompt).sample for prompt in prompts)
            x = pipeline.scheduler.step(uncond + 3 * (cond - uncond), time, x).prev_sample
        return x

    with dit_patch.apply(pipeline, step_cache=stepping.EAGER) as handle:
        first, _, third = loop(9), loop(5), loop(9)
        assert torch.equal(first, third)
        assert {row.label for row in handle.step_stats()} == {"pass 1", "pass 2"}
        assert all(row.steps == 9 and row.cached for row in handle.step_stats())


def test_masks_by_name_need_the_number_of_steps():
    spec, case, model = bare()
    calls = stepping.steps(spec, case, 8)
    with dit_patch.apply(
        model, step_cache={**stepping.EAGER, "warmup": 0, "mask": "fast", "mask_policy": "static"}
    ) as handle:
        with pytest.raises(StepCacheError, match=r"begin_generation\(steps="):
            verify.run(model, calls)
        handle.begin_generation(steps=8)
        verify.run(model, calls)
        mask = requirements.cache_dit().steps_mask(total_steps=8, mask_policy="fast")
        assert all(row.cached == tuple(at for at, one in enumerate(mask) if not one) for row in handle.step_stats())


def test_nothing_cached_is_said_with_the_threshold_that_would_have(wan):
    with dit_patch.apply(wan, step_cache={**stepping.EAGER, "threshold": 1e-6}) as handle:
        with pytest.warns(
            UserWarning, match=r"nothing cached: the smallest difference was .* would have cached a step"
        ) as caught:
            stepping.latents(wan)
        would = float(str(caught[0].message).partition("; ")[2].split()[0])
        assert "would have cached a step" in str(handle)
    with dit_patch.apply(wan, step_cache={**stepping.EAGER, "threshold": would}) as handle:
        stepping.latents(wan)
        assert any(stepping.cached(handle).values())


def test_few_steps_are_said_up_front_and_left_alone(wan):
    plain = stepping.latents(wan, 4)
    with dit_patch.apply(wan, step_cache="performance") as handle:
        with pytest.warns(UserWarning, match="left uncached: 4 steps are fewer than the 12"):
            assert torch.equal(stepping.latents(wan, 4), plain)
        assert "left uncached" in str(handle)
        stepping.latents(wan, 14)
        assert not any("left uncached" in note for row in handle.step_stats() for note in row.notes)
    with (
        dit_patch.apply(wan, step_cache={"preset": "quality", "min_steps": 0}),
        pytest.warns(UserWarning, match="8 steps, all within the warm-up of 8"),
    ):
        stepping.latents(wan, 8)


def test_thresholds_of_nothing_are_not_warned_of(wan):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dit_patch.apply(wan, step_cache={**stepping.EAGER, "threshold": 0}) as handle:
            stepping.latents(wan)
        assert "the threshold is 0" in str(handle.step_stats()[0].notes)


def test_a_layer_that_was_thrown_away_is_said_and_put_back(fresh):
    pipeline = stepping.wan()
    with dit_patch.apply(pipeline, step_cache=stepping.EAGER) as handle:
        stepping.latents(pipeline)
        del pipeline.transformer.forward  # as a library does that restores what it believes to be the original
        with pytest.warns(UserWarning, match="something replaced the model's forward after apply"):
            stepping.latents(pipeline)
        assert dit_patch.apply(pipeline, step_cache=stepping.EAGER) is handle
        assert torch.equal(stepping.latents(pipeline), fresh())


def test_a_model_compiled_as_a_whole_later_is_said():
    pipeline = stepping.wan()
    with dit_patch.apply(pipeline, step_cache=stepping.EAGER):
        pipeline.transformer.compile(backend="eager")
        with pytest.warns(UserWarning, match="compiled as a whole after apply"):
            stepping.latents(pipeline)
    torch._dynamo.reset()


def test_forward_called_without_its_hooks():
    spec, case, model = bare()
    calls = stepping.steps(spec, case)
    with dit_patch.apply(model, step_cache=stepping.ALWAYS) as handle, torch.no_grad():
        for arguments in calls:
            model.forward(**arguments)
        assert all(row.steps == 7 and row.cached for row in handle.step_stats())
        handle.begin_generation()
