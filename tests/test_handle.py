"""`apply` and its handle: what is found, what is refused, what is reported, and that everything can be taken back."""

from __future__ import annotations

import inspect
import re
import types
import weakref

import pytest
import torch
import toys

import dit_patch
from dit_patch.contribute import verify
from dit_patch.errors import DitPatchError, SiteError, UnsupportedModelError, VersionError
from dit_patch.memo.keys import same_bits
from dit_patch.sites import layers
from dit_patch.sites.pipeline_models import find_models
from dit_patch.sites.scope import scope_of
from dit_patch.spec import mini
from dit_patch.spec.registry import KINDS, Registry

SITES = """
- {at: table.forward, kind: rope, key: {x: [shape]}}
- {at: time.forward, kind: timestep, key: {t: [identity]}}
- {at: embed.forward, kind: context, key: {text: [identity]}}
- {at: embed..blocks.0, kind: mask, key: {model.mask: [identity]}}
- {at: 'forward:shift', kind: rotary, key: {x: [values]}}
"""
MASK = torch.ones(3)


def given(**changes):
    return toys.inputs() | {"mask": MASK} | changes


@pytest.fixture
def specs(tmp_path):
    return toys.write_spec(tmp_path / "specs", SITES)


@pytest.fixture
def model():
    return toys.build()


@pytest.fixture
def apply(specs):
    """`dit_patch.apply` with the toy's spec; what was patched is taken back."""
    handles = []

    def make(target, **options):
        handles.append(dit_patch.apply(target, **{"specs": [specs], "trust": True} | options))
        return handles[-1]

    yield make
    for handle in handles:
        handle.remove()


@pytest.fixture(autouse=True)
def globals_are_as_before():
    yield
    assert not isinstance(toys.shift, layers.Wrapped)


def pipeline(**components):
    return types.SimpleNamespace(components={"vae": torch.nn.Linear(1, 1), "scheduler": object(), **components})


def run(model, count=3, **changes):
    """The last of `count` results, all with the very same tensors."""
    arguments = given(**changes)
    with torch.no_grad():
        return [model(**arguments) for _ in range(count)][-1]


def hits(handle):
    return {row.at: row.hits for row in handle.stats()}


# What is found in what is given.


def test_a_bare_model(apply, model):
    handle = apply(model)
    assert handle.models == {"model": model}
    assert torch.equal(run(model), run(toys.build()))


def test_a_pipeline_with_one_model_leaves_its_other_parts_alone(apply, model):
    pipe = pipeline(transformer=model)
    before = toys.snapshot(pipe.components["vae"])
    handle = apply(pipe)
    assert handle.models == {"transformer": model}
    assert toys.same_snapshot(before, toys.snapshot(pipe.components["vae"]))


def test_a_pipeline_with_two_models_has_rows_for_each(apply):
    high, low = toys.build(), toys.build()
    handle = apply(pipeline(transformer=high, transformer_2=low))
    run(high), run(low, count=5)
    assert handle.models == {"transformer": high, "transformer_2": low}
    rope = [(row.model, row.hits) for row in handle.stats() if row.at == "table.forward"]
    assert rope == [("transformer", 2), ("transformer_2", 4)]
    shift = [(row.model, row.hits) for row in handle.stats() if row.at == "forward:shift"]
    assert shift == [("transformer", 2), ("transformer_2", 4)]


def test_of_a_pipeline_only_models_with_a_spec_are_patched(apply, model):
    handle = apply(pipeline(image=toys.Elsewhere(), transformer=model))
    assert list(handle.models) == ["transformer"]


def test_a_user_s_subclass_uses_its_parent_s_spec(apply):
    class Mine(toys.Child):
        pass

    assert apply(toys.build(Mine)).stats()[0].spec == "toy"


def test_a_class_that_merely_has_the_same_name_does_not(apply):
    namesake = type("Toy", (torch.nn.Module,), {"__module__": "elsewhere", "forward": toys.Elsewhere.forward})
    with pytest.raises(UnsupportedModelError, match=r"no spec for Toy \(elsewhere\)"):
        apply(namesake())


