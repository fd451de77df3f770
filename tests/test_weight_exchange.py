"""Weights that libraries exchange from outside of a model through `.data`, which leaves no version behind."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
import textwrap

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import hotswap

from dit_patch.handle.weight_exchange import EXCHANGES
from dit_patch.sites.layers import Wrapped


@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "foreach"])
def test_averaged_weights_come_and_go(wan, foreach):
    """As between two samples in training: `store`, `copy_to`, a sample, `restore`."""
    calls = wan.calls()
    wan.apply()
    averages = [EMAModel([2 * each.detach() for each in model.parameters()], foreach=foreach) for model in wan.both]
    for _ in range(2):
        wan.agree(calls)
        hits = wan.agree(calls)
        assert hits["condition_embedder.time_proj.forward"]
        for exchange in ("store", "copy_to"):
            for average, model in zip(averages, wan.both):
                getattr(average, exchange)(model.parameters())
        wan.agree(calls), wan.agree(calls)
        for average, model in zip(averages, wan.both):
            average.restore(model.parameters())


def test_an_adapter_is_exchanged_by_peft_itself(wan):
    for model in wan.both:
        config = LoraConfig(r=2, target_modules=["time_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        model.add_adapter(config, adapter_name="style")
        model.requires_grad_(False).eval()
    calls = wan.calls()
    wan.apply()
    wan.agree(calls), wan.agree(calls)
    state = {name: tensor for name, tensor in wan.plain.state_dict().items() if ".lora_" in name}
    other = {name: 3 * tensor + 0.5 for name, tensor in state.items()}
    for model in wan.both:
        given = {name: tensor.clone() for name, tensor in other.items()}  # some peft swaps them for the old ones
        hotswap.hotswap_adapter_from_state_dict(model, given, "style", LoraConfig(r=2))
    wan.agree(calls)
    assert torch.equal(wan.plain.condition_embedder.time_proj.lora_A.style.weight, next(iter(other.values())))


def watched():
    """What is wrapped of all that exchanges weights."""
    found = []
    for module, paths in EXCHANGES.items():
        for path in paths:
            owner = importlib.import_module(module)
            *steps, name = path.split(".")
            for step in steps:
                owner = getattr(owner, step)
            assert callable(getattr(owner, name)), "it has moved"
            found += [path] if type(vars(owner)[name]) is Wrapped else []
    return found


def test_nothing_is_watched_while_nothing_is_patched(wan, hunyuan):
    everything = [path for paths in EXCHANGES.values() for path in paths]
    assert watched() == []
    wan.apply()
    hunyuan.apply()
    assert watched() == everything
    wan.handle.remove()
    assert watched() == everything
    hunyuan.handle.remove()
    hunyuan.handle.remove()
    assert watched() == []
    wan.apply()
    assert watched() == everything
    wan.handle = wan.model = None
    gc.collect()
    assert watched() == []


def test_a_library_that_is_imported_later_is_watched():
    program = """
        import sys, torch, dit_patch
        from dit_patch.sites.layers import Wrapped
        from dit_patch.spec import mini
        from dit_patch.spec.registry import Registry

        spec = Registry().get("diffusers/wan")
        case = spec.mini.case()
        model, call = mini.build(spec, case), next(mini.forwards(case, case.sizes[0]))
        handle = dit_patch.apply(model)
        assert "diffusers.training_utils" not in sys.modules
        from diffusers.training_utils import EMAModel

        assert type(vars(EMAModel)["copy_to"]) is Wrapped
        with torch.no_grad():
            for _ in range(2):
                model(**call)
            average = EMAModel([2 * each.detach() for each in model.parameters()])
            average.copy_to(model.parameters())
            ours = model(**call)[0]
            handle.remove()
            assert torch.equal(model(**call)[0], ours)
        assert type(vars(EMAModel)["copy_to"]) is not Wrapped
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
