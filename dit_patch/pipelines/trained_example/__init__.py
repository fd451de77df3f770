"""A small Wan that was really trained: its clips show one coloured shape moving, as the prompt says.

Random weights cannot show the speed or the quality of step caching: the residuals of an untrained model say nothing
about those of a trained one. This is a real `WanPipeline` around a real `WanTransformer3DModel`,
small enough to be trained in minutes on a CPU (`python -m dit_patch.pipelines.trained_example.train`) and to ship.
Only the VAE is not one: it rearranges 2x2 pixels into channels, so that every pixel is the transformer's own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput

HERE = Path(__file__).parent / "weights"
COLOURS = {"red": (1.0, -0.6, -0.6), "green": (-0.7, 0.8, -0.5), "blue": (-0.6, -0.3, 1.0), "yellow": (1.0, 0.9, -0.7)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
PROMPTS = tuple(f"a {colour} {shape} moving {way}" for colour in COLOURS for shape in SHAPES for way in DIRECTIONS)
SIZE, FRAMES, TEXT_TOKENS = 32, 6, 16
# The pipeline makes one frame for each `scale_factor_temporal`, here 1, and one more.
CALL = {"height": SIZE, "width": SIZE, "num_frames": FRAMES - 1, "max_sequence_length": TEXT_TOKENS}
CALL["guidance_scale"] = 3.0
"""Call arguments of the pipeline: the sizes that it was trained at."""


class PixelVAE(ModelMixin, ConfigMixin):
    """A lossless stand-in for a VAE: pixels (B, 3, F, 2h, 2w) in [-1, 1] to latents (B, 12, F, h, w)."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.register_to_config(
            z_dim=12, latents_mean=[0.0] * 12, latents_std=[1.0] * 12, scale_factor_temporal=1, scale_factor_spatial=2
        )
        self.register_buffer("device_and_dtype", torch.zeros(1), persistent=False)  # pipelines ask for both

    def decode(self, latents, return_dict: bool = True):
        """Return pixels (B, 3, F, 2h, 2w) of latents (B, 12, F, h, w)."""
        b, _, f, h, w = latents.shape
        pixels = latents.view(b, 3, 2, 2, f, h, w).permute(0, 1, 4, 5, 2, 6, 3).reshape(b, 3, f, 2 * h, 2 * w)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    @staticmethod
    def encode(pixels):
        """Return latents (B, 12, F, h, w) of pixels (B, 3, F, 2h, 2w)."""
        b, _, f, height, width = pixels.shape
        parts = pixels.view(b, 3, f, height // 2, 2, width // 2, 2)
        return parts.permute(0, 1, 4, 6, 2, 3, 5).reshape(b, 12, f, height // 2, width // 2)


def pipeline():
    """Load the trained `WanPipeline`; call it with a prompt of `PROMPTS` and `CALL`."""
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(HERE, vae=PixelVAE(), local_files_only=True)