def test_a_model_without_a_spec_is_told_with_what_is_known(apply):
    known = ", ".join(sorted([*Registry().names(), "toy"]))
    with pytest.raises(UnsupportedModelError) as caught:
        apply(pipeline(vae=None, transformer=toys.Elsewhere()))
    assert str(caught.value) == (f"no spec for Elsewhere (toys).\n    Known: {known}. Write one: docs/specs.md.")


def test_what_is_no_model_at_all_is_told(apply):
    with pytest.raises(UnsupportedModelError, match="expected a pipeline or a torch.nn.Module, got `3` .int."):
        apply(3)
    with pytest.raises(UnsupportedModelError, match="no spec for a pipeline without modules"):
        apply(types.SimpleNamespace(components={}))


def test_a_model_compiled_as_a_whole_is_seen_through_and_warned_of(apply, model):
    with pytest.warns(UserWarning, match=r"model \(Toy\) is compiled as a whole, and compiled code is left alone"):
        handle = apply(torch.compile(model))
    assert handle.models == {"model": model}


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel])
def test_parallel_wrappers_are_seen_through(apply, model, wrapper):
    handle = apply(wrapper(model))
    assert handle.models == {"model": model}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel_is_seen_through(apply, model, tmp_path):
    there = torch.distributed.is_initialized()  # FastVideo's tests leave a group of one
    if not there:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        handle = apply(parallel)
        assert torch.equal(run(parallel), run(toys.build()))
        assert hits(handle)["table.forward"] == 2
    finally:
        if not there:
            torch.distributed.destroy_process_group()


# What is asked for.


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kv_cache"])  # a pipeline's
def test_only_one_kind(apply, model, kind):
    handle = apply(model, only=kind)
    assert {row.kind for row in handle.stats()} == {kind}
    assert torch.equal(run(model), run(toys.build()))
    assert all(row.hits for row in handle.stats())


def test_only_several_kinds_in_any_order(apply, model):
    handle = apply(model, only=["mask", "rope"])
    assert [row.kind for row in handle.stats()] == ["rope", "mask"]
    assert "forward" not in vars(model.time)
    assert apply(model, only=("rope", "mask", "rope")) is handle


@pytest.mark.parametrize(
    "option, message",
    [
        (
            {"only": "ropes"},
            "only: `ropes` is no kind and no spec; did you mean `rope`?\n    Kinds: " + ", ".join(KINDS),
        ),
        ({"only": ["rope", "masks"]}, "only: `masks` is no kind and no spec; did you mean `mask`?"),
        ({"only": []}, "only: an empty selection patches nothing; leave it out to patch every kind"),
        ({"check": "alway"}, "check: `alway` is none of first, always, never; did you mean `always`?"),
        ({"check": None}, "check: `None` is none of first, always, never"),
        ({"max_bytes": 0}, "max_bytes: `0` is not a positive number of bytes"),
        ({"max_bytes": -1}, "max_bytes: `-1` is not a positive number of bytes"),
        ({"max_bytes": 1.5}, "max_bytes: `1.5` is not a positive number of bytes"),
        ({"max_bytes": True}, "max_bytes: `True` is not a positive number of bytes"),
    ],
)
def test_an_option_that_does_not_exist_is_told_and_nothing_is_patched(apply, model, option, message):
    before = toys.snapshot(model)
    with pytest.raises(DitPatchError) as caught:
        apply(model, **option)
    assert str(caught.value).startswith(message)
    assert toys.same_snapshot(before, toys.snapshot(model))


def test_names_of_specs_choose_whose_models_are_patched(apply, model):
    before = toys.snapshot(model)
    with pytest.raises(UnsupportedModelError) as caught:
        apply(model, only=["diffusers/wan", "diffusers/flux"])
    assert str(caught.value) == "only: no model is for `diffusers/flux` or `diffusers/wan`; there are: model (toy)"
    assert toys.same_snapshot(before, toys.snapshot(model))
    with apply(model, only=["toy", "rope"]) as handle:
        assert {row.kind for row in handle.stats()} == {"rope"}


