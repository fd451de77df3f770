"""FastVideo's own pipelines, whole and small: real pipeline, stage and model classes with random weights, on the CPU.

`make("matrixgame2")` gives a pipeline that its own constructor made, with the modules handed to it instead of loaded;
`run` has it generate latents, `run_stage` does only its denoising stage. Every case is deterministic: the same name and
seed give the same bits. Knows nothing of patches.

    python tests/fastvideo_pipelines.py [name ...]      # each case twice, and with Python ints as cache indices
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dit_patch.hosts.fastvideo import build, prepare


@cache
def _prepare_stages() -> None:
    """What the stages need besides: FastVideo takes a machine without CUDA for a Mac, and moves tensors to "mps"."""
    parallel_state = import_module("fastvideo.distributed.parallel_state")
    # The function itself changes, not its name: dozens of modules have imported it by now.
    parallel_state.get_local_torch_device.__code__ = (lambda: torch.device("cpu")).__code__


@dataclass(frozen=True)
class Case:
    """A pipeline class with everything that makes it small."""

    pipeline: str
    config: str  # of the pipeline
    model: str
    arch: Mapping[str, Any]
    size: tuple[int, int, int]  # of the latents: frames, height, width
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline's configuration
    request: Mapping[str, Any] = field(default_factory=dict)  # what a user asks for
    prompt: tuple[tuple[int, ...], ...] = ()  # the shape of each text encoder's embedding
    scheduler: Callable[[], Any] | None = None  # where the pipeline does not make its own
    image: bool = False
    actions: tuple[int, int] | None = None  # the widths of the mouse's and the keyboard's condition
    experts: bool = False  # a second transformer for low noise
    ratio: int = 8  # pixels per latent


@dataclass
class Tiny:
    """A pipeline and what to ask it for."""

    case: Case
    pipeline: Any
    args: Any

    @property
    def stage(self) -> Any:
        """The denoising stage, which drives the transformer(s)."""
        return self.pipeline.denoising_stage

    @property
    def transformer(self) -> torch.nn.Module:
        return self.pipeline.modules["transformer"]

    def request(self, seed: int = 0) -> Any:
        """A new `ForwardBatch` with what a user gives: prompt, image, actions, sizes."""
        case = self.case
        frames, height, width = case.size
        batch = import_module("fastvideo.pipelines.pipeline_batch_info").ForwardBatch(
            data_type="video",
            prompt="A paper boat floats down a stream.",
            negative_prompt="blurred",
            seed=seed,
            num_frames=1 + 4 * (frames - 1),
            height=case.ratio * height,
            width=case.ratio * width,
            **case.request,
        )
        dtypes = [_dtype(name) for name in self.args.pipeline_config.text_encoder_precisions]
        batch.prompt_embeds = [_noise(seed, "prompt", 1, *shape).to(d) for shape, d in zip(case.prompt, dtypes)]
        if batch.do_classifier_free_guidance:
            batch.negative_prompt_embeds = [
                _noise(seed, "negative", 1, *shape).to(d) for shape, d in zip(case.prompt, dtypes)
            ]
        if case.image:
            batch.pil_image = _image(seed, batch.height, batch.width)
        if case.actions:
            mouse, keyboard = case.actions
            batch.mouse_cond = 0.1 * _noise(seed, "mouse", 1, batch.num_frames, mouse)
            batch.keyboard_cond = (_noise(seed, "keyboard", 1, batch.num_frames, keyboard) > 1).float()
        return batch

    def batch(self, seed: int = 0) -> Any:
        """A new `ForwardBatch` as it reaches the denoising stage: the stages before it have run."""
        batch, stages = self.request(seed), self.pipeline.stages
        with _generating():
            for stage in stages[: stages.index(self.stage)]:
                batch = stage(batch, self.args)
        return batch


def make(name: str, seed: int = 0, **arch: Any) -> Tiny:
    """The pipeline of a case, its weights from `seed`; `arch` overrides fields of the transformer's configuration."""
    prepare()
    _prepare_stages()
    case = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = _modules(case, {**case.arch, **arch})
    args = _args(case, modules["transformer"].config)
    pipeline = _pipeline(case, args, modules)
    return Tiny(case, pipeline, args)


def run(tiny: Tiny, seed: int = 0) -> torch.Tensor:
    """The latents that the whole pipeline generates, through its own `forward`."""
    with _generating():
        return tiny.pipeline.forward(tiny.request(seed), tiny.args).output


