"""A class, or a function of a library, that is changed after `apply`: for all models at once, and put back."""

import importlib
import types

import pytest
import torch
from seams import altered, case, warm

from dit_patch.contribute import verify


def patched_forward(path, attribute="forward"):
    """What changes a function of a class or module, as `library.module.Class`, so that results change."""

    def change(monkeypatch):
        name, _, last = path.rpartition(".")
        owner = getattr(importlib.import_module(name), last) if last[0].isupper() else importlib.import_module(path)
        before = getattr(owner, attribute)

        def patched(*args, **kwargs):
            return altered(before(*args, **kwargs))

        monkeypatch.setattr(owner, attribute, patched)

    return change


def riflex(monkeypatch):
    """RIFLEx: one frequency of the rotary embedding is lowered, so that longer videos do not repeat."""
    cls = importlib.import_module("diffusers.models.transformers.transformer_wan").WanRotaryPosEmbed
    before = cls.forward

    def forward(self, hidden_states):
        cosines, sines = before(self, hidden_states)
        cosines = cosines.clone()
        cosines[..., 2] = 0.5
        return cosines, sines

    monkeypatch.setattr(cls, "forward", forward)


def code(monkeypatch):
    """The code of a class's forward is exchanged, as hot reloading does; the function stays the same object."""
    forward = importlib.import_module("diffusers.models.embeddings").PixArtAlphaTextProjection.forward

    def other(self, caption):
        return self.linear_2(self.act_1(self.linear_1(caption))) * 2

    monkeypatch.setattr(forward, "__code__", other.__code__)


def call(monkeypatch):
    """`__call__` on a subclass of Module, as wrappers of libraries do."""
    cls = importlib.import_module("diffusers.models.embeddings").TimestepEmbedding
    before = cls.__call__
    monkeypatch.setattr(cls, "__call__", lambda self, *args: altered(before(self, *args)), raising=False)


def call_of_all(monkeypatch):
    """`Module.__call__` itself, as torch.fx and profilers do."""
    before = torch.nn.Module.__call__

    def patched(self, *args, **kwargs):
        result = before(self, *args, **kwargs)
        return result * 2 if type(self).__name__ == "SiLU" else result

    monkeypatch.setattr(torch.nn.Module, "__call__", patched)


def getattribute(monkeypatch):
    """A class's attributes are looked up another way, so that its activation is another one."""
    cls = importlib.import_module("diffusers.models.embeddings").TimestepEmbedding
    before = cls.__getattr__

    def patched(self, name):
        return torch.nn.functional.mish if name == "act" else before(self, name)

    monkeypatch.setattr(cls, "__getattr__", patched, raising=False)


def default(monkeypatch):
    """The defaults of a function's arguments."""
    function = importlib.import_module("diffusers.models.embeddings").get_timestep_embedding
    monkeypatch.setattr(function, "__defaults__", (False, 1, 1, 500))


WAN = "diffusers.models.transformers.transformer_wan"
CHANGES = {
    "RIFLEx": riflex,
    "TimestepEmbedding.forward": patched_forward("diffusers.models.embeddings.TimestepEmbedding"),
    "Timesteps.forward": patched_forward("diffusers.models.embeddings.Timesteps"),
    "PixArtAlphaTextProjection.forward": patched_forward("diffusers.models.embeddings.PixArtAlphaTextProjection"),
    "WanTimeTextImageEmbedding.forward": patched_forward(f"{WAN}.WanTimeTextImageEmbedding"),
    "SiLU.forward": patched_forward("torch.nn.SiLU"),
    "Linear.forward": patched_forward("torch.nn.Linear"),
    "functional.silu": patched_forward("torch.nn.functional", "silu"),
    "functional.linear": patched_forward("torch.nn.functional", "linear"),
    "get_timestep_embedding": patched_forward("diffusers.models.embeddings", "get_timestep_embedding"),
    "code of a forward": code,
    "__call__ of a class": call,
    "__call__ of all modules": call_of_all,
    "__getattr__ of a class": getattribute,
    "defaults of a function": default,
}


@pytest.mark.filterwarnings("ignore:dit_patch.*is not equal to the original here")  # a replacement that gives way
@pytest.mark.parametrize("change", [case(f"class: {name}", change) for name, change in CHANGES.items()])
def test_what_is_changed_for_all_models_and_put_back(wan, change):
    calls = wan.calls(1)
    warm(wan, calls)
    before = verify.run(wan.plain, calls)
    with pytest.MonkeyPatch.context() as monkeypatch:
        change(monkeypatch)
        for _ in range(3):
            wan.agree(calls)
        assert verify.first_difference(before, verify.run(wan.plain, calls)) is not None
    for _ in range(3):
        wan.agree(calls)


MODELS = "diffusers.models.transformers"
OTHERS = {
    "diffusers/flux": "transformer_flux.FluxPosEmbed",
    "diffusers/hunyuan_video": "transformer_hunyuan_video.HunyuanVideoRotaryPosEmbed",
    "diffusers/qwen_image": "transformer_qwenimage.QwenEmbedRope",
    "diffusers/ltx_video": "transformer_ltx.LTXVideoRotaryPosEmbed",
    "diffusers/z_image": "transformer_z_image.ZImageTransformerBlock",
    "diffusers/cosmos": "transformer_cosmos.CosmosRotaryPosEmbed",
    "diffusers/mochi": "transformer_mochi.MochiRoPE",
}


@pytest.mark.parametrize(("name", "path"), [case(f"class: {path}", name, path) for name, path in OTHERS.items()])
def test_the_forward_of_a_site_s_class(tiny, name, path):
    each = tiny(name)
    calls = each.calls(1)
    warm(each, calls)
    with pytest.MonkeyPatch.context() as monkeypatch:
        patched_forward(f"{MODELS}.{path}")(monkeypatch)
        for _ in range(2):
            each.agree(calls)
    for _ in range(2):
        each.agree(calls)


def test_a_class_that_is_not_a_site_s_changes_nothing_that_is_kept(wan):
    """What is called by no site may change without a recomputation."""
    calls = wan.calls(1)
    warm(wan, calls)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(type(wan.model.patch_embedding), "unused", types.SimpleNamespace(), raising=False)
        wan.agree(calls)
    assert wan.agree(calls)["rope.forward"] == len(calls)
