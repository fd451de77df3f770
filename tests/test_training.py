"""Training a patched model: the gradients, the losses and the steps of the unpatched one, after whatever inference."""

import pytest
import torch
from peft import LoraConfig

from dit_patch.contribute import verify

AUTOGRAD = "autograd is recording"
TRAINING = "the module is in training mode; call `.eval()`"


def step(model, call) -> dict[str, torch.Tensor]:
    """One backward pass: the gradient of every parameter, and of the arguments that want one."""
    model.zero_grad(set_to_none=True)
    for value in call.values():
        if isinstance(value, torch.Tensor):
            value.grad = None
    model(**call)[0].float().square().mean().backward()
    named = dict(model.named_parameters())
    named |= {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    return {name: value.grad.clone() for name, value in named.items() if value.grad is not None}


def assert_same_gradients(tiny, calls) -> dict[str, torch.Tensor]:
    for call in calls:
        ours, theirs = step(tiny.model, call), step(tiny.plain, call)
        assert ours.keys() == theirs.keys() != set()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    return ours


def prompt_projection(gradients) -> list[str]:
    return [name for name in gradients if "text_embedder" in name]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_after_inference(each, mode, train, checkpointing):
    calls = each.calls()
    each.apply()
    with mode():
        for call in calls:
            each.model(**call)
    assert each.hits()["rope.forward"] == len(calls) - 1
    for model in each.both:
        model.train(train)
        if checkpointing:
            model.enable_gradient_checkpointing()
    gradients = assert_same_gradients(each, calls)
    assert prompt_projection(gradients)
    assert TRAINING in each.reasons() if train else AUTOGRAD in each.reasons()
    assert each.hits()["rope.forward"] == 2 * len(calls) - 1 - train, "what has no weights may be reused in training"


def test_inference_after_steps_of_an_optimizer(each):
    """Evaluation in between: each sees the weights of its own moment."""
    calls = each.calls()
    each.apply()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in each.both]
    for call in calls:
        each.agree(calls)
        for model, optimizer in zip(each.both, optimizers):
            model.train()
            step(model, call)
            optimizer.step()
            model.eval()
    assert each.agree(calls) and each.agree(calls)["rope.forward"] == len(calls)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_inference_after_foreach_and_fused_steps(each, kind, train):
    """A fused step writes to the weights without a trace: no new tensor, storage or version."""
    calls = each.calls()
    each.apply()
    for _ in range(2):
        each.agree(calls)
        for model in each.both:
            model.train(train)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **{kind: True})
            step(model, calls[0])
            optimizer.step()
            model.eval()
    each.agree(calls)
    assert each.agree(calls)


def test_only_the_prompt_is_trained(each):
    """As in textual inversion: frozen weights, and a gradient for the prompt."""
    calls = each.calls()
    each.apply()
    each.agree(calls)
    for model in each.both:
        model.requires_grad_(False)
    for call in calls:
        call["encoder_hidden_states"].requires_grad_()
    gradients = assert_same_gradients(each, calls)
    assert set(gradients) == {"encoder_hidden_states"}
    assert AUTOGRAD in each.reasons()


def test_only_the_latents_are_trained(each):
    """As in guidance by a loss: what is frozen is reused, and the gradient goes through the rest."""
    calls = each.calls()
    each.apply()
    each.agree(calls)
    before = each.hits()
    for model in each.both:
        model.requires_grad_(False)
    for call in calls:
        call["hidden_states"].requires_grad_()
    gradients = assert_same_gradients(each, calls)
    assert set(gradients) == {"hidden_states"}
    gained = each.hits() - before
    assert {site.kind for site in each.spec.sites if gained[site.at]} >= {"rope", "timestep", "context"}


@pytest.mark.parametrize("where", ["to_q", "linear_1"])
def test_only_an_adapter_is_trained(each, where):
    """Outside the sites, and inside some."""
    calls = each.calls()
    each.apply()
    each.agree(calls)
    for model in each.both:
        model.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.add_adapter(LoraConfig(r=2, target_modules=[where], init_lora_weights=False))
    gradients = assert_same_gradients(each, calls)
    assert gradients and all("lora_" in name and where in name for name in gradients)
    each.agree(calls)


def test_a_model_in_train_mode_reuses_what_has_no_weights(each):
    for model in each.both:
        model.train()
    each.apply()
    calls = each.calls()
    hits = each.agree(calls)
    assert hits["rope.forward"] == len(calls) - 1
    assert TRAINING in each.reasons()
    assert not any(hits[site.at] for site in each.spec.sites if site.kind == "context")


def test_two_forwards_before_one_backward(each):
    calls = each.calls()
    each.apply()

    def gradients(model):
        model.zero_grad(set_to_none=True)
        sum(model(**call)[0].mean() for call in calls).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    for _ in range(2):
        ours, theirs = gradients(each.model), gradients(each.plain)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class TestInferenceMode:
    def test_what_it_cached_serves_ordinary_forwards_and_the_reverse(self, each):
        calls = each.calls()
        each.apply()
        with torch.inference_mode():
            each.agree(calls)
        hits = each.agree(calls)
        assert hits["rope.forward"] == len(calls)
        with torch.inference_mode():
            assert each.agree(calls) == hits

    def test_nothing_of_it_is_an_inference_tensor(self, wan):
        wan.apply()
        with torch.inference_mode():
            wan.model(**wan.calls()[0])
            assert not any(table.is_inference() for table in wan.model.rope(wan.calls()[0]["hidden_states"]))

    def test_sites_whose_weights_were_made_in_it_are_passed_through(self, each):
        calls = each.calls()
        each.apply()
        with torch.inference_mode():
            for model in each.both:
                model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, assign=True)
            each.agree(calls)
            for model in each.both:
                for parameter in model.parameters():
                    parameter.mul_(1.25)
            each.agree(calls)
        assert any("inference_mode have no version" in reason for reason in each.reasons())


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_switched_on_and_off_with_the_same_tensors(self, each, dtype):
        calls = each.calls()
        each.apply()

        def outputs(model):
            results = []
            for call in (*calls, *calls):
                for enabled in (True, False):
                    with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                        results += verify.run(model, [call])
            return results

        assert verify.first_difference(outputs(each.model), outputs(each.plain)) is None
        assert each.hits()["rope.forward"] == 4 * len(calls) - 2
        assert any(each.hits()[site.at] for site in each.spec.sites if site.kind == "context")

    def test_two_dtypes_are_not_mixed_up(self, each):
        calls = each.calls()
        each.apply()
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype=dtype):
                each.agree(calls)

    def test_training_in_it_after_inference_in_it(self, each):
        """Under one autocast, whose own cache of cast weights must not come from our computing without autograd."""
        calls = each.calls()
        each.apply()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.inference_mode():
                for call in calls:
                    each.model(**call)
            ours = step(each.model, calls[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = step(each.plain, calls[0])
        assert ours.keys() == theirs.keys() and prompt_projection(ours)
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