def test_a_kind_that_no_spec_has_is_told(tmp_path, model):
    before = toys.snapshot(model)
    with pytest.raises(DitPatchError, match="nothing to patch: no site of kind mask of toy is in model"):
        toys.patch(model, tmp_path, "- {at: table.forward, kind: rope, key: {x: [shape]}}", only="mask")
    assert toys.same_snapshot(before, toys.snapshot(model))


def test_a_spec_of_which_nothing_is_in_the_model_is_told(tmp_path, model):
    with pytest.raises(DitPatchError, match="nothing to patch: no site of toy is in model"):
        toys.patch(model, tmp_path, "- {at: image.forward, kind: context, optional: true}")


def test_specs_may_be_a_path_a_list_or_a_generator(apply, specs):
    for given_specs in (specs, str(specs), [specs], (each for each in [specs])):
        assert apply(toys.build(), specs=given_specs).stats()


# Twice.


def test_applying_again_returns_the_same_handle_and_patches_nothing_twice(apply, model):
    handle = apply(model)
    run(model)
    assert apply(model) is handle
    assert apply(pipeline(transformer=model)) is handle
    run(model, count=1)
    assert hits(handle)["table.forward"] == 3
    assert not isinstance(model.table.forward.__wrapped__, layers.Wrapped)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"only": "rope"}, "only: not given then, `rope` now"),
        ({"max_bytes": 5000}, "max_bytes: `268435456` then, `5000` now"),
        ({"check": "always", "fixes": True}, "check: `first` then, `always` now; fixes: `False` then, `True` now"),
    ],
)
def test_applying_with_other_options_is_an_error_that_says_which(apply, model, other, difference):
    handle = apply(model)
    with pytest.raises(DitPatchError) as caught:
        apply(model, **other)
    first, second = str(caught.value).splitlines()
    assert first == f"already patched with other options: {difference}" and "dit_patch.remove(...)" in second
    handle.remove()
    assert apply(model, **other) is not handle


def test_a_pipeline_of_which_one_model_has_another_handle_is_an_error(apply):
    one, other = toys.build(), toys.build()
    apply(one)
    before = toys.snapshot(other)
    with pytest.raises(DitPatchError, match="some of these models are patched by another handle"):
        apply(pipeline(transformer=one, transformer_2=other))
    assert toys.same_snapshot(before, toys.snapshot(other))
    apply(other)
    with pytest.raises(DitPatchError, match="another handle"):
        apply(pipeline(transformer=one, transformer_2=other))


def test_two_models_have_handles_of_their_own(apply):
    one, other = toys.build(), toys.build()
    first, second = apply(one), apply(other)
    assert first is not second
    run(one), run(other, count=5)
    assert (hits(first)["forward:shift"], hits(second)["forward:shift"]) == (2, 4)
    first.remove()
    assert torch.equal(run(other), run(one))
    assert hits(second)["forward:shift"] == 7


# The way back.


def test_removing_leaves_every_module_as_it_was(apply, model):
    before, shift = toys.snapshot(model), toys.shift
    handle = apply(model)
    assert not toys.same_snapshot(before, toys.snapshot(model))
    expected = run(model)
    made = {name: module._made for name, module in model.named_children() if hasattr(module, "_made")}
    handle.remove()
    after = toys.snapshot(model)
    for _, attributes in (*before, *after):  # what the forwards themselves changed
        attributes.pop("seen", None), attributes.pop("_made", None)
    assert toys.same_snapshot(before, after)
    assert toys.shift is shift
    assert torch.equal(run(model), expected)
    assert model.table._made == made["table"] + 3


def test_removing_twice_is_harmless_and_the_report_stays(apply, model):
    handle = apply(model)
    run(model)
    handle.remove(), handle.remove()
    assert hits(handle)["table.forward"] == 2
    assert handle.nbytes == 0 and "table.forward" in str(handle)
    assert scope_of(model) is None
    again = apply(model)
    assert again is not handle
    handle.remove()
    assert apply(model) is again
    run(model)
    assert hits(again)["table.forward"] == 2


def test_a_with_statement_takes_it_back_even_when_the_body_raises(model, specs):
    before = toys.snapshot(model)
    with pytest.raises(ZeroDivisionError), dit_patch.apply(model, specs=specs) as handle:
        assert scope_of(model) is not None and handle.stats()
        raise ZeroDivisionError
    assert toys.same_snapshot(before, toys.snapshot(model))


