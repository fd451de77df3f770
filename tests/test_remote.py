"""Pipelines in worker processes: patched in all of them or in none, reported from all of them, and taken back.

First with workers that only pickling keeps apart, then with FastVideo's own generator, executor and worker processes.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import types

import pytest
import torch
import toys

from dit_patch.errors import DitPatchError, SiteError, StepCacheError, UnsupportedModelError
from dit_patch.handle import apply as local_apply
from dit_patch.launch import worker_calls, workers
from dit_patch.sites.scope import scope_of
from dit_patch.spec.registry import Registry

SITES = """
- {at: table.forward, kind: rope, key: {x: [shape]}}
- {at: embed.forward, kind: context, key: {text: [identity]}}
"""


class Executor:
    """Workers in this process, as FastVideo's: what goes to them and comes back is pickled, and none may raise."""

    def __init__(self, *models, **parts):
        pipelines = [types.SimpleNamespace(modules={"transformer": model}, **parts) for model in models]
        self.workers = [types.SimpleNamespace(rank=rank, pipeline=each) for rank, each in enumerate(pipelines)]

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        sent = pickle.dumps((method, args, kwargs or {}))
        return [self._run(worker, *pickle.loads(sent)) for worker in self.workers]

    @staticmethod
    def _run(worker, method, args, kwargs):
        try:
            return pickle.loads(pickle.dumps(method(worker, *args, **kwargs)))
        except Exception as error:
            raise AssertionError("FastVideo would have ended this worker and its caller") from error


class Generator:
    """What dit_patch knows of a `VideoGenerator`."""

    def __init__(self, *models, **parts):
        self.executor = Executor(*models, **parts)

    def generate_video(self):
        """Three steps in every worker."""
        models, arguments = [worker.pipeline.modules["transformer"] for worker in self.workers], toys.inputs()
        with torch.no_grad():
            return [[model(**arguments) for _ in range(3)][-1] for model in models]

    @property
    def workers(self):
        return self.executor.workers

    def shutdown(self):
        self.workers.clear()
        del self.executor


@pytest.fixture
def specs(tmp_path):
    return toys.write_spec(tmp_path / "specs", SITES)


@pytest.fixture
def apply(specs):
    return lambda target, **options: workers.apply(target, **{"specs": [specs]} | options)


@pytest.fixture
def models():
    return [toys.build(), toys.build()]


@pytest.fixture
def generator(models):
    return Generator(*models)


def patched(model) -> bool:
    return scope_of(model) is not None


# What is remote


def test_a_generator_is_remote_and_what_is_in_this_process_is_not(models):
    pipeline = types.SimpleNamespace(components={"transformer": models[0]}, executor=object())
    assert workers.is_remote(Generator())
    assert not any(map(workers.is_remote, (models[0], pipeline, types.SimpleNamespace(modules={}), object(), None)))


def test_an_executor_without_collective_call_is_refused_with_a_way_out():
    target = types.SimpleNamespace(executor=object())
    assert workers.is_remote(target)
    with pytest.raises(UnsupportedModelError, match=r"has no `collective_rpc`(.|\n)*dit_patch.apply\(pipeline\)"):
        workers.apply(target)


def test_a_generator_that_was_shut_down_is_told_from_something_unknown(generator, apply):
    executor = generator.executor
    generator.shutdown()
    assert workers.is_remote(generator)
    for target in (generator, types.SimpleNamespace(executor=executor)):
        with pytest.raises(DitPatchError, match="has been shut down"):
            apply(target)


# The handle


def test_a_handle_that_was_not_kept_is_found_in_the_workers_and_all_is_taken_back(generator, models, apply):
    before = [toys.snapshot(model) for model in models]
    assert workers.handle_of(generator) is None and workers.remove(generator) is False
    handle = apply(generator)
    found = workers.handle_of(generator)
    assert found == handle and found.options == handle.options
    assert workers.remove(generator) is True and workers.handle_of(generator) is None
    assert all(map(toys.same_snapshot, before, [toys.snapshot(model) for model in models]))


