"""Autocast on the simulated accelerator, as CUDA has it: products in the lower precision, sums in float32.

The two lists are those of PyTorch's "CUDA Ops that can autocast", as far as transformers use them:
https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...upstream.torch_internals import without_dispatch_key

_LOWER = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "conv3d", "_convolution")
_LOWER += ("convolution", "scaled_dot_product_attention")
_FLOAT32 = ("layer_norm", "native_layer_norm", "group_norm", "rms_norm", "softmax.int", "log_softmax.int", "exp", "log")
_FLOAT32 += (
    "rsqrt",
    "pow.Tensor_Scalar",
    "sum",
    "sum.dim_IntList",
    "cumsum",
    "norm.ScalarOpt_dim",
    "cosine_similarity",
)
_KEY = "AutocastPrivateUse1"


class Autocast:
    """The rules, while they are registered for a device.

    Args:
        device: its name.
    """

    def __init__(self, device: str) -> None:
        self._fallback = torch.library.Library("_", "IMPL")
        self._fallback.fallback(torch.library.fallthrough_kernel, _KEY)
        self._rules = torch.library.Library("aten", "IMPL")
        for names, dtype in ((_LOWER, lambda: torch.get_autocast_dtype(device)), (_FLOAT32, lambda: torch.float32)):
            for name in names:
                packet, _, overload = name.partition(".")
                operation = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
                if operation is not None:  # an older torch may lack it
                    self._rules.impl(name, _in_dtype(operation, dtype), _KEY)

        # Models say `autocast("cuda")` in their own code, and mean the device that they are on.
        self._init = original = torch.autocast.__init__

        def init(self: Any, device_type: str, *args: Any, **options: Any) -> None:
            original(self, device if device_type == "cuda" else device_type, *args, **options)

        torch.autocast.__init__ = init

    def __repr__(self) -> str:
        return "<Autocast of the simulated accelerator>"

    def remove(self) -> None:
        """Take the rules away."""
        torch.autocast.__init__ = self._init
        self._rules._destroy()
        self._fallback._destroy()


def _in_dtype(operation: Any, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """Return the operation with its floating point tensors cast to a dtype; float64 stays what it is, as in CUDA's."""

    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64:
            return value.to(dtype())
        return [cast(item) for item in value] if isinstance(value, list) else value

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with without_dispatch_key(_KEY):
            return operation(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return kernel