def run_stage(stage: Any, batch: Any, args: Any) -> torch.Tensor:
    """The latents that a denoising stage makes of a `Tiny.batch()`, which it writes into."""
    with _generating(), torch.no_grad():  # of `ComposedPipelineBase.forward`
        return stage(batch, args).latents


def stream(tiny: Tiny, seed: int = 0) -> torch.Tensor:
    """The latents of Matrix-Game 2 played live: a block after every action, as its server has it.

    Each step runs with gradients enabled, as `MatrixGame2CausalDMDPipeline.streaming_step` does.
    """
    batch, stage = tiny.batch(seed), tiny.stage
    mouse, keyboard = tiny.case.actions
    with _generating(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the stage draws its noise pool from the global generator
        with torch.no_grad():
            stage.streaming_reset(batch, tiny.args)
        for block in range(batch.latents.shape[2] // stage.num_frame_per_block):
            count = 4 * stage.num_frame_per_block - 3 * (block == 0)  # the first latent is a single frame
            batch = stage.streaming_step(
                _noise(seed, f"key {block}", 1, count, keyboard), _noise(seed, f"mouse {block}", 1, count, mouse)
            )
        stage.streaming_clear()
    return batch.latents


@contextmanager
def int_indices(stage: Any) -> Iterator[None]:
    """The stage's KV caches count in Python ints instead of one-element tensors, which the models accept too."""
    with ExitStack() as stack:
        for name in ("_initialize_kv_cache", "_initialize_action_kv_cache"):
            if hasattr(stage, name):
                stack.enter_context(mock.patch.object(stage, name, _with_ints(getattr(stage, name))))
        yield


def _with_ints(initialize: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_with_ints(*args: Any, **kwargs: Any) -> Any:
        caches = initialize(*args, **kwargs)
        for layers in caches if isinstance(caches, tuple) else (caches,):
            for layer in layers:
                layer.update({name: int(value) for name, value in layer.items() if name.endswith("_end_index")})
        return caches

    return initialize_with_ints


class _CpuAutocast(torch.autocast):
    """The stages ask for CUDA's autocast, which does nothing for CPU tensors: the CPU's, in the same places."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@contextmanager
def _generating() -> Iterator[None]:
    """What holds while stages run: autocast on the CPU, and no progress bars."""
    denoising = import_module("fastvideo.pipelines.stages.denoising")
    silent = partial(denoising.tqdm, disable=True)
    with mock.patch.object(torch, "autocast", _CpuAutocast), mock.patch.object(denoising, "tqdm", silent):
        yield


def _modules(case: Case, arch: Mapping[str, Any]) -> dict[str, Any]:
    """A pipeline's modules by the names it asks for; what its stages do not use here is left out."""
    model = _named(case.model)
    modules = {"transformer": _loaded(build(model, arch))}
    if case.experts:
        modules["transformer_2"] = _loaded(build(model, arch))
    modules["scheduler"] = case.scheduler() if case.scheduler else object()
    if case.image:
        modules["vae"] = _wan_vae()
    if arch.get("image_dim"):
        modules["image_encoder"] = _clip(arch["image_dim"])
        modules["image_processor"] = import_module("transformers").CLIPImageProcessor()
    return modules


def _pipeline(case: Case, args: Any, modules: dict[str, Any]) -> Any:
    """The pipeline by its own constructor, which wants a checkpoint's folder even where nothing is loaded from it."""
    index = {name: ["fastvideo", type(module).__name__] for name, module in modules.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name in index:
            (Path(folder) / name).mkdir()
        index |= {"_class_name": case.pipeline.rpartition(".")[2], "_diffusers_version": "0.0.0"}
        (Path(folder) / "model_index.json").write_text(json.dumps(index))
        pipeline = _named(case.pipeline)(
            folder, args, required_config_modules=list(modules), loaded_modules=dict(modules)
        )
        pipeline.post_init()
    return pipeline


def _args(case: Case, model_config: Any) -> Any:
    config = _named(case.config)()
    config.dit_config = model_config
    for name, value in case.settings.items():
        setattr(config, name, value)
    return import_module("fastvideo.fastvideo_args").FastVideoArgs(
        model_path="tiny",
        pipeline_config=config,
        tp_size=1,
        sp_size=1,
        output_type="latent",
        dit_cpu_offload=False,
        dit_layerwise_offload=False,
        text_encoder_cpu_offload=False,
        image_encoder_cpu_offload=False,
        vae_cpu_offload=False,
    )


def _loaded(model: torch.nn.Module) -> torch.nn.Module:
    """The model as FastVideo's loader leaves it: every parameter in bfloat16, none with gradients."""
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def _fill(model: torch.nn.Module) -> torch.nn.Module:
    """FastVideo allocates its weights without filling them: random numbers for all of them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if name.endswith("weight") and parameter.dim() == 1 else 0.0
            parameter.normal_(center, 0.05)
    return model


def _wan_vae() -> torch.nn.Module:
    configs = import_module("fastvideo.configs.models.vaes.wanvae")
    arch = configs.WanVAEArchConfig(base_dim=4, num_res_blocks=1)
    vae = _named("fastvideo.models.vaes.wanvae.AutoencoderKLWan")(configs.WanVAEConfig(arch_config=arch))
    return _fill(vae).eval().requires_grad_(False)


def _clip(width: int) -> torch.nn.Module:
    """A CLIP image encoder for 224x224 pixels in patches of 14, as Matrix-Game 2's: 257 tokens."""
    configs = import_module("fastvideo.configs.models.encoders.clip")
    arch = configs.CLIPVisionArchConfig(
        hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2, patch_size=14
    )
    config = configs.WAN2_1ControlCLIPVisionConfig(arch_config=arch, num_hidden_layers_override=1)
    encoder = _named("fastvideo.models.encoders.clip.CLIPVisionModel")(config)
    return _fill(encoder).eval().requires_grad_(False)


def _self_forcing() -> Any:
    """The scheduler of the causal checkpoints: all thousand timesteps, from which the stages pick theirs."""
    scheduler = _named("fastvideo.models.schedulers.scheduling_self_forcing_flow_match.SelfForcingFlowMatchScheduler")
    return scheduler(num_inference_steps=1000, shift=5.0, sigma_min=0.0, extra_one_step=True, training=True)


def _flow_match() -> Any:
    path = "fastvideo.models.schedulers.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler"
    return _named(path)(shift=7.0)


def _actions(width: int, blocks: int, keyboard: int) -> dict[str, Any]:
    """An action configuration with 2 heads of 64, the only width that ActionModule's RoPE is made for."""
    return {
        "blocks": list(range(blocks)),
        "enable_mouse": True,
        "enable_keyboard": True,
        "heads_num": 2,
        "hidden_size": 16,
        "img_hidden_size": width,
        "keyboard_dim_in": keyboard,
        "keyboard_hidden_dim": 128,
        "mouse_dim_in": 2,
        "mouse_hidden_dim": 128,
        "mouse_qk_dim_list": [8, 28, 28],
        "patch_size": [1, 2, 2],
        "qk_norm": True,
        "qkv_bias": False,
        "rope_dim_list": [8, 28, 28],
        "rope_theta": 256,
        "vae_time_compression_ratio": 4,
        "windows_size": 3,
    }


def _image(seed: int, height: int, width: int) -> Any:
    pixels = (_noise(seed, "image", height, width, 3).clamp(-1, 1) * 127 + 128).to(torch.uint8)
    return import_module("PIL.Image").fromarray(pixels.numpy())


def _noise(seed: int, name: str, *shape: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))


def _dtype(precision: str) -> torch.dtype:
    return import_module("fastvideo.utils").PRECISION_TO_TYPE[precision]


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


_BASIC = "fastvideo.pipelines.basic"
_CONFIGS = "fastvideo.configs.pipelines"
_DITS = "fastvideo.models.dits"
_SMALL = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "freq_dim": 32}
_WAN = {**_SMALL, "num_layers": 2, "text_dim": 32}
_HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "rope_axes_dim": (4, 10, 10),
    "num_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 32,
    "mlp_ratio": 2.0,
}

CASES: dict[str, Case] = {
    "matrixgame2": Case(  # five blocks of three frames through a window of six: two blocks fill it, three evict
        pipeline=f"{_BASIC}.matrixgame2.matrixgame2_causal_dmd_pipeline.MatrixGame2CausalDMDPipeline",
        config=f"{_CONFIGS}.matrixgame2.MatrixGame2I2V480PConfig",
        model=f"{_DITS}.matrixgame2.causal_model.CausalMatrixGame2WanModel",
        arch={
            **_SMALL,
            "num_layers": 3,
            "image_dim": 24,
            "in_channels": 36,
            "out_channels": 16,
            "local_attn_size": 6,
            "action_config": _actions(48, blocks=2, keyboard=4),
        },
        size=(15, 8, 12),
        scheduler=_self_forcing,
        image=True,
        actions=(2, 4),
    ),
    "causal_wan": Case(
        pipeline=f"{_BASIC}.wan.wan_causal_dmd_pipeline.WanCausalDMDPipeline",
        config=f"{_CONFIGS}.wan.SelfForcingWanT2V480PConfig",
        model=f"{_DITS}.causal_wanvideo.CausalWanTransformer3DModel",
        arch={**_WAN, "local_attn_size": 6},
        size=(12, 8, 12),
        prompt=((7, 32),),
        scheduler=_self_forcing,
    ),
    "causal_wan22": Case(  # two experts with a KV cache each; the first block is a single frame
        pipeline=f"{_BASIC}.wan.wan_causal_dmd_pipeline.WanCausalDMDPipeline",
        config=f"{_CONFIGS}.wan.SelfForcingWan2_2_T2V480PConfig",
        model=f"{_DITS}.causal_wanvideo.CausalWanTransformer3DModel",
        arch={**_WAN, "boundary_ratio": 0.875},
        size=(9, 8, 12),
        prompt=((7, 32),),
        scheduler=_self_forcing,
        experts=True,
    ),
    "causal_wan_steps": Case(  # not distilled: every block through all timesteps of a multi-step scheduler
        pipeline=f"{_BASIC}.wan.wan_causal_pipeline.WanCausalPipeline",
        config=f"{_CONFIGS}.wan.SelfForcingWanT2V480PConfig",
        model=f"{_DITS}.causal_wanvideo.CausalWanTransformer3DModel",
        arch={**_WAN, "local_attn_size": 6},
        size=(9, 8, 12),
        request={"num_inference_steps": 3},
        prompt=((7, 32),),
    ),
    "wan": Case(
        pipeline=f"{_BASIC}.wan.wan_pipeline.WanPipeline",
        config=f"{_CONFIGS}.wan.WanT2V480PConfig",
        model=f"{_DITS}.wanvideo.WanTransformer3DModel",
        arch=_WAN,
        size=(3, 8, 12),
        request={"num_inference_steps": 4, "guidance_scale": 3.0},
        prompt=((7, 32),),
    ),
    "wan22": Case(
        pipeline=f"{_BASIC}.wan.wan_pipeline.WanPipeline",
        config=f"{_CONFIGS}.wan.WanT2V480PConfig",
        model=f"{_DITS}.wanvideo.WanTransformer3DModel",
        arch={**_WAN, "boundary_ratio": 0.875},
        size=(3, 8, 12),
        request={"num_inference_steps": 6, "guidance_scale": 3.0, "guidance_scale_2": 4.0},
        prompt=((7, 32),),
        experts=True,
    ),
    "wan_i2v": Case(
        pipeline=f"{_BASIC}.wan.wan_i2v_pipeline.WanImageToVideoPipeline",
        config=f"{_CONFIGS}.wan.WanI2V480PConfig",
        model=f"{_DITS}.wanvideo.WanTransformer3DModel",
        arch={**_WAN, "in_channels": 36, "out_channels": 16, "image_dim": 24, "added_kv_proj_dim": 48},
        size=(3, 8, 12),
        request={"num_inference_steps": 3, "guidance_scale": 3.0},
        prompt=((7, 32),),
        image=True,
    ),
    "wan_dmd": Case(
        pipeline=f"{_BASIC}.wan.wan_dmd_pipeline.WanDMDPipeline",
        config=f"{_CONFIGS}.wan.FastWan2_1_T2V_480P_Config",
        model=f"{_DITS}.wanvideo.WanTransformer3DModel",
        arch=_WAN,
        size=(3, 8, 12),
        request={"num_inference_steps": 3},
        prompt=((7, 32),),
    ),
    "hunyuan": Case(
        pipeline=f"{_BASIC}.hunyuan.hunyuan_pipeline.HunyuanVideoPipeline",
        config=f"{_CONFIGS}.hunyuan.HunyuanConfig",
        model=f"{_DITS}.hunyuanvideo.HunyuanVideoTransformer3DModel",
        arch={**_HUNYUAN, "num_single_layers": 2, "pooled_projection_dim": 16, "guidance_embeds": True},
        size=(3, 8, 12),
        request={"num_inference_steps": 4},
        prompt=((7, 32), (16,)),
        scheduler=_flow_match,
    ),
    "hunyuan15": Case(
        pipeline=f"{_BASIC}.hunyuan15.hunyuan15_pipeline.HunyuanVideo15Pipeline",
        config=f"{_CONFIGS}.hunyuan15.Hunyuan15T2V480PConfig",
        model=f"{_DITS}.hunyuanvideo15.HunyuanVideo15Transformer3DModel",
        arch={**_HUNYUAN, "text_embed_2_dim": 20, "image_embed_dim": 1152, "in_channels": 9, "out_channels": 4},
        size=(3, 4, 6),
        # ByT5's are in float32, for whose layer norm CUDA's autocast casts the weights and the CPU's does not.
        settings={"text_encoder_precisions": ("bf16", "bf16")},
        request={"num_inference_steps": 4, "guidance_scale": 6.0},
        prompt=((7, 32), (4, 20)),
        scheduler=_flow_match,
        ratio=16,
    ),
    "matrixgame3": Case(  # three clips: the first without memory, the others with five frames of it
        pipeline=f"{_BASIC}.matrixgame3.matrixgame3_i2v_pipeline.MatrixGame3I2VPipeline",
        config=f"{_CONFIGS}.matrixgame3.MatrixGame3I2V720PConfig",
        model=f"{_DITS}.matrixgame3.model.MatrixGame3WanModel",
        arch={
            **_WAN,
            "num_layers": 3,
            "in_channels": 16,
            "out_channels": 16,
            "camera_embed_in_channels": 6 * 8 * 8,
            "action_config": _actions(48, blocks=2, keyboard=6),
        },
        size=(35, 4, 6),
        request={"num_inference_steps": 3},
        prompt=((7, 32),),
        image=True,
        actions=(2, 6),
    ),
}
CASES["matrixgame3_base"] = Case(  # not distilled: a second pass with neither actions nor memory
    **{
        **vars(CASES["matrixgame3"]),
        "request": {"num_inference_steps": 3, "guidance_scale": 4.0, "use_base_model": True},
    }
)


def main(names: list[str]) -> int:
    """Run the cases named, or all, and say whether each repeats bit for bit."""
    start = time.perf_counter()
    prepare()
    print(f"torch {torch.__version__}, FastVideo imported in {time.perf_counter() - start:.1f} s")
    same = [_show(name) for name in names or CASES]
    print(f"{time.perf_counter() - start:.1f} s", "OK" if all(same) else "DIFFERENT")
    return 0 if all(same) else 1


def _show(name: str) -> bool:
    tiny = make(name)
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, key=key: calls.append(key))
        for key, module in tiny.pipeline.modules.items()
        if key.startswith("transformer")
    ]
    start = time.perf_counter()
    latents = run(tiny)
    seconds = time.perf_counter() - start
    forwards = len(calls)
    for hook in hooks:
        hook.remove()
    checks = {
        "again": run(tiny),
        "rebuilt": run(make(name)),
        "stage": run_stage(tiny.stage, tiny.batch(), tiny.args).float(),
    }
    if hasattr(tiny.stage, "_initialize_kv_cache"):
        with int_indices(tiny.stage):
            checks["ints"] = run(tiny)
    equal = {key: torch.equal(latents, other) for key, other in checks.items()}
    equal["another seed differs"] = not torch.equal(latents, run(tiny, seed=1))
    if hasattr(tiny.stage, "streaming_step"):
        streamed = stream(tiny)
        equal["stream"] = torch.equal(streamed, stream(tiny)) and bool(streamed.isfinite().all())
    equal["finite"] = bool(latents.isfinite().all()) and bool(latents.std() > 0)
    wrong = [key for key, value in equal.items() if not value]
    print(
        f"{name:18} {type(tiny.stage).__name__:30} {forwards:3} forwards {str(tuple(latents.shape)):22} "
        f"{hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()[:16]} {seconds:5.2f} s  "
        + (f"NOT {', '.join(wrong)}" if wrong else f"same: {', '.join(checks)}")
    )
    return not wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
