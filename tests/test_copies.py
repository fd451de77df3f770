"""A copy of a patched model, however made, is an ordinary model with weights of its own; the original goes on."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

from dit_patch import apply
from dit_patch.contribute import verify
from dit_patch.sites import scope
from dit_patch.sites.layers import Wrapped


def deepcopied(model, tmp_path):
    return copy.deepcopy(model)


def pickled(model, tmp_path):
    return pickle.loads(pickle.dumps(model))


def saved(model, tmp_path):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pretrained(model, tmp_path):
    model.save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path).eval()
    for weight in (*twin.parameters(), *twin.buffers()):
        # Mapped from the file it may lie at an odd address, where some processors sum in another order.
        weight.data = weight.data.clone()
    return twin


def rebuilt(model, tmp_path):
    twin = type(model)(**model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


HOW = [deepcopied, pickled, saved, pretrained, rebuilt]


def prompt_projection(model) -> torch.nn.Linear:
    """A weight inside a cached site."""
    wan = getattr(model, "condition_embedder", None)
    return wan.text_embedder.linear_1 if wan is not None else model.context_embedder.proj_in


def layers_in(model) -> list:
    return [value for module in model.modules() for value in vars(module).values() if type(value) is Wrapped]


@pytest.mark.parametrize("how", HOW)
class TestACopy:
    def test_it_is_unpatched_and_computes_the_same(self, each, how, tmp_path):
        calls = each.calls()
        each.apply()
        each.agree(calls)
        twin = how(each.model, tmp_path)
        assert scope.scope_of(twin) is None and layers_in(twin) == []
        assert each.agree(calls, model=twin) == {}, "the copy's forward went to the original's cache"
        assert each.agree(calls)["rope.forward"] == len(calls)

    def test_it_has_its_own_weights_and_the_original_keeps_its(self, each, how, tmp_path):
        calls = each.calls()
        each.apply()
        each.agree(calls)
        twin = how(each.model, tmp_path)
        with torch.no_grad():
            prompt_projection(twin).weight.mul_(2)
        assert verify.first_difference(verify.run(twin, calls), verify.run(each.plain, calls)) == 0
        assert each.agree(calls)
        plain = how(each.plain, tmp_path)
        with torch.no_grad():
            prompt_projection(plain).weight.mul_(2)
        assert each.agree(calls, model=twin, plain=plain) == {}

    def test_it_can_be_patched_and_unpatched_itself(self, each, how, tmp_path):
        calls, original = each.calls(), each.apply()
        each.agree(calls)
        twin = how(each.model, tmp_path)
        with torch.no_grad():
            for model in (twin, each.plain):
                prompt_projection(model).weight.mul_(2)
        before = [set(vars(module)) for module in twin.modules()]
        each.handle = apply(twin)
        assert each.handle is not original
        assert each.agree(calls, model=twin)["rope.forward"] == len(calls) - 1
        each.handle.remove()
        assert [set(vars(module)) for module in twin.modules()] == before
        assert each.agree(calls, model=twin) == {}
        original.remove()


def test_a_pickle_needs_no_dit_patch_where_it_is_read(hunyuan, tmp_path):
    calls = hunyuan.calls()
    hunyuan.apply()
    outputs = verify.run(hunyuan.model, calls)
    torch.save({"model": hunyuan.model, "calls": calls, "outputs": outputs}, tmp_path / "saved.pt")
    program = """
import sys
sys.modules["dit_patch"] = None
import torch
torch.set_num_threads(1)
saved = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert all(torch.equal(saved["model"](**call)[0], out) for call, (out,) in zip(saved["calls"], saved["outputs"]))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "saved.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_copy_of_a_copy_is_whole_too(wan):
    wan.apply()
    twin = copy.deepcopy(copy.deepcopy(wan.model))
    wan.agree(wan.calls(), model=twin)


def test_a_copy_made_inside_a_forward_is_whole_too(wan):
    """As an EMA callback might: nothing of the frame goes with it."""
    copies = []
    hook = wan.model.blocks[0].register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(wan.model)))
    wan.apply()
    call = wan.calls()[0]
    verify.run(wan.model, [call])
    hook.remove()
    assert wan.agree([call], model=copies[0]) == {}


def test_the_state_dict_and_the_config_are_those_of_the_unpatched_model(each):
    names = list(each.model.state_dict())
    each.apply()
    verify.run(each.model, each.calls())
    assert list(each.model.state_dict()) == names == list(each.plain.state_dict())
    assert dict(each.model.config) == dict(each.plain.config)
    assert len(list(each.model.modules())) == len(list(each.plain.modules()))
