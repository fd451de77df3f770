"""Weights and settings that change between two forwards with the very same inputs: nothing stale is used."""

import gc
import zlib
from operator import attrgetter

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from peft import LoraConfig
from torch.multiprocessing.reductions import StorageWeakRef

TARGETS = {
    "diffusers/wan": ["linear_1", "linear_2", "time_proj", "to_q", "to_k", "to_v"],
    "diffusers/hunyuan_video": ["linear_1", "linear_2", "proj_in", "to_q", "to_k"],
}
"""With layers inside cached modules, and layers that are a cached module themselves."""


def weights(tiny, kind):
    """(twin, module) for each submodule that a site of that kind belongs to, in both models."""
    for site in tiny.spec.sites:
        if site.kind == kind and site.at.endswith(".forward"):
            for model in tiny.both:
                module = attrgetter(site.at.removesuffix(".forward"))(model)
                if module is not None:
                    yield model, module


def add_lora(tiny, name="style", seed=0, targets=None):
    targets = targets or TARGETS[tiny.spec.name]
    for model in tiny.both:
        model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets), adapter_name=name)
        for path, parameter in model.named_parameters():
            if f".{name}." in path:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{path}{seed}".encode()))
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
                parameter.requires_grad_(False)
        model.eval()


def with_tensors(calls, change):
    """The calls with `change` made to their tensors; what was one tensor stays one."""
    made = {id(value): change(value) for call in calls for value in call.values() if isinstance(value, torch.Tensor)}
    return [{name: made.get(id(value), value) for name, value in call.items()} for call in calls]


def changed(tiny, calls, edit):
    """Whether `edit`, done to both models, changes what comes out; that both still agree is asserted."""
    with torch.no_grad():
        before = tiny.plain(**calls[0])[0]
        for model in tiny.both:
            edit(model)
        tiny.agree(calls)
        return not torch.equal(before, tiny.plain(**calls[0])[0])


@pytest.fixture
def calls(each):
    """Calls of a patched model that has cached all that there is to cache in them."""
    calls = each.calls()
    each.apply()
    each.agree(calls)
    hits = each.agree(calls)
    assert hits["rope.forward"] == len(calls) and sum(hits.values()) > 3 * len(calls)
    return calls


class TestEdits:
    @pytest.mark.parametrize("kind", ["timestep", "context"])
    def test_in_place_under_no_grad(self, each, calls, kind):
        with torch.no_grad():
            for _, module in weights(each, kind):
                for parameter in module.parameters():
                    parameter.mul_(1.5)
        each.agree(calls)
        assert each.agree(calls)

    @pytest.mark.parametrize("kind", ["timestep", "context"])
    def test_new_parameters(self, each, calls, kind):
        for _, module in weights(each, kind):
            for owner in module.modules():
                for name, parameter in list(owner._parameters.items()):
                    if parameter is not None:
                        setattr(owner, name, torch.nn.Parameter(parameter.detach() * 1.5))
        each.agree(calls)
        assert each.agree(calls)

    @pytest.mark.parametrize("kind", ["timestep", "context"])
    def test_new_data(self, each, calls, kind):
        for _, module in weights(each, kind):
            for parameter in module.parameters():
                parameter.data = parameter.data * 1.5
        each.agree(calls)
        assert each.agree(calls)

    def test_a_submodule_replaced_inside_a_site(self, each, calls):
        def edit(model):
            name = "condition_embedder" if each.spec.name == "diffusers/wan" else "time_text_embed"
            old = getattr(model, name).text_embedder.linear_2
            new = torch.nn.Linear(old.in_features, old.out_features)
            new.load_state_dict({key: 2 * value for key, value in old.state_dict().items()})
            getattr(model, name).text_embedder.linear_2 = new

        assert changed(each, calls, edit)
        assert each.agree(calls)

    @pytest.mark.parametrize("assign", [False, True])
    def test_a_state_dict_loaded(self, each, calls, assign):
        state = {key: value * 1.25 for key, value in each.plain.state_dict().items()}
        assert changed(each, calls, lambda model: model.load_state_dict(dict(state), assign=assign))
        assert each.agree(calls)


class TestDtype:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_there_and_back(self, each, calls, dtype):
        """Back in float32 the weights have other bits than before, under the same parameters and versions."""

        for model in each.both:
            model.to(dtype)
        cast = with_tensors(calls, lambda x: x.to(dtype) if x.dtype == torch.float32 else x)
        each.agree(cast)
        assert each.agree(cast)
        for model in each.both:
            model.to(torch.float32)
        each.agree(calls)
        assert each.agree(calls)["rope.forward"] == len(calls)

    def test_buffers_alone(self, wan):
        calls = wan.calls()
        wan.apply()
        wan.agree(calls)
        assert changed(wan, calls, lambda model: model.rope.to(torch.bfloat16))
        assert wan.agree(calls)["rope.forward"] == len(calls)