def test_every_worker_explains_and_is_told_of_a_generation(generator, models, apply):
    handle = apply(generator)
    generator.generate_video()
    said = handle.explain()
    assert "rank 0:\n" in said and "rank 1:\n" in said and said.count("embed.forward") == 2 and not handle.models
    misses = [row.misses for row in handle.stats() if row.at == "embed.forward"]
    handle.begin_generation(steps=3)  # forgets what is known by identity
    generator.generate_video()
    assert [row.misses for row in handle.stats() if row.at == "embed.forward"] == [each + 1 for each in misses]
    handle.remove()
    assert handle.explain() == ""


def test_every_worker_is_patched_reported_and_taken_back(generator, models, apply):
    before = [toys.snapshot(model) for model in models]
    plain = generator.generate_video()
    handle = apply(generator)
    assert all(map(torch.equal, generator.generate_video(), plain))
    rows = handle.stats()
    assert [(row.model, row.at, row.hits, row.misses) for row in rows] == [
        (f"rank {rank}: transformer", at, 2, 1) for rank in (0, 1) for at in ("table.forward", "embed.forward")
    ]
    assert handle.nbytes == sum(row.nbytes for row in rows) > 0
    report = str(handle)
    assert "cached of 512.00 MiB" in report
    assert [line for line in report.splitlines() if "Toy" in line] == [
        f"rank {rank}: transformer  Toy  spec toy" for rank in (0, 1)
    ]
    handle.clear()
    assert handle.nbytes == 0
    handle.remove()
    handle.remove()
    assert [row.hits for row in handle.stats()] == [2, 2, 2, 2] and "rank 1" in str(handle)
    assert all(map(torch.equal, generator.generate_video(), plain))
    for model, snapshot in zip(models, before):
        del model.seen
        snapshot[0][1].pop("seen", None)
        assert not patched(model) and "forward" not in vars(model.table)


def test_rows_of_a_single_worker_are_named_as_in_its_pipeline(models, apply):
    with apply(Generator(models[0])) as handle:
        assert {row.model for row in handle.stats()} == {"transformer"}
        assert "cached of 256.00 MiB" in str(handle)
    assert not patched(models[0])


def test_applying_again_gives_an_equal_handle_and_repairs(generator, models, apply):
    first = apply(generator)
    displaced = vars(models[1].table).pop("forward")
    again = apply(generator)
    assert again == first and hash(again) == hash(first) and again != object()
    assert "forward" in vars(models[1].table)
    del models[0].table.forward, models[1].table.forward, displaced
    first.repair()
    assert all("forward" in vars(model.table) for model in models)
    again.remove()
    assert not any(map(patched, models))


def test_other_options_are_refused_and_change_nothing(generator, models, apply):
    handle = apply(generator)
    with pytest.raises(DitPatchError, match=r"^ranks 0, 1: already patched with other options"):
        apply(generator, only="rope")
    assert handle.stats() and all(map(patched, models))


def test_options_may_be_iterators_and_relative_paths(generator, specs, monkeypatch, tmp_path):
    monkeypatch.chdir(specs.parent)
    handle = workers.apply(generator, only=(kind for kind in ("rope",)), specs="specs")
    monkeypatch.chdir("/")
    assert {row.kind for row in handle.stats()} == {"rope"}
    assert workers.apply(generator, only="rope", specs=specs) == handle


def test_a_handle_does_not_speak_for_a_later_one(generator, models, apply):
    first, same = apply(generator), apply(generator)
    first.remove()
    later = apply(generator, only="rope")
    assert later != first
    first.remove()
    first.clear()
    same.remove()
    assert all(map(patched, models))
    for act in (same.stats, same.clear, same.repair, first.repair):
        with pytest.raises(DitPatchError, match="nothing of this handle is left"):
            act()
    later.remove()
    assert not any(map(patched, models))


