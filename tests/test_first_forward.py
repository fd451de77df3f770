"""Under `dit-patch run` each new instance is patched at its first forward: which, when, and what it leaves behind."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import types
import weakref

import pytest
import torch
import toys

import dit_patch
from dit_patch.handle import handle_of
from dit_patch.launch import find_pipeline, first_forward
from dit_patch.report import journal as journals
from dit_patch.report.document import NEVER_CALLED, PATCHED
from dit_patch.report.journal import Journal
from dit_patch.sites.scope import scope_of

SITES = """
- {at: table.forward, kind: rope, key: {x: [shape]}}
- {at: embed.forward, kind: context, key: {text: [identity]}}
"""


class Model(toys.Toy):
    """Watched; and others below, which are not, or are as well."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.size = size


class Unknown(Model):
    def __init__(self):
        super().__init__()
        self.forwards = 0


class Known(Model):
    def __init__(self):
        super().__init__(size=5)


class Pipeline:
    def __init__(self, **components):
        self.components = components

    def __call__(self, **inputs):
        kept = torch.ones(3)
        self.kept = weakref.ref(kept)
        results = [model(**inputs) for model in self.components.values()]
        del kept
        return results + [self.kept()]


@pytest.fixture(autouse=True)
def journal(monkeypatch):
    journal = Journal()
    monkeypatch.setattr(first_forward, "journal", journal)
    monkeypatch.setattr(journals, "journal", journal)
    return journal


@pytest.fixture(autouse=True)
def watched(monkeypatch, tmp_path):
    """Watches `Model` and `Known` for one test, with a spec of these sites."""

    def watch(sites=SITES, **variables):
        for cls in (Model, Known):
            name = f"{cls.__module__}.{cls.__qualname__}"
            folder = toys.write_spec(tmp_path / "specs", sites, model=name, name=cls.__name__)
        monkeypatch.setenv("DIT_PATCH_SPEC_DIR", str(folder))
        monkeypatch.setenv("DIT_PATCH_MODEL", "auto")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    watch()
    before = {cls: {name: vars(cls).get(name) for name in ("__init__", "__setstate__")} for cls in (Model, Known)}
    for cls in before:
        first_forward.watch(cls)
        first_forward.watch(cls)
    yield watch
    for cls, attributes in before.items():
        first_forward._watched_classes.discard(cls)
        for name, value in attributes.items():
            if value is None:
                delattr(cls, name)
            else:
                setattr(cls, name, value)


def forward(model, times=1, **inputs):
    with torch.no_grad():
        return [model(**toys.inputs() | inputs) for _ in range(times)][-1]


def counts(model):
    return {row.at: (row.hits, row.misses, dict(row.bypassed)) for row in handle_of(model).stats()}


def states(journal):
    return {(model["class"].rpartition(".")[2], model["state"]): model["count"] for model in journal.document["models"]}


def test_the_first_forward_counts_as_any_other(journal):
    model, plain = toys.build(Model), toys.build(toys.Toy)
    assert scope_of(model) is None and states(journal) == {("Model", NEVER_CALLED): 1}
    inputs = toys.inputs()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(**inputs), plain(**inputs))
    assert counts(model) == {"table.forward": (2, 1, {}), "embed.forward": (2, 1, {})}
    assert states(journal) == {("Model", PATCHED): 1}
    assert not any(isinstance(hook.owner, first_forward.FirstForward) for hook in model._forward_pre_hooks.values())


def test_a_site_that_acts_only_inside_the_models_forward_acts_in_the_first_one(watched):
    watched("""
        - {at: "forward:shift", kind: context, key: {x: [identity]}}
        - {at: embed.forward, kind: context, key: {text: [identity], model.x: [identity]}}
    """)
    model, inputs = toys.build(Model), toys.inputs()
    for _ in range(3):
        forward(model, **inputs)
    assert counts(model) == {"forward:shift": (0, 3, {}), "embed.forward": (2, 1, {})}
    handle_of(model).remove()  # a global would stay wrapped