def test_clearing_forgets_results_and_keeps_counters(apply, model):
    handle = apply(model)
    run(model)
    assert handle.nbytes > 0
    handle.clear()
    assert handle.nbytes == 0
    made = model.table._made
    run(model, count=1)
    assert model.table._made == made + 1
    assert (hits(handle)["table.forward"], toys.row(handle, "table.forward").misses) == (2, 2)


def test_removing_in_the_middle_of_a_forward(apply, model):
    handle = apply(model)
    hook = model.time.register_forward_hook(lambda *_: handle.remove())
    assert torch.equal(run(model, count=1), run(toys.build()))
    hook.remove()
    assert not model._forward_hooks
    assert torch.equal(run(model), run(toys.build()))


def test_a_removed_handle_lets_go_of_the_results(apply, model):
    handle = apply(model)
    run(model)
    gone = weakref.ref(model.seen)
    del model.seen
    assert gone() is not None
    handle.remove()
    assert gone() is None


# Whole or nothing.


@pytest.mark.parametrize(
    "bad",
    [
        "{at: nothing.forward, kind: rope}",
        "{at: embed.forward, kind: context, key: {nothing: [shape]}}",
        "{at: 'forward:nothing', kind: rotary}",
        "{at: time.forward, kind: timestep, use: 'toys:nothing', source: '000000000000'}",
        "{at: embed..nothing, kind: mask}",
    ],
)
def test_a_site_that_fails_leaves_nothing_patched(tmp_path, bad):
    one, other = toys.build(), toys.build(toys.Twice)
    toys.write_spec(
        tmp_path, "- {at: time.forward, kind: timestep, key: {t: [identity]}}", model="toys.Twice", name="good"
    )
    good = (
        "- {at: table.forward, kind: rope, key: {x: [shape]}}\n- {at: 'toys:shift', kind: rotary, key: {x: [values]}}"
    )
    toys.write_spec(tmp_path, f"{good}\n- {bad}", name="toy")
    before = toys.snapshot(one), toys.snapshot(other)
    with pytest.raises(SiteError):
        dit_patch.apply(pipeline(good=other, bad=one), specs=tmp_path, trust=True)
    assert toys.same_snapshot(before[0], toys.snapshot(one)) and toys.same_snapshot(before[1], toys.snapshot(other))


def test_a_failure_while_installing_leaves_nothing_patched(specs, model, monkeypatch):
    before, install = toys.snapshot(model), layers.install
    installed = []

    def failing(owner, name, wrapper, installer=None):
        if len(installed) == 3:
            raise RuntimeError("the fourth")
        installed.append(install(owner, name, wrapper, installer))
        return installed[-1]

    monkeypatch.setattr(layers, "install", failing)
    with pytest.raises(RuntimeError, match="the fourth"):
        dit_patch.apply(model, specs=specs)
    assert len(installed) == 3
    assert toys.same_snapshot(before, toys.snapshot(model))


# Versions.


def versioned(tmp_path, model, *requires, **options):
    head = f"requires: [{', '.join(requires)}]\n"
    return toys.patch(model, tmp_path, "- {at: table.forward, kind: rope, key: {x: [shape]}}", head=head, **options)


def test_an_unverified_version_is_refused_when_strict(tmp_path, model):
    before = toys.snapshot(model)
    with pytest.raises(VersionError) as caught:
        versioned(tmp_path, model, "torch<2")
    assert str(caught.value) == (
        f"toy needs torch<2; {dit_patch_version('torch')} is installed. Pass strict=False to try anyway."
    )
    assert toys.same_snapshot(before, toys.snapshot(model))


def test_an_unverified_version_is_warned_of_when_not_strict(tmp_path, model):
    with pytest.warns(UserWarning, match=r"dit_patch: toy needs torch<2; .* is installed"):
        versioned(tmp_path, model, "torch<2", strict=False).remove()


def dit_patch_version(name):
    return __import__("importlib.metadata").metadata.version(name)