def test_a_generator_may_be_shut_down_before_its_handle_is_removed(generator, apply):
    with apply(generator) as handle:
        generator.shutdown()
    with pytest.raises(DitPatchError, match="has been shut down"):
        handle.stats()


# What goes wrong


def test_a_failure_in_one_worker_is_undone_in_the_others_and_raised_here(models, apply):
    target = Generator(models[0], toys.build(toys.Elsewhere))
    with pytest.raises(UnsupportedModelError, match=r"^rank 1: no spec for Elsewhere"):
        apply(target)
    assert not patched(models[0])


def test_what_was_there_before_a_failure_stays(models, apply):
    handle = apply(Generator(models[0]))
    with pytest.raises(UnsupportedModelError, match="rank 1"):
        apply(Generator(models[0], toys.build(toys.Elsewhere)))
    assert patched(models[0]) and handle.stats()


def test_workers_that_fail_alike_are_quoted_once(generator, specs):
    toys.write_spec(specs, "- {at: tabel.forward, kind: rope, key: {x: [shape]}}")
    with pytest.raises(SiteError, match=r"^ranks 0, 1: toy: tabel.forward .*did you mean `table`") as caught:
        workers.apply(generator, specs=specs)
    assert str(caught.value).count("tabel.forward (") == 1


def test_an_error_that_is_not_ours_comes_with_the_workers_traceback(generator, apply):
    generator.workers[1].pipeline = None
    with pytest.raises(UnsupportedModelError, match="rank 1: expected a pipeline"):
        apply(generator)
    del generator.workers[1].pipeline
    with pytest.raises(DitPatchError, match="^rank 1: AttributeError: .*pipeline") as caught:
        apply(generator)
    assert type(caught.value) is DitPatchError and "in patch_pipeline" in str(caught.value.__cause__)


def test_an_answer_that_cannot_be_sent_is_a_failure_and_not_the_workers_end(generator):
    answer = worker_calls.run_in_worker(generator.workers[1], lambda worker: lambda: None)
    assert answer.failure and pickle.loads(pickle.dumps(answer)) == answer


def test_a_handle_made_in_a_worker_itself_is_found_and_not_undone(models, specs, apply):
    own = local_apply(types.SimpleNamespace(modules={"transformer": models[0]}), specs=[specs.resolve()])
    with pytest.raises(UnsupportedModelError, match="rank 1"):
        apply(Generator(models[0], toys.build(toys.Elsewhere)))
    assert patched(models[0])
    handle = apply(Generator(models[0]))
    assert [row.at for row in handle.stats()] == [row.at for row in own.stats()]
    handle.remove()
    assert not patched(models[0])


def test_what_workers_warn_of_is_warned_of_here(generator, specs):
    toys.write_spec(specs, SITES, head="requires: [torch<1]\n")
    with pytest.warns(UserWarning, match=r"^dit_patch: ranks 0, 1: toy needs torch<1") as caught:
        workers.apply(generator, specs=specs, strict=False)
    assert len(caught) == 1


def test_workers_that_died_are_said_to_have(generator, apply):
    handle = apply(generator)

    def collective_rpc(*args, **kwargs):
        raise EOFError

    generator.executor.collective_rpc = collective_rpc
    for act in (handle.stats, handle.remove, lambda: apply(generator)):
        with pytest.raises(DitPatchError, match="the workers did not answer: EOFError"):
            act()


def test_an_answer_to_somebody_else_is_not_taken_for_ours(generator, apply):
    generator.executor.collective_rpc = lambda *args, **kwargs: [{"output_batch": None}] * 2
    with pytest.raises(DitPatchError, match="the answer to another call"):
        apply(generator)


