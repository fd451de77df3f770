"""A module that is replaced after apply(): noticed at the next forward, said once, and patched again by apply()."""

from __future__ import annotations

import pytest
import stepping
import torch

import dit_patch
from dit_patch.findings import DitPatchWarning, FindingKind
from dit_patch.sites import patch


class Linear(torch.nn.Linear):
    """What stands for a Linear after it was quantised."""

    def forward(self, x):
        return super().forward(x) * 1.0


class Nested(torch.nn.Module):
    """A model with a layer in a container."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.ModuleDict({"first": torch.nn.Linear(4, 4)})

    def forward(self, x):
        return self.embed["first"](x)


def another_rope(model):
    torch.manual_seed(1)
    model.rope = type(model.rope)(12, (1, 2, 2), 32, theta=500.0)


def quantised(model):
    embedder = model.condition_embedder
    layer = Linear(embedder.time_proj.in_features, embedder.time_proj.out_features)
    layer.load_state_dict(embedder.time_proj.state_dict())
    embedder.time_proj = layer.eval()


def a_whole_embedder(model):
    torch.manual_seed(2)
    fresh = type(model)(**dict(model.config)).condition_embedder.eval()
    model.condition_embedder = fresh


REPLACEMENTS = {
    "rope": (another_rope, {"rope.forward"}),
    "one Linear": (quantised, {"condition_embedder.time_proj.forward"}),
    "all embedders": (
        a_whole_embedder,
        {
            f"condition_embedder.{name}.forward"
            for name in ("timesteps_proj", "time_embedder", "time_proj", "text_embedder")
        },
    ),
}


@pytest.mark.parametrize("replace, sites", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_it_is_said_once_and_repaired_by_applying_again(wan, replace, sites):
    handle, calls = wan.apply(), wan.calls()
    wan.agree(calls), wan.agree(calls)
    for model in wan.both:
        replace(model)
    with pytest.warns(UserWarning, match="another module in its place since apply") as said:
        wan.agree(calls)
    assert {each.message.finding.site for each in said} == sites
    assert {each.message.finding.kind for each in said} == {FindingKind.REPLACED}
    hits = wan.agree(calls)  # and no other warning
    assert not sites & set(+hits)
    assert all("another module stands in its place" in row.notes[0] for row in handle.stats() if row.at in sites)
    assert dit_patch.apply(wan.model) is handle
    wan.agree(calls)
    hits = wan.agree(calls)
    assert sites <= set(+hits)
    assert not any("another module" in note for row in handle.stats() for note in row.notes)


def test_what_was_replaced_is_let_go_after_the_repair(wan):
    import gc
    import weakref

    wan.apply()
    calls = wan.calls()
    wan.agree(calls)
    gone = weakref.ref(wan.model.rope)
    for model in wan.both:
        another_rope(model)
    with pytest.warns(UserWarning, match="another module"):
        wan.agree(calls)
    dit_patch.apply(wan.model)
    wan.agree(calls)
    gc.collect()
    assert gone() is None


def test_what_another_person_s_program_replaces_is_repaired_by_itself(wan):
    handle, calls = wan.apply(), wan.calls()
    handle.is_automatic = True
    wan.agree(calls)
    for model in wan.both:
        another_rope(model)
    wan.agree(calls)
    wan.agree(calls)
    assert wan.agree(calls)["rope.forward"] == len(calls)


def test_modules_are_looked_for_only_where_something_has_changed(tiny, monkeypatch):
    """CogVideoX without RoPE reaches one site less: where its module is now is no question for each forward."""
    looked = []
    find_path = patch.find_path
    monkeypatch.setattr(patch, "find_path", lambda *given: looked.append(given) or find_path(*given))
    model = tiny("diffusers/cogvideox")
    model.apply()
    calls = model.calls()
    assert looked
    looked.clear()
    model.agree(calls)
    model.agree(calls)
    assert not looked


@pytest.mark.parametrize("replace", ["itself", "what it is in"])
def test_a_site_that_keeps_nothing_is_noticed_too(patched, replace):
    model, _, handle = patched("  - {at: embed.first.forward, kind: kv_cache, then: 'builtins:abs'}", cls=Nested)
    with torch.no_grad():
        model(torch.ones(4))
        if replace == "itself":
            model.embed.first = torch.nn.Linear(4, 4)
        else:
            model.embed = Nested().embed
        with pytest.warns(UserWarning, match="embed.first.forward: Nested has another module in its place"):
            model(torch.ones(4))


def test_a_module_inside_what_was_put_around_it_is_still_there_and_searched_for_once(patched, monkeypatch):
    model, _, handle = patched("  - {at: embed.first.forward, kind: kv_cache, then: 'builtins:abs'}", cls=Nested)
    [site] = handle.patched_models[0].patches
    searched, find_path = [], patch.find_path
    monkeypatch.setattr(patch, "find_path", lambda *given: searched.append(given) or find_path(*given))
    model.embed.first = torch.nn.Sequential(model.embed.first)
    assert not site.is_replaced and not site.is_replaced
    assert len(searched) == 1
    model.embed.first = model.embed.first[0]
    assert not site.is_replaced
    model.embed.first = torch.nn.Linear(4, 4)
    assert site.is_replaced and site.is_replaced


def test_nothing_is_left_of_the_patches_of_a_replaced_module(wan):
    wan.apply()
    calls = wan.calls()
    wan.agree(calls)
    old = wan.model.rope
    for model in wan.both:
        another_rope(model)
    with pytest.warns(UserWarning, match="another module"):
        wan.agree(calls)
    dit_patch.apply(wan.model)
    assert "forward" not in vars(old)
    wan.handle.remove()
    assert "forward" not in vars(wan.model.rope)


def test_another_model_in_the_pipeline_is_said_once_and_patched_by_applying_again():
    pipeline, other = stepping.wan(), stepping.wan(seed=1).transformer
    handle = dit_patch.apply(pipeline)
    stepping.latents(pipeline, 2)
    pipeline.transformer = other
    with pytest.warns(UserWarning, match="the pipeline has another transformer since apply") as said:
        expected = stepping.latents(pipeline, 2)
    ours = [each.message.finding.kind for each in said if isinstance(each.message, DitPatchWarning)]
    assert ours == [FindingKind.MODEL_REPLACED]
    assert all("another WanTransformer3DModel since apply()" in row.notes[0] for row in handle.stats())
    stepping.latents(pipeline, 2)  # and no other warning
    with dit_patch.apply(pipeline) as fresh:
        assert torch.equal(stepping.latents(pipeline, 2), expected)
        assert sum(row.hits for row in fresh.stats()) > 0
    handle.remove()
    assert "maybe_free_model_hooks" not in vars(pipeline)


def test_one_of_two_experts_that_is_exchanged_is_patched_by_the_same_handle():
    pipeline, plain = stepping.wan22(), stepping.wan22()
    kept, old = pipeline.transformer, pipeline.transformer_2
    with dit_patch.apply(pipeline) as handle:
        pipeline.transformer_2 = stepping.wan22(seed=1).transformer_2
        plain.transformer_2 = stepping.wan22(seed=1).transformer_2
        expected = stepping.latents(plain, 4)
        with pytest.warns(UserWarning, match="the pipeline has another transformer_2 since apply"):
            assert torch.equal(stepping.latents(pipeline, 4), expected)
        assert dit_patch.apply(pipeline) is handle
        assert handle.models == {"transformer": kept, "transformer_2": pipeline.transformer_2}
        assert torch.equal(stepping.latents(pipeline, 4), expected)
        assert {row.model for row in handle.stats() if row.hits} == {"transformer", "transformer_2"}
        assert not any(row.notes and "since apply" in row.notes[0] for row in handle.stats())
        assert "forward" not in vars(old)
    for model in (*handle.models.values(), old):
        assert not model._forward_pre_hooks and not any("forward" in vars(each) for each in model.modules())


def test_a_model_that_was_wrapped_or_taken_out_is_no_other():
    pipeline = stepping.wan()
    model = pipeline.transformer
    with dit_patch.apply(pipeline) as handle:
        for put in (torch.nn.Sequential(model), None):
            pipeline.transformer = put
            pipeline.maybe_free_model_hooks()
        assert not any(row.notes and "since apply" in row.notes[0] for row in handle.stats())


def test_a_model_that_cannot_be_patched_in_the_place_of_another_leaves_the_rest_as_it_was():
    pipeline = stepping.wan22()
    kept, old = pipeline.transformer, pipeline.transformer_2
    with dit_patch.apply(pipeline) as handle:
        pipeline.transformer_2 = stepping.wan22(seed=1).transformer_2
        del pipeline.transformer_2.rope
        with pytest.raises(dit_patch.SiteError):
            dit_patch.apply(pipeline)
        assert handle.models == {"transformer": kept, "transformer_2": old}
        assert not any("forward" in vars(each) for each in pipeline.transformer_2.modules())