class TestSettings:
    def test_an_attribute_that_a_site_computes_with(self, hunyuan):
        calls = hunyuan.calls()
        hunyuan.apply()
        hunyuan.agree(calls)

        def another_theta(model):
            model.rope.theta = 100.0

        assert changed(hunyuan, calls, another_theta)
        assert hunyuan.agree(calls)["rope.forward"] == len(calls)

    def test_a_list_that_a_site_computes_with_changed_in_place(self, hunyuan):
        calls = hunyuan.calls()
        for model in hunyuan.both:
            model.rope.rope_dim = list(model.rope.rope_dim)
        hunyuan.apply()
        hunyuan.agree(calls)

        def other_dims(model):
            model.rope.rope_dim[:] = [4, 2, 4]

        assert changed(hunyuan, calls, other_dims)
        assert hunyuan.agree(calls)["rope.forward"] == len(calls)

    def test_the_precision_of_matrix_products(self, each, calls):
        before, warm = torch.get_float32_matmul_precision(), each.agree(calls)
        try:
            torch.set_float32_matmul_precision("medium")
            assert each.agree(calls).total() < warm.total(), "whatever has weights was computed anew"
        finally:
            torch.set_float32_matmul_precision(before)
        each.agree(calls)
        assert each.agree(calls) == warm


class TestThePrompt:
    def test_replaced_in_mid_run(self, each, calls):
        others = each.calls(steps=4, generation=1)
        prompts = [{"encoder_hidden_states": other["encoder_hidden_states"]} for other in others]
        mixed = [call | prompt for call, prompt in zip(calls, prompts)]
        each.agree(mixed)
        assert each.agree(calls)["rope.forward"] == len(calls)

    def test_edited_in_place_in_mid_run(self, each, calls):
        for call in calls[:2]:
            call["encoder_hidden_states"].mul_(0.5)
        each.agree(calls)
        assert each.agree(calls)

    def test_edited_in_place_through_a_view(self, each, calls):
        for call in calls[:2]:
            call["encoder_hidden_states"][:, 0].zero_()
        each.agree(calls)

    @pytest.mark.parametrize("name", ["timestep", "encoder_attention_mask", "pooled_projections", "guidance"])
    def test_any_other_conditioning_edited_in_place(self, hunyuan, name):
        calls = hunyuan.calls()
        hunyuan.apply()
        hunyuan.agree(calls)
        assert hunyuan.agree(calls)
        for tensor in {id(call[name]): call[name] for call in calls}.values():
            tensor[..., -1] = 1 if name == "encoder_attention_mask" else tensor[..., -1] * 2 + 3
        hunyuan.agree(calls)
        assert hunyuan.agree(calls)

    def test_freed_and_another_one_made_in_the_same_memory(self, each):
        each.apply()
        for generation in range(4):
            each.agree(each.calls(steps=1, generation=generation))
            gc.collect()
        assert each.hits()["rope.forward"]

    def test_tensors_of_inference_mode_are_never_mistaken(self, each):
        with torch.inference_mode():
            calls = with_tensors(each.calls(), torch.clone)
        each.apply()
        with torch.inference_mode():
            each.agree(calls)
            for call in calls:
                call["encoder_hidden_states"].mul_(0.5)
            each.agree(calls)
        assert each.hits()["rope.forward"]