def test_a_pipeline_is_patched_as_its_first_generation_will_find_it(models, apply):
    """FastVideo compiles in `post_init`, which a worker calls no earlier than that."""
    target = Generator(models[0], post_init_called=False)
    pipeline = target.workers[0].pipeline

    def post_init():
        pipeline.post_init_called = True
        models[0].compile()

    pipeline.post_init = post_init
    with pytest.warns(UserWarning, match="rank 0: transformer .* is compiled as a whole"):
        apply(target)
    apply(target)


# FastVideo itself: its generator, executor, worker processes and pipeline, with a small Wan saved in diffusers' format

SITECUSTOMIZE = '''
"""What FastVideo's workers need on a machine without an accelerator; it takes one without CUDA for a Mac."""
import wrapt


@wrapt.when_imported("fastvideo.distributed.parallel_state")
def _(module):
    import torch

    module.get_local_torch_device = lambda: torch.device("cpu")


@wrapt.when_imported("fastvideo.platforms.cpu")
def _(module):
    backend = "fastvideo.attention.backends.sdpa.SDPABackend"
    module.CpuPlatform.get_attn_backend_cls = classmethod(lambda cls, *args: backend)


@wrapt.when_imported("fastvideo.distributed.communication_op")
def _(module):
    module._sp_warmup_done = True  # it is done on "cuda"
'''
MODEL = "fastvideo.models.dits.wanvideo.WanTransformer3DModel"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """`real(workers)`: a `VideoGenerator` with that many worker processes, each with the whole pipeline."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTVIDEO_ATTENTION_BACKEND", "TORCH_SDPA")
    patch.setenv("FASTVIDEO_LOGGING_LEVEL", "ERROR")
    patch.setenv("TOKENIZERS_PARALLELISM", "false")
    patch.setenv("OMP_NUM_THREADS", "1")
    pytest.importorskip("fastvideo", reason="needs fastvideo", exc_type=ImportError)
    from fastvideo import VideoGenerator
    from fastvideo.configs.pipelines.wan import WanT2V480PConfig

    from dit_patch.pipelines.tiny_pipelines import wan_pipeline

    folder = tmp_path_factory.mktemp("fastvideo")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    size = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "freq_dim": 32}
    wan_pipeline(**size).save_pretrained(folder / "wan")
    # FastVideo's scheduler of that name knows fewer options than diffusers', and makes another for Wan anyway.
    scheduler = {"_class_name": "UniPCMultistepScheduler", "_diffusers_version": "0.35.0"}
    (folder / "wan/scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    # A worker that fails sends this to its caller.
    before = signal.signal(signal.SIGQUIT, lambda *_: None)
    made = []

    def make(workers):
        config = WanT2V480PConfig(vae_decode_precision="fp32")
        config.dit_config.arch_config.cast_prompt_embeds_to_dit_dtype = True  # elsewhere autocast("cuda") does that
        nothing_moves = dict.fromkeys(
            ("dit_cpu_offload", "dit_layerwise_offload", "text_encoder_cpu_offload", "vae_cpu_offload"), False
        )
        made.append(
            VideoGenerator.from_pretrained(
                str(folder / "wan"),
                num_gpus=workers,
                pipeline_config=config,
                pin_cpu_memory=False,
                use_fsdp_inference=False,
                **nothing_moves,
            )
        )
        return made[-1]

    yield make
    for each in made:
        if hasattr(each, "executor"):
            each.shutdown()
    signal.signal(signal.SIGQUIT, before)
    patch.undo()


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def video(request, real):
    generator = real(request.param)
    yield generator
    if hasattr(generator, "executor"):
        generator.shutdown()


@pytest.fixture
def options(tmp_path):
    """Options of `apply` with which there is a spec for FastVideo's Wan."""
    if MODEL in Registry().classes():
        return {}
    sites = "- {at: condition_embedder.text_embedder.forward, kind: context, key: {x: [identity]}}"
    return {"specs": [toys.write_spec(tmp_path / "specs", sites, model=MODEL)]}


