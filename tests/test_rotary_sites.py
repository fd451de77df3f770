"""Rotary sites on real models: whose calls they take, when they leave them to the original, and what stays behind."""

import gc
import re
import types

import pytest
import torch
from conftest import Tiny
from diffusers.models import embeddings
from diffusers.models.transformers import transformer_wan

import dit_patch
from dit_patch.contribute import verify
from dit_patch.functions import rotary as functions
from dit_patch.sites import replaced

WAN = "diffusers.models.transformers.transformer_wan:WanAttnProcessor.__call__.<locals>.apply_rotary_emb"
HUNYUAN = "diffusers.models.embeddings:apply_rotary_emb"
AUTOGRAD = "autograd is recording"
LAYERS = 2


@pytest.fixture(autouse=True)
def libraries_as_they_were():
    def state():
        code = transformer_wan.WanAttnProcessor.__call__.__code__
        return code, set(vars(transformer_wan)), vars(embeddings)["apply_rotary_emb"]

    gc.collect()  # what tests before this one left behind
    before = state()
    yield
    assert state() == before


@pytest.fixture(params=["diffusers/wan", "diffusers/hunyuan_video"])
def rotated(request, tiny) -> tuple[Tiny, str]:
    """A model, and the address of its site."""
    return tiny(request.param), WAN if request.param == "diffusers/wan" else HUNYUAN


def row(handle, at):
    return next(row for row in handle.stats() if row.at == at)


def test_every_call_in_the_model_is_taken_and_none_in_another_of_its_class(wan):
    calls = wan.calls()
    handle = wan.apply(only=["rotary"])
    assert wan.agree(calls) == {WAN: 2 * LAYERS * len(calls)}
    verify.run(wan.plain, calls)
    assert wan.hits() == {WAN: 2 * LAYERS * len(calls)}
    assert [each.kind for each in handle.stats()] == ["rotary"]
    [line] = [line.split() for line in str(handle).splitlines() if line.startswith("  rotary")]
    assert line[1:3] == ["transformer_wan:WanAttnProcessor...apply_rotary_emb", str(2 * LAYERS * len(calls))]


def test_two_models_have_a_site_each_and_they_come_off_in_any_order(tiny):
    for first in (0, 1):
        two = [tiny("diffusers/wan"), tiny("diffusers/wan", "i2v")]
        for each in two:
            each.apply(only=["rotary"])
        for each in two:
            assert each.agree(each.calls())[WAN] == 2 * LAYERS * 4
        two.pop(first).handle.remove()
        [other] = two
        assert other.agree(other.calls())[WAN] == 2 * LAYERS * 4
        other.handle.remove()


def test_training_is_left_to_the_original_and_the_report_says_so(rotated):
    each, at = rotated
    handle = each.apply(only=["rotary"])
    call = each.calls()[0]
    losses = [model(**call)[0].square().mean() for model in each.both]
    for loss in losses:
        loss.backward()
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in each.both]
    assert gradients[0].keys() == gradients[1].keys() and all(
        torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0]
    )
    assert row(handle, at).hits == 0 and set(row(handle, at).bypassed) == {AUTOGRAD}
    assert AUTOGRAD in str(handle)
    assert each.agree(each.calls())[at] > 0


def test_another_version_of_the_original_is_used_itself_with_one_warning(hunyuan, monkeypatch):
    def apply_rotary_emb(x, freqs_cis, use_real=True, use_real_unbind_dim=-1, sequence_dim=2):
        return x * 2  # of another day

    monkeypatch.setattr(embeddings, "apply_rotary_emb", apply_rotary_emb)
    with pytest.warns(UserWarning, match=f"{HUNYUAN} .* was written for 36dc1dacb1c9, eeccf970fb89; the original is"):
        handle = hunyuan.apply()
    hunyuan.agree(hunyuan.calls())
    assert row(handle, HUNYUAN).targets == 0 and "another version of the original" in str(handle)
    handle.remove()
    monkeypatch.undo()


def test_one_that_does_not_give_the_original_s_bits_is_switched_off_with_one_warning(rotated, monkeypatch):
    each, at = rotated

    def off_by_one_bit(x, *args, **kwargs):
        out = turn(x, *args, **kwargs)
        out.view(torch.int32).flatten()[7] ^= 1
        return out

    turn = functions.turn
    monkeypatch.setattr(functions, "turn", off_by_one_bit)
    handle = each.apply()
    with pytest.warns(UserWarning, match="is not equal to the original here; the original is used") as warned:
        each.agree(each.calls())
    assert len([each for each in warned if "not equal" in str(each.message)]) == 1
    assert "its replacement is not equal to the original" in str(handle)


