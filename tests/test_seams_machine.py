"""Edits and forwards in any order: after each, the patched model gives the bits of its twin, which is edited alike."""

import importlib

import pytest
import torch
from conftest import Tiny
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from seams import WARM, altered, hook, own_forward, pre_hook
from torch.overrides import TorchFunctionMode

from dit_patch.contribute import verify

torch.set_num_threads(1)


class Louder(TorchFunctionMode):
    """Changes what an activation gives."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 1.5 if function is torch.nn.functional.silu else result


class Processor:
    """Changes what another attention processor gives."""

    def __init__(self, processor, gain):
        self.processor, self.gain = processor, gain

    def __call__(self, *args, **kwargs):
        return self.gain * self.processor(*args, **kwargs)


class Edits(RuleBasedStateMachine):
    """Edits of both models; what a family has is in its subclass.

    `name` is the spec; `paths`, modules around and inside its sites; `linears`, some with weights; `attributes`, plain
    attributes with two values of each; `attention`, modules with a processor; `classes`, whose forward may change.
    """

    name = ""
    paths: tuple = ()
    linears: tuple = ()
    activations: tuple = ()
    attributes: tuple = ()
    attention: tuple = ()
    classes: tuple = ()

    def __init__(self):
        super().__init__()
        self.tiny = Tiny(self.name)
        self.calls = self.tiny.calls(1)
        self.tiny.apply()
        self.undo = []
        self.modes = None
        self.patch = pytest.MonkeyPatch()
        for _ in range(WARM):
            self.tiny.agree(self.calls)

    def teardown(self):
        self.patch.undo()
        self.tiny.handle.remove()

    def compare(self):
        self.results = []
        for model in self.tiny.both:
            with self.modes() if self.modes else torch.no_grad():
                self.results.append(verify.run(model, self.calls))
        assert verify.first_difference(*self.results) is None

    def both(self, edit, path):
        self.undo.append([edit(model.get_submodule(path)) for model in self.tiny.both])

    @rule(times=st.integers(1, WARM))
    def forward(self, times):
        for _ in range(times):
            self.compare()

    @rule(data=st.data(), edit=st.sampled_from([pre_hook, hook, own_forward]))
    def add_a_hook(self, data, edit):
        self.both(edit, data.draw(st.sampled_from(self.paths)))
        self.compare()

    @rule(data=st.data())
    def take_it_back(self, data):
        if self.undo:
            for undo in self.undo.pop():
                undo()
        self.compare()

    @rule(data=st.data())
    def set_an_attribute(self, data):
        path, name, values = data.draw(st.sampled_from(self.attributes))
        value = data.draw(st.sampled_from(values))
        for model in self.tiny.both:
            setattr(model.get_submodule(path), name, value)
        self.compare()

    @rule(data=st.data(), cls=st.sampled_from([torch.nn.SiLU, torch.nn.Tanh, torch.nn.Mish]))
    def replace_a_submodule(self, data, cls):
        parent, name = data.draw(st.sampled_from(self.activations))
        for model in self.tiny.both:
            setattr(model.get_submodule(parent), name, cls())
        self.compare()

    @rule(data=st.data(), gain=st.sampled_from([1.0, 0.5]))
    def replace_a_processor(self, data, gain):
        path = data.draw(st.sampled_from(self.attention))
        for model in self.tiny.both:
            attention = model.get_submodule(path)
            if isinstance(attention.processor, Processor):
                attention.processor.gain = gain
            else:
                attention.set_processor(Processor(attention.processor, gain))
        self.compare()

    @rule(data=st.data())
    def patch_a_class(self, data):
        path = data.draw(st.sampled_from(self.classes))
        module, _, name = path.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        before = cls.forward
        self.patch.setattr(cls, "forward", lambda *args, **kwargs: altered(before(*args, **kwargs)))
        self.compare()

    @rule()
    def put_classes_back(self):
        self.patch.undo()
        self.compare()

    @rule(data=st.data(), how=st.sampled_from(["in place", "data", "exchanged", "requires_grad"]))
    def edit_a_weight(self, data, how):
        path = data.draw(st.sampled_from(self.linears))
        for model in self.tiny.both:
            linear = model.get_submodule(path)
            with torch.no_grad():
                if how == "in place":
                    linear.weight.mul_(0.75)
                elif how == "data":
                    linear.weight.data = linear.weight.data * 0.75
                elif how == "exchanged":
                    linear.weight = torch.nn.Parameter(linear.weight.detach() * 0.75)
                else:
                    linear.weight.requires_grad_(not linear.weight.requires_grad)
        self.compare()

    @rule(mode=st.sampled_from([None, Louder, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]))
    def enter_a_mode(self, mode):
        self.modes = mode
        self.compare()

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def cast_the_models(self, dtype):
        for model in self.tiny.both:
            model.to(dtype)
        self.calls = [
            {
                name: value.to(dtype) if hasattr(value, "is_floating_point") and value.is_floating_point() else value
                for name, value in call.items()
            }
            for call in self.calls
        ]
        self.compare()

    @rule(train=st.booleans())
    def train(self, train):
        for model in self.tiny.both:
            model.train(train)
        self.compare()

    @rule()
    def write_into_the_prompt(self):
        self.calls[0]["encoder_hidden_states"].mul_(1.25)
        self.compare()

    @rule(generation=st.integers(0, 2), size=st.integers(0, 1))
    def begin_a_generation(self, generation, size):
        """Other inputs, or such as have been there before, in new memory."""
        self.tiny.handle.begin_generation()
        dtype = next(self.tiny.plain.parameters()).dtype
        self.calls = self.tiny.calls(1, size, generation=generation, dtype=dtype)
        self.compare()

    @rule()
    def clear_or_apply_again(self):
        self.tiny.handle.clear()
        assert self.tiny.apply() is self.tiny.handle
        self.compare()


class Wan(Edits):
    name = "diffusers/wan"
    paths = (
        "rope",
        "condition_embedder",
        "condition_embedder.timesteps_proj",
        "condition_embedder.time_embedder",
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.act_fn",
        "condition_embedder.time_proj",
        "condition_embedder.text_embedder",
        "condition_embedder.text_embedder.linear_2",
        "blocks.0.attn1",
    )
    linears = (
        "condition_embedder.time_embedder.linear_2",
        "condition_embedder.time_proj",
        "condition_embedder.text_embedder.linear_1",
        "blocks.0.attn1.to_q",
    )
    activations = (("condition_embedder", "act_fn"), ("condition_embedder.text_embedder", "act_1"))
    attributes = (
        ("condition_embedder.timesteps_proj", "flip_sin_to_cos", (True, False)),
        ("condition_embedder.timesteps_proj", "downscale_freq_shift", (0, 1)),
        ("condition_embedder.time_embedder", "post_act", (None, torch.nn.functional.silu)),
        ("blocks.0.norm1", "eps", (1e-6, 0.5)),
    )
    attention = ("blocks.0.attn1", "blocks.1.attn2")
    classes = (
        "diffusers.models.transformers.transformer_wan.WanRotaryPosEmbed",
        "diffusers.models.embeddings.TimestepEmbedding",
        "torch.nn.SiLU",
    )


class HunyuanVideo(Edits):
    name = "diffusers/hunyuan_video"
    paths = (
        "rope",
        "time_text_embed",
        "time_text_embed.time_proj",
        "time_text_embed.timestep_embedder",
        "time_text_embed.timestep_embedder.linear_1",
        "context_embedder",
        "context_embedder.proj_in",
        "context_embedder.time_text_embed.text_embedder",
        "context_embedder.token_refiner.refiner_blocks.0.norm1",
    )
    linears = (
        "time_text_embed.timestep_embedder.linear_2",
        "context_embedder.proj_in",
        "context_embedder.time_text_embed.text_embedder.linear_1",
    )
    activations = (
        ("time_text_embed.timestep_embedder", "act"),
        ("context_embedder.time_text_embed.text_embedder", "act_1"),
    )
    attributes = (
        ("rope", "theta", (256.0, 50.0)),
        ("context_embedder.token_refiner.refiner_blocks.0.norm1", "eps", (1e-6, 0.5)),
        ("time_text_embed.time_proj", "flip_sin_to_cos", (True, False)),
    )
    attention = ("context_embedder.token_refiner.refiner_blocks.0.attn",)
    classes = (
        "diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoRotaryPosEmbed",
        "diffusers.models.embeddings.TimestepEmbedding",
        "torch.nn.LayerNorm",
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("machine", [Wan, HunyuanVideo])
def test_edits_and_forwards_in_any_order(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