def frames(generator, seed=1, steps=3):
    request = {
        "prompt": "a cat",
        "negative_prompt": "a dog",
        "sampling": {
            "num_frames": 5,
            "height": 32,
            "width": 32,
            "num_inference_steps": steps,
            "guidance_scale": 5.0,
            "seed": seed,
        },
        "output": {"save_video": False, "return_frames": True},
    }
    return generator.generate(request).samples


def test_a_real_generator_gives_the_same_frames(video, options):
    with workers.apply(video, **options):
        before_the_first = frames(video)
    plain = frames(video)
    assert torch.equal(before_the_first, plain) and not torch.equal(plain, frames(video, seed=2))
    with workers.apply(video, **options) as handle:
        assert torch.equal(frames(video), plain)
        rows = handle.stats()
        ranks = {row.model.removesuffix("transformer") for row in rows}
        assert ranks == ({""} if len(video.executor.workers) == 1 else {"rank 0: ", "rank 1: "})
        assert all(sum(row.hits for row in rows if row.model.startswith(rank)) > 0 for rank in ranks)
        assert handle.nbytes > 0 and "WanTransformer3DModel" in str(handle)
        assert workers.apply(video, **options) == handle
        with pytest.raises(DitPatchError, match="already patched with other options"):
            workers.apply(video, **options, check="always")
        assert torch.equal(frames(video), plain)
    assert torch.equal(frames(video), plain)
    assert sum(row.hits for row in handle.stats()) == 2 * sum(row.hits for row in rows)


def test_a_real_generator_with_a_step_cache(video, options):
    pytest.importorskip("cache_dit", reason="needs cache-dit")
    plain = frames(video, steps=5)
    knobs = {"fn": 1, "warmup": 2, "min_steps": 0}
    with workers.apply(video, **options, step_cache={**knobs, "threshold": 0.0}):
        assert torch.equal(frames(video, steps=5), plain)
    with workers.apply(video, **options, step_cache={**knobs, "threshold": 1.0}) as handle:
        first, other = frames(video, steps=5), frames(video, seed=2, steps=5)
        assert not torch.equal(first, plain) and not torch.equal(other, first)
        assert torch.equal(frames(video, steps=5), first)
        rows = handle.step_stats()
        assert len(rows) == 2 * len(video.executor.workers)
        assert all(row.cached == (2, 3, 4) for row in rows)
        assert "step cache  threshold=1" in str(handle)
    assert handle.step_stats() and torch.equal(frames(video, steps=5), plain)
    with pytest.raises(StepCacheError, match="fn=5"):
        workers.apply(video, **options, step_cache={"fn": 5})


def test_a_real_worker_outlives_what_it_refuses(video, options, tmp_path):
    with pytest.raises(DitPatchError, match=r"ranks? 0.*: only: `rop` is no kind and no spec; did you mean `rope`"):
        workers.apply(video, **options, only="rop")
    with pytest.raises(DitPatchError, match="does not exist"):
        workers.apply(video, specs=[tmp_path / "nowhere"])
    with workers.apply(video, **options) as handle:
        assert handle.stats()
    assert torch.is_tensor(frames(video, steps=1))


def test_a_real_generator_that_streams_is_not_asked(video, options):
    if len(video.executor.workers) > 1:
        pytest.skip("FastVideo's queue tells only one of its workers to stop streaming")
    handle = workers.apply(video, **options)
    video.executor.enable_streaming()
    with pytest.raises(DitPatchError, match="streaming loop"):
        handle.stats()
    with pytest.raises(DitPatchError, match="streaming loop"):
        workers.apply(video, **options)
    video.executor.disable_streaming()
    assert handle.stats()
    handle.remove()


def test_a_real_generator_may_be_shut_down_first(video, options):
    with workers.apply(video, **options) as handle:
        video.shutdown()
    with pytest.raises(DitPatchError, match="has been shut down"):
        handle.stats()
    with pytest.raises(DitPatchError, match="this VideoGenerator has been shut down"):
        workers.apply(video, **options)
