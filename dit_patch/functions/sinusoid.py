"""Sinusoidal timestep embeddings whose frequency table is built once instead of at every forward.

The operations on the timesteps, and the order of those that build the table, are the originals': equal in every bit.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..memo.context import default_device, on_a_real_device
from ..upstream.torch_internals import is_capturing, tensor_version

_TABLES = 32  # of each kind, at the most


def timesteps(original, instance, args, kwargs) -> torch.Tensor:
    """Replace `diffusers.models.embeddings.Timesteps.forward`: (N,) of any real dtype -> (N, num_channels) float32.

    Hoists `exp(-log(10000) * arange(half) / (half - shift))`, and leaves out a multiplication by a scale of 1 and the
    second concatenation of the two halves, neither of which changes a bit.
    """
    timesteps = _of_timesteps(*args, **kwargs)
    half = instance.num_channels // 2
    table = _frequencies(half, instance.downscale_freq_shift, timesteps.device, _stream(timesteps.device))
    angles = timesteps[:, None].float() * table[None, :]
    if instance.scale != 1:
        angles = instance.scale * angles
    halves = [torch.sin(angles), torch.cos(angles)]
    if instance.flip_sin_to_cos:
        halves.reverse()
    embedding = torch.cat(halves, dim=-1)
    return torch.nn.functional.pad(embedding, (0, 1, 0, 0)) if instance.num_channels % 2 == 1 else embedding


def skyreels_timesteps(original, instance, args, kwargs) -> torch.Tensor:
    """Replace `SkyReelsV2Timesteps.forward`: (N,) or (N, F) timesteps -> (N, num_channels) or (N, F, num_channels).

    The table is float64 (float32 where the device has no float64), and so is the result.
    """
    timesteps = _of_timesteps(*args, **kwargs)
    table = _powers(instance.num_channels, timesteps.device, _stream(timesteps.device))
    angles = torch.outer(timesteps.reshape(-1), table)
    halves = [torch.sin(angles), torch.cos(angles)]
    if instance.flip_sin_to_cos:
        halves.reverse()
    embedding = torch.cat(halves, dim=1)
    return embedding.reshape(*timesteps.shape, instance.num_channels) if timesteps.dim() > 1 else embedding


def timestep_embedding(original, instance, args, kwargs) -> torch.Tensor:
    """Replace FastVideo's `timestep_embedding(t, dim, max_period, dtype)`: (N,) of any real dtype -> (N, dim).

    The table is made on the default device, as there, and kept on that of `t`; its dtype is `dtype`.
    """
    t, dim, max_period, dtype = _of_embedding(*args, **kwargs)
    table = _periods(dim // 2, max_period, dtype, default_device(), t.device, _stream(t.device))
    angles = t[:, None].float() * table[None]
    halves = [torch.cos(angles), torch.sin(angles)]
    if dim % 2:
        halves.append(torch.zeros_like(angles[:, :1]))
    return torch.cat(halves, dim=-1)


def kandinsky_times(original, instance, args, kwargs) -> torch.Tensor:
    """Replace `Kandinsky5TimeEmbeddings.forward`: (N,) times -> (N, time_dim), through its MLP.

    Its frequencies are a plain tensor on the host; here they are brought to the device once.
    """
    time = _of_times(*args, **kwargs)
    angles = torch.outer(time.to(torch.float32), _on_device(instance.freqs, time.device))
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return instance.out_layer(instance.activation(instance.in_layer(embedding)))


def _of_timesteps(timesteps):
    return timesteps


def _of_times(time):
    return time


def _of_embedding(t, dim, max_period=10000, dtype=torch.float32):
    return t, dim, max_period, dtype


def _stream(device: torch.device) -> int | None:
    # A table is only sure to be finished on the stream that it was built on.
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


_copies = WeakTensorKeyDictionary()  # of a tensor on the host: its copies by version, device and stream


def _on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `tensor` on the device, copied once for as long as the tensor lives and nobody writes into it."""
    if tensor.device == device or tensor.is_inference():
        return tensor.to(device)
    key = (tensor_version(tensor), device, _stream(device))
    copies = _copies.setdefault(tensor, {})
    copy = copies.get(key)
    if copy is None and is_capturing():  # as for a table, below
        copy = next((each for other, each in copies.items() if other[:-1] == key[:-1]), None)
        return tensor.to(device) if copy is None else copy
    if copy is None:
        for stale in [other for other in copies if other[0] != key[0]]:
            del copies[stale]
        with torch.inference_mode(False), torch.no_grad():
            copy = copies[key] = tensor.to(device)
    return copy


def _table(build):
    """Return `build` with its results kept by its arguments, the last two of which are a device and a stream.

    `functools.lru_cache` would build a table under inference_mode, autocast or on the meta device, as the first caller
    happens to have it, and could not hand out another stream's table while a CUDA graph is captured.
    """
    tables: dict[tuple, torch.Tensor] = {}

    @functools.wraps(build)
    def find(*key) -> torch.Tensor:
        table = tables.get(key)
        if table is None and is_capturing():  # nothing can be brought to the device, and no stream is at work
            table = next((each for other, each in tables.items() if other[:-1] == key[:-1]), None)
        if table is None:
            table = tables[key] = build_plain(*key)
            if len(tables) > _TABLES:
                tables.pop(next(iter(tables)), None)
        return table

    def build_plain(*key) -> torch.Tensor:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(key[-2].type, enabled=False),
            on_a_real_device(),
        ):
            return build(*key)

    find.cache_clear = tables.clear
    return find


@_table
def _frequencies(half: int, shift: float, device: torch.device, stream: int | None) -> torch.Tensor:
    exponent = -math.log(10000) * torch.arange(start=0, end=half, dtype=torch.float32, device=device)
    return torch.exp(exponent / (half - shift))


@_table
def _powers(channels: int, device: torch.device, stream: int | None) -> torch.Tensor:
    dtype = torch.float32 if device.type in ("mps", "npu", "neuron") else torch.float64
    omega = torch.arange(channels // 2, device=device, dtype=dtype)
    omega /= channels / 2.0
    return 1.0 / 10000**omega


@_table
def _periods(half: int, max_period: int, dtype: torch.dtype, default, device, stream: int | None) -> torch.Tensor:
    return torch.exp(-math.log(max_period) * torch.arange(start=0, end=half, dtype=dtype) / half).to(device=device)
