"""Switches of the numerics, modes, and what else is set for a thread or a process, changed after a warm-up."""

import contextlib

import pytest
import torch
from seams import case, warm
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dit_patch.contribute import verify

LAYERS = (torch.nn.functional.linear, torch.nn.functional.silu, torch.cos)


class Louder(TorchDispatchMode):
    """Changes what matrix products give."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 1.5 if function is torch.ops.aten.addmm.default else result


class LouderFunctions(TorchFunctionMode):
    """Changes what some functions give."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 1.5 if function in LAYERS else result


class Counting(TorchDispatchMode):
    """Gives something else each time."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        result = function(*args, **(kwargs or {}))
        return result * self.calls if function is torch.ops.aten.addmm.default else result


class Both:
    """A function mode inside a dispatch mode."""

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(Louder())
        self.stack.enter_context(LouderFunctions())

    def __exit__(self, *error):
        self.stack.close()


@contextlib.contextmanager
def setting(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def attribute(owner, name, value):
    return lambda: setting(lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)


def function(get, put, value):
    return lambda: setting(get, put, value)


SWITCHES = {
    "backends.fp32_precision": attribute(torch.backends, "fp32_precision", "tf32"),
    "backends.cuda.matmul.fp32_precision": attribute(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "backends.cudnn.fp32_precision": attribute(torch.backends.cudnn, "fp32_precision", "tf32"),
    "backends.cudnn.conv.fp32_precision": attribute(torch.backends.cudnn.conv, "fp32_precision", "tf32"),
    "backends.mkldnn.fp32_precision": attribute(torch.backends.mkldnn, "fp32_precision", "bf16"),
    "backends.mkldnn.matmul.fp32_precision": attribute(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "backends.mkldnn.conv.fp32_precision": attribute(torch.backends.mkldnn.conv, "fp32_precision", "bf16"),
    "backends.cuda.matmul.allow_tf32": attribute(torch.backends.cuda.matmul, "allow_tf32", True),
    "backends.cudnn.allow_tf32": attribute(torch.backends.cudnn, "allow_tf32", False),
    "backends.mkldnn.enabled": lambda: torch.backends.mkldnn.flags(enabled=False),
    "backends.mkldnn.deterministic": lambda: torch.backends.mkldnn.flags(enabled=True, deterministic=True),
    "matmul precision": function(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "deterministic algorithms": function(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "default dtype": function(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "flush denormals": function(lambda: False, torch.set_flush_denormal, True),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast without a cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "autocast in float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast that is off": lambda: torch.autocast("cpu", enabled=False),
    "sdpa_kernel": lambda: sdpa_kernel(SDPBackend.MATH),
    "default device": lambda: torch.device("cpu"),
    "inference mode": torch.inference_mode,
    "anomaly detection": torch.autograd.detect_anomaly,
    "a dispatch mode": Louder,
    "a function mode": LouderFunctions,
    "a counting mode": Counting,
    "two modes": Both,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [case(f"numerics: {name}", name) for name in SWITCHES])
def test_a_switch(each, name):
    calls = each.calls(1)
    warm(each, calls)
    for _ in range(2):
        results = []
        for model in each.both:
            with SWITCHES[name]():
                results.append([verify.run(model, calls) for _ in range(2)])
        for ours, theirs in zip(*results):
            assert verify.first_difference(ours, theirs) is None
        each.agree(calls)


def entered(module, mode):
    """Hooks that enter a mode before the module's forward, and leave it afterwards."""

    def enter(*_):
        mode.__enter__()

    def leave(*_):
        mode.__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def test_a_mode_that_a_hook_enters_inside_the_forward(wan):
    """Entered in a pre-hook of a submodule, and left in its hook."""
    calls = wan.calls(1)
    warm(wan, calls)
    hooks = [each for model in wan.both for each in entered(model.condition_embedder, LouderFunctions())]
    for _ in range(2):
        wan.agree(calls)
    for each in hooks:
        each.remove()
    wan.agree(calls)


def test_a_mode_changes_what_the_unpatched_model_gives(wan):
    calls = wan.calls(1)
    before = verify.run(wan.plain, calls)
    for mode in (Louder, LouderFunctions, Counting):
        with mode():
            assert verify.first_difference(before, verify.run(wan.plain, calls)) is not None