@pytest.mark.parametrize("cls", [Known, Unknown])
def test_a_subclass_is_patched_once_by_its_own_spec_or_the_one_it_inherits(journal, cls):
    model = toys.build(cls)
    assert len(model._forward_pre_hooks) == 1 and states(journal) == {(cls.__name__, NEVER_CALLED): 1}
    forward(model, 2)
    assert handle_of(model).stats()[0].spec == (cls if cls is Known else Model).__name__


def test_a_class_keeps_its_signature_and_an_instance_its_attributes():
    assert list(inspect.signature(Model.__init__).parameters) == ["self", "size"]
    assert list(inspect.signature(Model).parameters) == ["size"] and Model(size=3).size == 3
    model = Model()
    assert "forward" not in vars(model)
    gone = weakref.ref(model)
    del model
    assert gone() is None  # nothing keeps a model that was not called, not until a collection either


def test_the_pipeline_that_runs_it_is_patched_with_all_its_models(journal):
    pipeline = Pipeline(low=toys.build(Model), high=toys.build(Model))
    with torch.no_grad():
        *_, kept = pipeline(**toys.inputs())
    assert kept is None  # finding it has not prolonged the life of what is on the stack
    low, high = pipeline.components.values()
    assert handle_of(low) is handle_of(high) and list(handle_of(low).models) == ["low", "high"]
    assert states(journal) == {("Model", PATCHED): 2} and len(journal.document["handles"]) == 1


def test_a_model_that_another_pipeline_shares_is_patched_alone():
    shared = toys.build(Model)
    forward(shared)
    pipeline = Pipeline(own=toys.build(Model), shared=shared)
    with torch.no_grad():
        pipeline(**toys.inputs())
    assert handle_of(shared) is not handle_of(pipeline.components["own"])