def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(tmp_path, model):
    with pytest.raises(
        VersionError, match="toy needs no-such-package>=1, which is not installed: pip install 'no-such-"
    ):
        versioned(tmp_path, model, "no-such-package>=1")


def test_versions_that_fit_pass_without_a_word(tmp_path, model):
    versioned(tmp_path, model, "torch>=2", "pyyaml").remove()


# Sites that are not reached, or were displaced.


def displaced(model):
    """As accelerate's remove_hook_from_module does: puts back what it once saved."""
    model.table.forward = types.MethodType(type(model.table).forward, model.table)


def test_a_displaced_site_is_told_once_and_applying_again_mends_it(apply, model):
    handle = apply(model)
    run(model)
    displaced(model)
    with pytest.warns(UserWarning) as seen:
        run(model)
    assert [str(each.message) for each in seen] == [
        "dit_patch: table.forward was not reached in Toy.forward; something replaced it after apply()\n"
        "    (accelerate's remove_hook_from_module does). Call dit_patch.apply(...) again."
    ]
    assert toys.row(handle, "table.forward").notes == ("displaced by another library; apply() again",)
    before = hits(handle)["table.forward"]
    assert apply(model) is handle
    assert toys.row(handle, "table.forward").notes == ()
    run(model)
    assert hits(handle)["table.forward"] > before
    displaced(model)
    with pytest.warns(UserWarning, match="was not reached"):
        run(model)
    handle.remove()
    del model.table.forward
    assert torch.equal(run(model), run(toys.build()))


def test_a_site_that_a_forward_does_not_come_by_is_told_once(apply, model):
    handle = apply(model)
    short = {"text": None, "mask": None}
    with pytest.warns(UserWarning) as seen:
        run(model, **short)
    assert sorted(str(each.message) for each in seen) == [
        f"dit_patch: {at} was not reached in Toy.forward; this forward does not call it, so nothing of it is cached."
        for at in ("embed..blocks.0", "embed.forward")
    ]
    assert toys.row(handle, "embed.forward").notes == ("not reached",)


def test_an_optional_site_may_be_passed_by(tmp_path, model):
    with toys.patch(model, tmp_path, "- {at: embed.forward, kind: context, key: {text: [identity]}, optional: true}"):
        run(model, text=None)


def test_a_forward_that_raises_tells_nothing_of_what_it_did_not_reach(apply, model):
    apply(model)
    with pytest.raises(AttributeError):
        model(None)


# The report.


def test_the_report(apply, model):
    handle = apply(model)
    run(model)
    text = re.sub(r"\d+\.\d ms", "0.1 ms", str(handle))
    assert (
        text
        == """\
dit_patch: lossless, 0.00 MiB cached of 256.00 MiB
model  Toy  spec toy
  kind      site               hits  misses  bypassed        held  saved
  rope      table.forward         2       1         -    0.00 MiB  0.1 ms
  timestep  time.forward          2       1         -    0.00 MiB  0.1 ms
  context   embed.forward         2       1         -    0.00 MiB  0.1 ms
  mask      embed..blocks.0       8       4         -    0.00 MiB  0.1 ms
  rotary    forward:shift         2       1         -    0.00 MiB  0.1 ms"""
    )


def test_the_report_says_what_never_hits_and_why(apply, model):
    handle = apply(model)
    run(model, count=1), run(model, count=1)
    assert """
  timestep  time.forward          0       2         -    0.00 MiB  0.0 ms
              never hit: the timestep is a new tensor at each forward, as it is without CFG
  context   embed.forward         0       2         -    0.00 MiB  0.0 ms
              never hit: the conditioning is a new tensor at each forward
""" in str(handle)


def test_the_report_says_what_was_given_up_for_others(apply, model):
    handle = apply(model, only="timestep", max_bytes=40)
    calls = [given() for _ in range(9)]
    for call in calls:
        with torch.no_grad():
            model(**call)
    assert "2 results given up for others; a larger max_bytes would keep them" in str(handle)
    assert toys.row(handle, "time.forward").evictions == 2


