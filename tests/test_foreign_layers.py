"""Layers of other libraries in the places of a model's Linears: the bits are the unpatched model's, the sites hit."""

from __future__ import annotations

import pytest
import torch

from dit_patch import SiteError
from dit_patch.contribute import verify
from dit_patch.spec.registry import Registry

DIFFUSERS = [name for name in Registry(plugins=False).names() if name.startswith("diffusers/")]

# A spec a test file's own worker would wait for; the cases share nothing.
pytestmark = pytest.mark.spread("name")


class Renamed(torch.nn.Linear):
    """A subclass whose forward calls its argument otherwise, as quantised layers do."""

    def forward(self, x):
        return super().forward(x) + 0.0


class Unrelated(torch.nn.Module):
    """A layer that inherits from none of torch's, and tells nothing of the one in whose place it is."""

    def __init__(self, linear):
        super().__init__()
        self.inner, self.weight, self.bias = linear, linear.weight, linear.bias

    def forward(self, activations):
        return self.inner(activations)


def renamed(linear):
    layer = Renamed(linear.in_features, linear.out_features, linear.bias is not None)
    layer.load_state_dict(linear.state_dict())
    return layer


def gguf(linear):
    pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear

    layer = GGUFLinear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    layer.load_state_dict(linear.state_dict())
    return layer


def exchange(model, make):
    """Put another layer in the place of each Linear."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, make(child))
    return model.eval()


def add_lora(model, targets="all-linear", alpha=8):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    model.add_adapter(config, adapter_name="style")
    return model.eval()


def quantised(tiny, make):
    for model in tiny.both:
        exchange(model, make)
    return tiny


@pytest.mark.parametrize("make", [renamed, gguf])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_every_site_hits_on_layers_that_name_their_arguments_otherwise(tiny, name, make):
    each = quantised(tiny(name), make)
    each.apply()
    calls = each.calls(steps=1)
    each.agree(calls)
    hits = each.agree(calls)
    keyed = [row for row in each.handle.stats() if row.misses]
    assert all(hits[row.at] for row in keyed) and not each.reasons()
    assert not any("left alone" in note for row in each.handle.stats() for note in row.notes)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_lora_on_every_linear_may_come_first(tiny, name):
    each = tiny(name)
    for model in each.both:
        add_lora(model).requires_grad_(False)
    each.apply()
    calls = each.calls(steps=1)
    each.agree(calls)
    hits = each.agree(calls)
    assert all(hits[row.at] for row in each.handle.stats() if row.misses)
    if name != "diffusers/skyreels_v2":  # whose adapters diffusers 0.35 cannot weigh
        for model in each.both:
            model.set_adapters("style", 0.25)
        each.agree(calls)
    for model in each.both:
        model.disable_adapters()
    each.agree(calls)
    each.agree(calls)


@pytest.mark.parametrize("name", ["diffusers/wan", "diffusers/flux"])
def test_lora_on_top_of_gguf(tiny, name):
    each = quantised(tiny(name), renamed)
    each.apply()
    calls = each.calls(steps=1)
    each.agree(calls)
    for model in each.both:
        add_lora(model).requires_grad_(False)
    each.agree(calls)
    each.agree(calls)


@pytest.mark.parametrize("name", ["diffusers/wan", "diffusers/hunyuan_video", "diffusers/ltx2"])
def test_a_site_on_a_layer_that_nothing_is_known_of_is_left_out_with_its_reason(tiny, name):
    each = quantised(tiny(name), Unrelated)
    each.apply()
    calls = each.calls(steps=1)
    each.agree(calls)
    assert each.agree(calls)["rope.forward"]
    left_out = {row.at: row.notes for row in each.handle.stats() if any("left alone" in note for note in row.notes)}
    assert left_out and all("Unrelated" in notes[0] for notes in left_out.values())


class ByKeyword(torch.nn.Module):
    """Calls such a layer with the layer's own name for its argument."""

    def __init__(self):
        super().__init__()
        self.project = Renamed(4, 4)

    def forward(self, text):
        return self.project(x=text)


def test_by_keyword_it_is_the_same_argument(patched):
    site = "  - {at: project.forward, kind: context, key: {input: [identity]}}"
    model, plain, handle = patched(site, cls=ByKeyword)
    text = torch.ones(2, 4)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(text), plain(text))
    assert [row.hits for row in handle.stats()] == [2]


def test_a_name_that_nobody_has_is_an_error_of_the_spec_still(patched):
    with pytest.raises(SiteError, match="no parameter `inpt`; did you mean `input`"):
        patched("  - {at: embed.first.forward, kind: context, key: {inpt: [identity]}}")


def test_weights_that_gguf_has_quantised_are_no_tensors_to_follow_and_the_other_sites_hit(wan):
    """With such weights the original runs, and the report says why: their type says what their bytes mean."""
    quantise = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = quantise.GGMLQuantizationType.Q8_0
    for model in wan.both:
        embedder = model.condition_embedder
        width = embedder.text_embedder.linear_1.out_features
        first = torch.nn.Linear(embedder.text_embedder.linear_1.in_features, 32)
        layer = GGUFLinear(32, width, bias=False, compute_dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        for parameter in first.parameters():
            parameter.data.normal_(generator=generator)
        weight = torch.randn(width, 32, generator=generator).numpy()
        layer.weight = GGUFParameter(torch.from_numpy(quantise.quantize(weight, kind).copy()), quant_type=kind)
        embedder.text_embedder.linear_1, embedder.text_embedder.linear_2 = first, layer
        model.requires_grad_(False).eval()
    handle, calls = wan.apply(), wan.calls()
    wan.agree(calls)
    hits = wan.agree(calls)
    rows = {row.at: row for row in handle.stats()}
    assert rows["condition_embedder.text_embedder.forward"].bypassed == {
        "weights of type GGUFParameter": 2 * len(calls)
    }
    assert hits["rope.forward"] and hits["condition_embedder.time_proj.forward"]


def test_a_hotswapped_adapter_is_seen(wan):
    """diffusers writes the other adapter's weights through `.data`, which leaves no version behind."""
    peft = pytest.importorskip("peft")
    targets = ["condition_embedder.time_proj", "condition_embedder.text_embedder.linear_1"]
    for model in wan.both:
        add_lora(model, targets, alpha=2).requires_grad_(False)  # the scale, which would be seen, stays 1
    wan.apply()
    calls = wan.calls(steps=1)
    before = verify.run(wan.plain, calls)
    for _ in range(3):
        wan.agree(calls)
    state = peft.get_peft_model_state_dict(wan.plain, adapter_name="style")
    other = {f"transformer.{name}": 3 * tensor + 0.5 for name, tensor in state.items()}
    for model in wan.both:
        model.load_lora_adapter(
            {name: each.clone() for name, each in other.items()},
            adapter_name="style",
            hotswap=True,
            prefix="transformer",
        )
    wan.agree(calls)
    wan.agree(calls)
    assert verify.first_difference(before, verify.run(wan.plain, calls)) is not None
