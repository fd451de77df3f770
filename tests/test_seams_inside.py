"""What is inside a site: processors, norms, adapters and forwards that are changed after a warm-up."""

import pytest
import torch
from seams import assert_seen, case, own_forward
from torch.nn.utils import parametrize


class Louder:
    """Changes what another attention processor gives."""

    def __init__(self, processor, gain):
        self.processor, self.gain = processor, gain

    def __call__(self, *args, **kwargs):
        return self.gain * self.processor(*args, **kwargs)


def replace_processor(model):
    for block in model.context_refiner:
        block.attention.processor = Louder(block.attention.processor, 2.0)


def prepare_processor(model):
    for block in model.context_refiner:
        block.attention.set_processor(Louder(block.attention.processor, 1.0))


def louder_processor(model):
    for block in model.context_refiner:
        block.attention.processor.gain = 2.0


def scaled_parameter(model):
    class Scaled(torch.nn.Module):
        factor = 1.0

        def forward(self, weight):
            return weight * self.factor

    for path in ("condition_embedder.text_embedder.linear_1", "condition_embedder.time_proj"):
        parametrize.register_parametrization(model.get_submodule(path), "weight", Scaled())


def other_factor(model):
    model.condition_embedder.text_embedder.linear_1.parametrizations.weight[0].factor = 2.0


class Kohya(torch.nn.Module):
    """A LoRA as kohya's scripts make it: no submodule of the model, but the forward of a Linear."""

    def __init__(self, linear):
        super().__init__()
        self.multiplier, self.org_forward = 1.0, linear.forward
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.lora_down = torch.nn.Linear(linear.in_features, 2, bias=False)
            self.lora_up = torch.nn.Linear(2, linear.out_features, bias=False)
        linear.forward = self.forward

    def forward(self, x):
        return self.org_forward(x) + self.lora_up(self.lora_down(x)) * self.multiplier


def prepare_kohya(model):
    layers = model.condition_embedder.text_embedder.linear_1, model.condition_embedder.time_embedder.linear_2
    object.__setattr__(model, "network", [Kohya(layer) for layer in layers])


def turn_up(model):
    for lora in model.network:
        lora.multiplier = 0.3


def retrain(model):
    with torch.no_grad():
        model.network[0].lora_up.weight.add_(0.1)


def attribute(path, name, value):
    """An edit that sets an attribute of a submodule, and takes it back."""

    def edit(model):
        module = model.get_submodule(path)
        before = getattr(module, name)
        setattr(module, name, value)
        return lambda: setattr(module, name, before)

    return edit


def replace_linear(model):
    model.condition_embedder.text_embedder.linear_2 = torch.nn.Sequential(
        model.condition_embedder.text_embedder.linear_2, torch.nn.Softsign()
    )


def swap_axes(model):
    axes = model.rope.rope_dim
    axes[1:] = [axes[1] + 2, axes[2] - 2]


def nothing(model):
    pass


REAL = {
    "processor replaced": ("diffusers/z_image", None, nothing, replace_processor),
    "processor's attribute": ("diffusers/z_image", None, prepare_processor, louder_processor),
    "eps of a refiner's norm": (
        "diffusers/z_image",
        None,
        nothing,
        attribute("context_refiner.0.ffn_norm1", "eps", 0.5),
    ),
    "eps of a norm in attention": (
        "diffusers/z_image",
        None,
        nothing,
        attribute("context_refiner.0.attention.norm_q", "eps", 0.5),
    ),
    "eps of a LayerNorm": (
        "diffusers/wan",
        "i2v",
        nothing,
        attribute("condition_embedder.image_embedder.norm1", "eps", 0.5),
    ),
    "eps of a site": (
        "diffusers/hunyuan_video",
        None,
        nothing,
        attribute("context_embedder.token_refiner.refiner_blocks.0.norm1", "eps", 0.5),
    ),
    "approximation of a GELU": (
        "diffusers/wan",
        None,
        nothing,
        attribute("condition_embedder.text_embedder.act_1", "approximate", "none"),
    ),
    "parametrisation's attribute": ("diffusers/wan", None, scaled_parameter, other_factor),
    "kohya's multiplier": ("diffusers/wan", None, prepare_kohya, turn_up),
    "kohya's weight": ("diffusers/wan", None, prepare_kohya, retrain),
    "a Linear's own forward": (
        "diffusers/wan",
        None,
        nothing,
        lambda model: own_forward(model.condition_embedder.text_embedder.linear_2),
    ),
    "a Linear replaced": ("diffusers/wan", None, nothing, replace_linear),
    "theta": ("diffusers/hunyuan_video", None, nothing, attribute("rope", "theta", 50.0)),
    "axes of a table": ("diffusers/hunyuan_video", None, nothing, swap_axes),
}


@pytest.mark.parametrize(("name", "variant", "prepare", "edit"), [case(name, *rest) for name, rest in REAL.items()])
def test_what_is_inside_a_site(tiny, name, variant, prepare, edit):
    each = tiny(name, variant)
    for model in each.both:
        prepare(model)
    assert_seen(each, each.calls(1), edit)
