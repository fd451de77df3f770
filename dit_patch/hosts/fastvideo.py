"""FastVideo's models without its pipelines: a process group of one, a forward context, and rollouts with KV caches.

A machine without an accelerator needs two more things, which only change what cannot run there: an attention backend
for FastVideo's CPU platform, which names none, and flex attention without max-autotune compilation.
"""

from __future__ import annotations

import functools
import os
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..errors import SpecError, suggest
from ..spec.mini import KVCaches, noise, seed_of

RUNS_UNDER_AUTOCAST = True

_open_contexts = ExitStack()
_STAGES = {
    "CausalWanTransformer3DModel": "fastvideo.pipelines.stages.causal_denoising:CausalDMDDenosingStage",
    "CausalMatrixGame2WanModel": "fastvideo.pipelines.stages.matrixgame2_denoising:MatrixGame2CausalDenoisingStage",
}
_FLEX_USERS = ("causal_wanvideo", "matrixgame2.causal_model", "matrixgame2.action_module")


@functools.cache
def prepare() -> None:
    """Import FastVideo and set up what its models ask for when they are built and called.

    Under torchrun all ranks form one sequence-parallel group, which the program has to leave itself in the end:
    `fastvideo.distributed.cleanup_dist_env_and_memory()`.

    Raises:
        ImportError: where FastVideo is not installed.
    """
    os.environ.setdefault("FASTVIDEO_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        _use_sdpa_on_the_cpu()
        _leave_flex_attention_uncompiled()
    _join_process_group()
    forward_context = import_module("fastvideo.forward_context")
    # For the rest of the process: a pipeline's stages set their own, and put this one back.
    _open_contexts.enter_context(forward_context.set_forward_context(current_timestep=0, attn_metadata=None))


def build(cls: type[torch.nn.Module], config: Mapping[str, Any]) -> torch.nn.Module:
    """Build a FastVideo model with random weights from its architecture's configuration, the `...ArchConfig`'s fields.

    Raises:
        SpecError: the architecture has no such field.
    """
    config_class, arch_class = _config_classes(cls)
    names = {field.name for field in fields(arch_class)}
    arch = arch_class(**{name: value for name, value in config.items() if name in names})
    for name in set(config) - names:
        if not hasattr(arch, name):  # some are declared without a type, and so are no fields
            raise SpecError(f"config: {arch_class.__name__} has no field `{name}`{suggest(name, names)}")
        setattr(arch, name, config[name])
    model = cls(config_class(arch_config=arch), {})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # FastVideo allocates its weights without filling them.
            center = 1.0 if name.endswith("weight") and parameter.dim() == 1 else 0.0
            parameter.normal_(center, 0.05)
    return model


def defaults(cls: type[torch.nn.Module]) -> dict[str, Any]:
    """Return what the class's architecture holds where nothing is said."""
    arch = _config_classes(cls)[1]()
    return {field.name: getattr(arch, field.name) for field in fields(arch)}


def _config_classes(cls: type[torch.nn.Module]) -> tuple[type, type]:
    """Return the class of the model's configuration, and that of its architecture."""
    config_class = typing.get_type_hints(cls.__init__)["config"]
    return config_class, type(config_class().arch_config)


def pipeline(model: torch.nn.Module) -> Any:
    """Return what stands for the pipeline of a model whose stage makes its KV caches: the model and that stage.

    Returns:
        An object with `modules` and `stages`, as FastVideo's pipelines have; None for other models.
    """
    place = _STAGES.get(type(model).__name__)
    if place is None:
        return None
    module, _, name = place.partition(":")
    stage = getattr(import_module(module), name)(model, None)
    return types.SimpleNamespace(modules={"transformer": model}, stages=[stage])


def give_stage_caches(pipeline: Any, forwards: list[dict[str, Any]], size: Mapping[str, int]) -> None:
    """Put the KV caches that the pipeline's stage makes into a rollout, in place of its own: one set for each pass."""
    [stage] = pipeline.stages
    stage.frame_seq_length = size["h"] * size["w"] // 4
    made: dict[int, dict[str, Any]] = {}
    for arguments in forwards:
        caches = made.get(id(arguments["kv_cache"]))
        if caches is None:
            caches = made[id(arguments["kv_cache"])] = _stage_caches(stage, arguments["hidden_states"])
            made[id(caches["kv_cache"])] = caches
        arguments.update(caches)


def _stage_caches(stage: Any, like: torch.Tensor) -> dict[str, Any]:
    options = {"batch_size": 1, "dtype": like.dtype, "device": like.device}
    caches = {"kv_cache": KVCaches(stage._initialize_kv_cache(**options))}
    if hasattr(stage, "_initialize_action_kv_cache"):
        mouse, keys = stage._initialize_action_kv_cache(**options)
        caches |= {"kv_cache_mouse": KVCaches(mouse), "kv_cache_keyboard": KVCaches(keys)}
    return caches


def causal_wan(config: Mapping[str, Any], size: Mapping[str, int], **options: Any) -> Iterator[dict[str, Any]]:
    """Yield the arguments with which `CausalDMDDenosingStage` calls `CausalWanTransformer3DModel`, forward by forward.

    Args:
        size: `blocks`, and their latent `f`, `h` and `w`.
    """
    f, h, w = size["f"], size["h"], size["w"]
    frame = h * w // 4
    window = config["local_attn_size"] if config.get("local_attn_size", -1) != -1 else 21
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    layers, text = config["num_layers"], config["text_len"]

    def state(new: _TensorMaker) -> dict[str, Any]:
        return {
            "encoder_hidden_states": [new(1, 6, config["text_dim"])],
            "kv_cache": _caches(layers, new, 1, window * frame, heads, width),
            "crossattn_cache": _caches(layers, new, 1, text, heads, width, cross=True),
        }

    for call in _rollout(size["blocks"], state, **options):
        start = call.block * f
        yield {
            **call.state,
            "hidden_states": call.step.new(1, config.get("in_channels", 16), f, h, w),
            "timestep": call.step.time(1, 1),
            "current_start": start * frame,
            "start_frame": start,
        }


def matrixgame2(config: Mapping[str, Any], size: Mapping[str, int], **options: Any) -> Iterator[dict[str, Any]]:
    """Yield the arguments with which its stage calls `CausalMatrixGame2WanModel`, forward by forward.

    The stage's image latents, which the model reads from the forward context, are in `hidden_states` already.

    Args:
        size: `blocks`, their latent `f`, `h` and `w`, and `per_call`, the model's `num_frame_per_block`.
    """
    f, h, w, blocks = size["f"], size["h"], size["w"], size["blocks"]
    frame = h * w // 4
    window = config["local_attn_size"] if config.get("local_attn_size", -1) != -1 else 15
    heads, width, layers = config["num_attention_heads"], config["attention_head_dim"], config["num_layers"]
    action = config.get("action_config") or {}

    def state(new: _TensorMaker) -> dict[str, Any]:
        made = {
            "encoder_hidden_states": [new(1, 0, 8)],
            "encoder_hidden_states_image": [new(1, 9, config["image_dim"])],
            "kv_cache": _caches(layers, new, 1, window * frame, heads, width),
            "crossattn_cache": _caches(layers, new, 1, 257, heads, width, cross=True),
        }
        if action:
            keys = action["heads_num"], action["keyboard_hidden_dim"] // action["heads_num"]
            mice = action["heads_num"], action["mouse_hidden_dim"] // action["heads_num"]
            made["kv_cache_mouse"] = _caches(layers, new, frame, window, *mice)
            made["kv_cache_keyboard"] = _caches(layers, new, 1, window, *keys)
            frames = 1 + 4 * (blocks * f - 1)
            made["mouse_cond"] = new(1, frames, action["mouse_dim_in"])
            made["keyboard_cond"] = new(1, frames, action["keyboard_dim_in"])
        return made

    for call in _rollout(blocks, state, **options):
        start = call.block * f
        arguments = {
            **call.state,
            "hidden_states": call.step.new(1, config["in_channels"], f, h, w),
            "timestep": call.step.time(1, f),
            "current_start": start * frame,
            "start_frame": start,
        }
        if action:
            seen = 1 + 4 * (start + f - 1)
            arguments |= {name: call.state[name][:, :seen] for name in ("mouse_cond", "keyboard_cond")}
            arguments["num_frame_per_block"] = size["per_call"]
        yield arguments


class _TensorMaker:
    """Makes tensors whose contents depend on a moment (generation, block, step), and on their number within it."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, time: int, *moment: Any) -> None:
        self.dtype, self.device, self.moment, self._time, self._made = dtype, device, moment, time, 0

    def __call__(self, *shape: int) -> torch.Tensor:
        self._made += 1
        return noise(shape, seed_of(self.moment, self._made)).to(device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def index(self) -> torch.Tensor:
        return torch.zeros(1, device=self.device, dtype=torch.long)

    def time(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, self._time, device=self.device, dtype=torch.long)


class _Step(typing.NamedTuple):
    """The latents and the timesteps of one denoising step, which its passes share."""

    latents: _TensorMaker
    tensors: dict[Any, torch.Tensor]

    def new(self, *shape: int) -> torch.Tensor:
        return self._once(("latents", shape), lambda: self.latents(*shape))

    def time(self, *shape: int) -> torch.Tensor:
        return self._once(("time", shape), lambda: self.latents.time(*shape))

    def _once(self, name: Any, make: typing.Callable[[], torch.Tensor]) -> torch.Tensor:
        if name not in self.tensors:
            self.tensors[name] = make()
        return self.tensors[name]


class _Call(typing.NamedTuple):
    block: int
    step: _Step
    state: dict[str, Any]


def _rollout(
    blocks: int,
    state: typing.Callable[[_TensorMaker], dict[str, Any]],
    *,
    steps: int,
    passes: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    generation: int,
) -> Iterator[_Call]:
    """Yield each call of a rollout: block after block, its denoising steps and one at timestep 0 for the KV cache.

    Args:
        blocks: how many.
        state: makes what the calls of a pass share, such as KV caches.
    """
    states = {each: state(_TensorMaker(dtype, device, 0, generation, each)) for each in passes}
    for block in range(blocks):
        for step in range(steps + 1):
            time = 0 if step == steps else 1000 - (900 // steps) * step
            shared = _Step(_TensorMaker(dtype, device, time, generation, block, step), {})
            for each in passes:
                yield _Call(block, shared, states[each])


def _caches(
    layers: int, new: _TensorMaker, batch: int, size: int, heads: int, width: int, *, cross: bool = False
) -> KVCaches:
    """Make a KV cache for each layer, with how far it is filled: indices, or `is_init` for cross-attention."""

    def cache() -> dict[str, Any]:
        far = {"is_init": False} if cross else {"global_end_index": new.index(), "local_end_index": new.index()}
        return {"k": new.zeros(batch, size, heads, width), "v": new.zeros(batch, size, heads, width), **far}

    return KVCaches(cache() for _ in range(layers))


def _use_sdpa_on_the_cpu() -> None:
    os.environ.setdefault("FASTVIDEO_ATTENTION_BACKEND", "TORCH_SDPA")
    platform = import_module("fastvideo.platforms.cpu").CpuPlatform
    if "get_attn_backend_cls" not in vars(platform):
        backend = "fastvideo.attention.backends.sdpa.SDPABackend"
        platform.get_attn_backend_cls = classmethod(lambda cls, selected_backend, head_size, dtype: backend)


def _leave_flex_attention_uncompiled() -> None:
    plain = import_module("torch.nn.attention.flex_attention").flex_attention
    for name in _FLEX_USERS:
        import_module(f"fastvideo.models.dits.{name}").flex_attention = plain


def _join_process_group() -> None:
    join = import_module("fastvideo.distributed").maybe_init_distributed_environment_and_model_parallel
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:  # under torchrun, which has set the rest
        join(1, size, "env://")
        return
    with _only_rank(), tempfile.TemporaryDirectory() as folder:
        join(1, 1, f"file://{Path(folder) / 'rendezvous'}")


@contextmanager
def _only_rank() -> Iterator[None]:
    """Be rank 0 of 1 in the environment, for as long as this context lasts.

    Not longer: other libraries would take it for a distributed launch.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