class Around(torch.nn.Module):
    """A model without a spec, with one inside that has one."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    def forward(self, **inputs):
        return self.inside(**inputs)


def test_a_pipeline_that_has_the_model_inside_another_is_found_and_patched_at_once(journal):
    pipeline = Pipeline(encoder=Around(Model()), transformer=Known())
    pipeline(**toys.inputs())
    handle = handle_of(pipeline.components["transformer"])
    assert list(handle.models) == ["encoder.inside", "transformer"]
    assert handle_of(pipeline.components["encoder"].inside) is handle
    assert journal.failures == ()


def test_what_the_program_has_patched_inside_another_model_stays(journal, tmp_path):
    pipeline = Pipeline(encoder=Around(Model()), transformer=Known())
    own = dit_patch.apply(pipeline.components["encoder"], specs=[tmp_path / "specs"])
    pipeline(**toys.inputs())
    assert handle_of(pipeline.components["encoder"].inside) is own
    assert list(handle_of(pipeline.components["transformer"]).models) == ["model"]
    assert journal.failures == ()


def test_an_object_that_only_looks_like_a_pipeline_is_passed_by():
    class Odd:
        @property
        def components(self):
            raise ValueError("not yet")

        def call(self, function):
            return function()

    model = toys.build(Model)
    assert Odd().call(lambda: find_pipeline.pipeline_of(model)) is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("called", [False, True])
def test_copies_are_patched_at_their_own_first_forward(journal, duplicate, called):
    model = toys.build(Model)
    if called:
        forward(model)
    other = duplicate(model)
    assert scope_of(other) is None and len(other._forward_pre_hooks) == 1
    expected = forward(model, 2)
    assert torch.equal(forward(other, 2), expected)
    assert counts(other)["table.forward"] == (1, 1, {})
    assert handle_of(other) is not handle_of(model) and states(journal) == {("Model", PATCHED): 2}


def test_a_failure_is_said_once_and_leaves_the_model_as_it_was(journal, watched, capsys):
    watched("- {at: tabel.forward, kind: rope, key: {x: [shape]}}")
    for _ in range(2):
        model, plain = toys.build(Model), toys.build(toys.Toy)
        assert torch.equal(forward(model), forward(plain))
        assert not model._forward_pre_hooks or not forward(model).isnan().any()
        assert scope_of(model) is None and not model._forward_pre_hooks
    err = capsys.readouterr().err
    assert err.count("dit_patch: ") == 1 and "is not patched, and runs as it is: SiteError" in err
    assert states(journal) == {("Model", "left as it was"): 2} and len(journal.failures) == 1


def test_a_failure_is_raised_where_the_run_is_strict(journal, watched):
    watched("- {at: tabel.forward, kind: rope, key: {x: [shape]}}", DIT_PATCH_RUN_STRICT="1")
    with pytest.raises(dit_patch.SiteError, match="did you mean `table`"):
        forward(toys.build(Model))
    assert len(journal.failures) == 1


def test_a_forward_that_raises_leaves_no_scope_behind():
    model = toys.build(Model)
    with pytest.raises(RuntimeError):
        forward(model, text=torch.ones(3, 9))
    from dit_patch.sites import scope

    assert scope.current() is None
    forward(model, 2)
    assert not any(bypassed for *_, bypassed in counts(model).values())


def test_the_first_forwards_of_several_threads_patch_once(journal):
    model, plain, inputs = toys.build(Model), toys.build(toys.Toy), toys.inputs()
    barrier, results = threading.Barrier(4), []

    def work():
        barrier.wait()
        with torch.no_grad():
            results.append(model(**inputs))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = forward(plain, **inputs)
    assert len(results) == 4 and all(torch.equal(each, expected) for each in results)
    assert states(journal) == {("Model", PATCHED): 1} and len(journal.document["handles"]) == 1


def test_the_programs_own_patch_stays(journal, tmp_path):
    model = toys.build(Model)
    own = dit_patch.apply(model, only="rope", specs=[tmp_path / "specs"])
    forward(model, 2)
    assert handle_of(model) is own and counts(model) == {"table.forward": (1, 1, {})}
    assert states(journal) == {("Model", "patched by the program itself"): 1}


def test_an_apply_of_the_program_goes_before_ours(journal, tmp_path):
    model = toys.build(Model)
    forward(model, 3)
    ours = handle_of(model)
    same = dit_patch.apply(model, specs=[tmp_path / "specs"])
    assert same is ours
    theirs = dit_patch.apply(model, specs=[tmp_path / "specs"], check="always")
    assert handle_of(model) is theirs
    with pytest.raises(dit_patch.DitPatchError, match="already patched with other options"):
        dit_patch.apply(model, specs=[tmp_path / "specs"], check="never")
    [kept] = journal.document["handles"]
    assert kept["removed"] and kept["sites"][0]["hits"] == 2


def test_compiled_as_a_whole_nothing_is_touched(journal):
    model, plain = toys.build(Model), toys.build(toys.Toy)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(forward(compiled), forward(plain))
    assert scope_of(model) is None and states(journal) == {("Model", NEVER_CALLED): 1}


def test_with_compiled_blocks_it_is_patched():
    model, plain = toys.build(Model), toys.build(toys.Toy)
    for block in model.blocks:
        block.compile(backend="eager")
    inputs = toys.inputs()
    assert torch.equal(forward(model, 2, **inputs), forward(plain, **inputs))
    assert counts(model)["embed.forward"] == (1, 1, {})


def test_a_forward_that_the_program_replaces_is_the_one_that_runs(monkeypatch):
    model, expected = toys.build(Model), toys.Table()(toys.inputs()["x"])
    monkeypatch.setattr(Model, "forward", lambda self, **inputs: self.table(inputs["x"]))
    with pytest.warns(UserWarning, match="embed.forward was not reached"):
        assert torch.equal(forward(model), expected)
    other = toys.build(Model)
    other.forward = types.MethodType(lambda self, **inputs: self.table(inputs["x"]) + 1, other)
    with pytest.warns(UserWarning, match="embed.forward was not reached"):
        assert torch.equal(forward(other), expected + 1)


def test_models_in_training_and_under_inference_mode():
    model, plain, inputs = toys.build(Model), toys.build(toys.Toy), toys.inputs()
    for each in (model, plain):
        each(**inputs).sum().backward()
    assert torch.equal(model.embed.first.weight.grad, plain.embed.first.weight.grad)
    with torch.inference_mode():
        assert torch.equal(toys.build(Model)(**inputs), plain(**inputs))


def test_hooks_of_accelerate_stay_where_they_are():
    hooks = pytest.importorskip("accelerate.hooks")
    model, plain, inputs = toys.build(Model), toys.build(toys.Toy), toys.inputs()
    hooks.add_hook_to_module(model, hooks.ModelHook())
    assert torch.equal(forward(model, 2, **inputs), forward(plain, **inputs))
    assert counts(model)["embed.forward"] == (1, 1, {})
    hooks.remove_hook_from_module(model)
    assert torch.equal(forward(model, 2, **inputs), forward(plain, **inputs))


def test_a_model_that_goes_takes_its_patches_along_and_leaves_its_numbers(journal):
    model = toys.build(Model)
    forward(model, 3, **toys.inputs())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    [handle] = journal.document["handles"]
    assert [row["hits"] for row in handle["sites"]] == [2, 2] or handle["sites"][0]["hits"] == 2


# With a step cache: it is as if it had been switched on before the generation


STEP_CACHE = {"threshold": 1.0, "warmup": 2, "fn": 1, "min_steps": 0}


@pytest.fixture
def watched_wan(monkeypatch):
    """Call it to have diffusers' Wan patched at each first forward, with a step cache, until the test ends."""
    from diffusers import WanTransformer3DModel as cls

    options = {"only": None, "step_cache": STEP_CACHE, "specs": (), "trust": False}
    monkeypatch.setattr(first_forward.Choice, "options", options)
    before = {name: vars(cls).get(name) for name in ("__init__", "__setstate__")}
    yield lambda: first_forward.watch(cls)
    first_forward._watched_classes.discard(cls)
    for name, value in before.items():
        if value is not None:
            setattr(cls, name, value)
        elif name in vars(cls):  # not where the test was skipped before anything was watched
            delattr(cls, name)