@pytest.mark.parametrize("check", ["first", "never"])
def test_a_kernel_that_cannot_be_compiled_here_is_told_of_once_and_done_without(rotated, monkeypatch, check):
    each, at = rotated

    def no_compiler(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler.\nPlease specify it.")

    monkeypatch.setattr(functions, "rotary", no_compiler)
    handle = each.apply(check=check)
    why = "failed (RuntimeError: Failed to find C compiler.)"
    with pytest.warns(UserWarning, match=re.escape(f"{why}; the original is used")) as warned:
        assert at not in each.agree(each.calls())
    assert len([each for each in warned if why in str(each.message)]) == 1
    assert f"its replacement {why}" in str(handle)


def test_out_of_memory_is_the_caller_s_to_know_and_no_reason_to_do_without(wan, monkeypatch):
    handle = wan.apply(only=["rotary"])

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("not enough")

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        patched.setattr(functions, "rotary", full)
        wan.model(**wan.calls()[0])
    assert wan.agree(wan.calls())[WAN] and "failed" not in str(handle)


def test_each_new_layout_is_compared_once_and_with_check_always_each_call(rotated, monkeypatch):
    each, at = rotated
    compared = []
    same = replaced.same
    monkeypatch.setattr(replaced, "same", lambda one, two: compared.append(one.shape) or same(one, two))
    handle = each.apply(only=["rotary"])
    hits = each.agree(each.calls())
    first = len(compared)
    # What is ready for more of a signature is compared, too; HunyuanVideo's single-stream blocks pass a slice.
    assert hits[at] > first == (2 if at == WAN else 4)
    each.agree(each.calls())
    assert len(compared) == first
    each.agree(each.calls(size=2))
    assert len(compared) == 2 * first
    handle.remove()
    compared.clear()
    each.apply(only=["rotary"], check="always")
    hits = each.agree(each.calls())
    assert len(compared) == 2 * hits[at]


def test_a_processor_of_one_s_own_is_told_of_not_silently_passed_by(wan):
    class Mine(transformer_wan.WanAttnProcessor):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    handle = wan.apply(only=["rotary"])
    for model in wan.both:
        for block in model.blocks:
            block.attn1.processor = Mine()
    with pytest.warns(UserWarning, match="apply_rotary_emb was not reached in WanTransformer3DModel.forward"):
        wan.agree(wan.calls())
    assert "not reached" in str(handle)


def test_fused_projections_whose_queries_are_strided_agree(wan):
    wan.apply()
    for model in wan.both:
        model.fuse_qkv_projections()
    assert wan.agree(wan.calls())[WAN] == 2 * LAYERS * 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_cast_as_a_whole_rounds_the_products_of_its_tables_in_half_precision(tiny, mode):
    wan = tiny("diffusers/wan")
    for model in wan.both:
        model.to(torch.bfloat16)
    assert wan.model.rope.freqs_cos.dtype == torch.bfloat16
    wan.apply()
    calls = wan.calls(dtype=torch.bfloat16)
    with mode():
        ours, theirs = ([model(**call)[0] for call in calls] for model in wan.both)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs))
    assert wan.hits()[WAN] == 2 * LAYERS * len(calls)


def test_heads_that_are_too_wide_are_left_to_the_original_and_counted(tiny):
    from dit_patch.spec import mini
    from dit_patch.spec.registry import Registry

    spec = Registry(plugins=False).get("diffusers/wan")
    case = spec.mini.case()
    case.config["attention_head_dim"] = 264
    model, plain = (mini.build(spec, case) for _ in range(2))
    calls = list(mini.forwards(case, case.sizes[2], steps=1))
    with dit_patch.apply(model, only=["rotary"]) as handle:
        assert verify.first_difference(verify.run(plain, calls), verify.run(model, calls)) is None
        assert row(handle, WAN).bypassed == {
            "rotary_dim=264: an even number up to 256 is needed": 2 * LAYERS * len(calls)
        }


def test_the_processor_s_code_is_another_one_only_while_a_handle_is_there(wan, monkeypatch):
    def consts():
        return [
            each
            for each in transformer_wan.WanAttnProcessor.__call__.__code__.co_consts
            if isinstance(each, types.CodeType)
        ]

    before = consts()
    handle = wan.apply()
    assert consts() != before
    handle.remove()
    assert consts() == before
    monkeypatch.setattr(dit_patch.handle.Handle, "watch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        wan.apply()
    assert consts() == before