def test_the_report_says_why_calls_were_passed_through(apply, model):
    handle = apply(model, max_bytes=40)
    model(**given())
    run(model)
    text = str(handle)
    assert "bypassed 1: autograd is recording" in text
    assert "bypassed 3: no room beside what the last forwards used; a larger max_bytes would keep it" in text
    row = toys.row(handle, "embed.forward")
    assert row.bypassed == {"autograd is recording": 1, "a result of 0.0 MiB is larger than max_bytes": 3}
    assert re.search(r"embed.forward +0 +3 +4 ", text)


def test_the_bytes_held_are_those_of_the_results(apply, model):
    handle = apply(model, only=("rope", "timestep"))
    run(model, count=1)
    rows = {row.at: row.nbytes for row in handle.stats()}
    assert rows == {"table.forward": 4 * 4, "time.forward": 2 * 4 * 4}
    assert handle.nbytes == sum(rows.values())


def test_columns_are_aligned_for_every_model(apply):
    handle = apply(pipeline(transformer=toys.build(), transformer_2=toys.build()))
    text = str(handle)
    assert text.count("  kind      site  ") == 2
    assert "transformer  Toy  spec toy" in text and "transformer_2  Toy  spec toy" in text
    header, *rows = [line for line in text.splitlines() if line.startswith("  ")][:6]
    for column in ("hits", "misses", "bypassed", "held"):
        end = header.index(column) + len(column)
        assert all(row[end : end + 2] == "  " and row[end - 1] != " " for row in rows), column


# A real pipeline.

diffusers = pytest.importorskip("diffusers")


def wan():
    spec = Registry(plugins=False).get("diffusers/wan")
    return spec, spec.mini.case()


def wan_pipeline(*seeds):
    spec, case = wan()
    names = ["transformer", "transformer_2"]
    models = {name: mini.build(spec, case, seed=seed) for name, seed in zip(names, seeds)}
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        boundary_ratio=0.875 if len(models) > 1 else None,
        **models,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt_embeds=torch.randn(1, 6, 16, generator=generator),
        negative_prompt_embeds=torch.randn(1, 6, 16, generator=generator),
        latents=torch.randn(1, 4, 2, 4, 4, generator=generator),
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=6,
        output_type="latent",
    ).frames


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["one transformer", "two transformers"])
def test_a_diffusers_pipeline_gives_the_same_latents_with_its_sites_hit(seeds):
    pipe = wan_pipeline(*seeds)
    expected = generate(pipe)
    before = [toys.snapshot(model) for model in find_models(pipe).values()]
    with dit_patch.apply(pipe) as handle:
        assert same_bits(generate(pipe), expected)
        assert same_bits(generate(pipe), expected)
        assert list(handle.models) == ["transformer", "transformer_2"][: len(seeds)]
        for name in handle.models:
            rows = {row.at: row for row in handle.stats() if row.model == name}
            assert rows["rope.forward"].hits > 0 and rows["condition_embedder.text_embedder.forward"].hits > 0
            assert rows["condition_embedder.time_embedder.forward"].hits > 0
            assert not any(row.bypassed for row in rows.values())
    after = [toys.snapshot(model) for model in find_models(pipe).values()]
    assert all(map(toys.same_snapshot, before, after))
    assert same_bits(generate(pipe), expected)


def test_a_subclass_of_a_diffusers_model_with_a_forward_of_its_own():
    spec, case = wan()

    class Mine(diffusers.WanTransformer3DModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = Mine(**case.config).eval()
    calls = list(mini.forwards(case, case.sizes[0], steps=2))
    expected = verify.run(model, calls)
    with dit_patch.apply(model, only=("rope", "context")) as handle:
        assert verify.first_difference(verify.run(model, calls), expected) is None
        assert hits(handle)["rope.forward"] == 3


def test_the_signature_of_what_is_patched_stays():
    spec, case = wan()
    model = mini.build(spec, case)
    before = {
        site.at: inspect.signature(model.get_submodule(site.at.rpartition(".")[0]).forward) for site in spec.sites[:5]
    }
    with dit_patch.apply(model):
        for at, signature in before.items():
            assert inspect.signature(model.get_submodule(at.rpartition(".")[0]).forward) == signature