class TestLora:
    def test_loading_scaling_and_unloading(self, each, calls):
        add_lora(each)
        each.agree(calls)
        scaled = [{**call, "attention_kwargs": {"scale": 0.5}} for call in calls]
        each.agree([pair for both in zip(calls, scaled) for pair in both])
        assert changed(each, calls, lambda model: model.set_adapters("style", 0.25))
        assert changed(each, calls, lambda model: model.disable_adapters())
        assert changed(each, calls, lambda model: model.enable_adapters())
        assert each.agree(calls), "adapters in place do not keep sites from hitting"
        assert changed(each, calls, lambda model: model.unload_lora())
        assert each.agree(calls)

    @pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
    def test_one_of_two(self, each, calls):
        add_lora(each, "style")
        each.agree(calls)
        add_lora(each, "motion", seed=1)
        each.agree(calls)
        assert changed(each, calls, lambda model: model.set_adapters("style"))
        assert changed(each, calls, lambda model: model.set_adapters(["style", "motion"], [0.5, 2.0]))
        assert changed(each, calls, lambda model: model.delete_adapters("style"))
        assert each.agree(calls)

    @pytest.mark.parametrize("forwards_between", [True, False])
    @pytest.mark.parametrize(
        "steps", ["fuse unload", "fuse unfuse unload", "fuse_safely unload", "fuse unfuse fuse unload"]
    )
    def test_loaded_fused_unfused_and_unloaded(self, each, calls, steps, forwards_between):
        """Fusing adds to the weights through `.data`, without a trace."""
        edits = {
            "fuse": lambda model: model.fuse_lora(lora_scale=0.5),
            "fuse_safely": lambda model: model.fuse_lora(safe_fusing=True),
            "unfuse": lambda model: model.unfuse_lora(),
            "unload": lambda model: model.unload_lora(),
        }
        add_lora(each)
        for step in steps.split():
            for model in each.both:
                edits[step](model)
            if forwards_between:
                each.agree(calls)
        each.agree(calls)
        assert each.agree(calls)

    @pytest.mark.parametrize("targets", [["linear_1", "linear_2", "to_q"], ["time_proj"]])
    def test_fused_and_unfused_by_the_pipeline(self, wan, targets):
        """`pipe.unfuse_lora` does not call the model's: it goes to the layers."""
        calls = wan.calls()
        pipes = [
            WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer=model) for model in wan.both
        ]
        wan.apply()
        add_lora(wan, targets=targets)
        wan.agree(calls)
        for step in ("fuse_lora", "unfuse_lora", "unload_lora_weights"):
            for pipe in pipes:
                getattr(pipe, step)(**({} if step.startswith("unload") else {"components": ["transformer"]}))
            wan.agree(calls)
            assert wan.agree(calls), step

    def test_merged_by_the_layers_themselves(self, each, calls):
        """As `peft` users do: every layer's `merge()` writes to its base layer through `.data`."""
        add_lora(each)
        each.agree(calls)
        layers = {model: [module for module in model.modules() if hasattr(module, "unmerge")] for model in each.both}
        assert layers[each.model]
        for method in ("merge", "unmerge", "merge"):
            for model in each.both:
                for layer in layers[model]:
                    getattr(layer, method)()
            each.agree(calls)
            assert each.agree(calls), method


class TestMemory:
    def test_old_weights_and_prompts_are_let_go(self, each):
        each.apply()
        calls = each.calls()
        each.agree(calls)
        tensors = [*each.model.parameters(), *each.model.buffers(), *(call["encoder_hidden_states"] for call in calls)]
        storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        del tensors, calls
        for parameter in each.model.parameters():
            parameter.data = parameter.data.clone()
        for module in each.model.modules():
            for name in dict(module.named_buffers(recurse=False)):
                setattr(module, name, getattr(module, name).clone())
        gc.collect()
        assert [storage for storage in storages if not storage.expired()] == []

    def test_prompts_that_come_and_go_leave_nothing_behind(self, each):
        each.apply()
        held = []
        for generation in range(4):
            each.agree(each.calls(steps=3, generation=generation))
            held.append(each.handle.nbytes)
        assert held[0] > 0 and held[3] <= held[1]

    def test_an_unloaded_adapter_is_let_go_at_once(self, each, calls):
        add_lora(each)
        each.agree(calls)
        storages = [
            StorageWeakRef(parameter.untyped_storage())
            for name, parameter in each.model.named_parameters()
            if "lora_" in name
        ]
        for model in each.both:
            model.unload_lora()
        gc.collect()
        assert [storage for storage in storages if not storage.expired()] == []


@pytest.mark.parametrize("edit", ["in place", "replaced"])
def test_a_single_parameter_that_the_spec_reads_counts(tiny, edit):
    refined = "context_refiner.*.forward"
    model = tiny("diffusers/z_image")
    calls = model.calls()
    model.apply()
    model.agree(calls)
    assert model.agree(calls)[refined] == 2 * len(calls)
    with torch.no_grad():
        for each in model.both:
            if edit == "in place":
                each.cap_pad_token.mul_(3)
            else:
                each.cap_pad_token = torch.nn.Parameter(each.x_pad_token.clone())
    assert model.agree(calls[:2])[refined] == 0
    assert model.agree(calls[:2])[refined] == 4


def test_the_attention_backend_counts_where_attention_is_kept(tiny, monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    model = tiny("diffusers/z_image")
    calls = model.calls()
    model.apply()
    model.agree(calls)
    # Whoever has set one before, and has reset it, has left it there.
    active = _AttentionBackendRegistry.get_active_backend()[0]
    other = next(name for name in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH) if name != active)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", other)
    assert model.agree(calls[:2])["context_refiner.*.forward"] == 0
    assert model.agree(calls[:2])["context_refiner.*.forward"] == 4