def tiny_wan(experts):
    from dit_patch.pipelines.tiny_pipelines import wan22_pipeline, wan_pipeline

    size = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "freq_dim": 32}
    pipeline = (wan22_pipeline if experts else wan_pipeline)(**size)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, seed):
    generator = torch.Generator().manual_seed(seed)
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 9, "output_type": "latent"}
    return pipeline("a cat", guidance_scale=5.0, generator=generator, **size).frames


def steps_of(handle):
    return [(row.model, row.label, row.steps, row.cached) for row in handle.step_stats()]


@pytest.mark.parametrize("experts", [False, True])
def test_a_step_cache_skips_in_its_first_generation_as_if_switched_on_before(watched_wan, experts):
    pytest.importorskip("cache_dit", reason="needs cache-dit")
    pytest.importorskip("transformers")
    before = tiny_wan(experts)
    with dit_patch.apply(before, step_cache=STEP_CACHE) as handle:
        expected = [(generate(before, seed), steps_of(handle)) for seed in (0, 1)]
    assert not torch.equal(expected[0][0], generate(before, 0)) and any(cached for *_, cached in expected[0][1])

    watched_wan()
    ours = tiny_wan(experts)
    found = [(generate(ours, seed), steps_of(handle_of(ours.transformer))) for seed in (0, 1)]

    for (frames, rows), (other, others) in zip(expected, found):
        assert torch.equal(frames, other) and rows == others
    for model in handle_of(ours.transformer).models.values():
        assert not any(isinstance(hook.owner, first_forward.FirstForward) for hook in model._forward_pre_hooks.values())
