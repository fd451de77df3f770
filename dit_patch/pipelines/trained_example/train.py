"""Train the small Wan of this package on synthetic clips, on a CPU.

`python -m dit_patch.pipelines.trained_example.train`

Flow matching as Wan's: the model is given (1 - s) * clip + s * noise at timestep 1000 * s, and predicts noise - clip.
The weights that are shipped took three rounds, two hours in all on two cores: the second with `--resume --seed 1`, the
third with `--resume --seed 2 --steps 1800`. In the first two the learning rate followed the clock instead of the steps,
and there was no `NOISY` share: shapes had their colours, and moved as it happened.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from ...upstream.diffusers_internals import t5_embeddings
from ...upstream.torch_internals import average_into, copy_into
from ..tiny_pipelines import t5_tokenizer, umt5_encoder
from . import COLOURS, DIRECTIONS, FRAMES, HERE, PROMPTS, SHAPES, SIZE, TEXT_TOKENS, PixelVAE
from . import pipeline as shipped

BATCH = 16
SHIFT = 3.0  # of the noise levels, as in sampling
NO_PROMPT = 0.1  # the share that is trained without a prompt, for classifier-free guidance
KEEP = 0.995  # of the averaged weights, at each step
NOISY, NOISIEST = 0.4, 0.12  # the share that is trained at noise levels from 1 - NOISIEST to 1 alone
SUPER = 3  # samples per pixel and axis, for smooth edges


def clip(prompt: str, generator: torch.Generator) -> torch.Tensor:
    """Return a clip for a prompt, float32 (3, FRAMES, SIZE, SIZE) in [-1, 1], with random place, size and speed."""
    _, colour, shape, _, way = prompt.split()
    radius, speed, *place = torch.rand(4, generator=generator).tolist()
    radius, speed = 5 + 3 * radius, 1.5 + 1.5 * speed
    path = speed * (FRAMES - 1)
    frames = []
    for frame in range(FRAMES):
        at = []
        for axis, sign in enumerate(DIRECTIONS[way]):
            room = SIZE - 2 * radius - abs(sign) * path
            start = radius + place[axis] * max(room, 0) + (path if sign < 0 else 0)
            at.append(start + sign * speed * frame)
        frames.append(_draw(shape, at, radius))
    inside = torch.stack(frames)
    back = torch.tensor([-0.9, -0.9, -0.85]).view(3, 1, 1, 1)
    return back + (torch.tensor(COLOURS[colour]).view(3, 1, 1, 1) - back) * inside


def _draw(shape: str, at: list[float], radius: float) -> torch.Tensor:
    """Return how much of each pixel the shape covers, (SIZE, SIZE) in [0, 1]."""
    line = (torch.arange(SIZE * SUPER) + 0.5) / SUPER
    y, x = line[:, None] - at[0], line[None, :] - at[1]
    if shape == "circle":
        inside = y.square() + x.square() <= radius**2
    elif shape == "square":
        inside = torch.maximum(y.abs(), x.abs() + 0 * y) <= 0.85 * radius
    else:
        inside = (y <= 0.75 * radius) & (2 * x.abs() - y <= radius)
    return torch.nn.functional.avg_pool2d(inside.float()[None], SUPER)[0]


def build(seed: int) -> WanPipeline:
    """Build the untrained pipeline."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer((*PROMPTS, "", ", ".join((*COLOURS, *SHAPES, *DIRECTIONS))))
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), in_channels=12, out_channels=12, num_attention_heads=4, attention_head_dim=32,
        ffn_dim=512, num_layers=8, freq_dim=64, text_dim=64, rope_max_seq_len=64,
    )  # fmt: skip
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=umt5_encoder(tokenizer),
        transformer=transformer,
        vae=PixelVAE(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
    )


def train(pipeline: WanPipeline, steps: int, seed: int, rate: float = 1.5e-3) -> None:
    """Train `pipeline.transformer` in place; its final weights are averaged over the last steps."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.cat([_embeds(pipeline, [prompt]) for prompt in PROMPTS])
    nothing = _embeds(pipeline, [""])
    model = pipeline.transformer.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    averaged = [parameter.detach().clone() for parameter in model.parameters()]
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * min(1, 3 * (1 - step / steps) + 0.02)
        chosen = torch.randint(len(PROMPTS), (BATCH,), generator=generator)
        clean = PixelVAE.encode(torch.stack([clip(PROMPTS[index], generator) for index in chosen]))
        noise = torch.randn(clean.shape, generator=generator)
        level = torch.sigmoid(torch.randn(BATCH, generator=generator) * 1.2)
        level = SHIFT * level / (1 + (SHIFT - 1) * level)
        # Which way the shape moves is decided where there is hardly anything but noise.
        noisy = 1 - NOISIEST * torch.rand(BATCH, generator=generator)
        level = torch.where(torch.rand(BATCH, generator=generator) < NOISY, noisy, level)
        s = level.view(-1, 1, 1, 1, 1)
        without = torch.rand(BATCH, generator=generator) < NO_PROMPT
        text = torch.where(without.view(-1, 1, 1), nothing, embeds[chosen])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = model((1 - s) * clean + s * noise, 1000 * level, text, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted.float(), noise - clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(KEEP, (step + 1) / (step + 10))
        average_into(averaged, (each.detach() for each in model.parameters()), 1 - keep)
        if step % 50 == 0:
            print(f"step {step}  {time.monotonic() - start:.0f} s  loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        copy_into(model.parameters(), averaged)
    model.eval()


def _embeds(pipeline: WanPipeline, prompts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return t5_embeddings(pipeline, prompts, TEXT_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="where the pipeline is saved (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2500, help="about a second each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on from the weights that are shipped")
    options = parser.parse_args()
    pipeline = shipped() if options.resume else build(options.seed)
    train(pipeline, options.steps, options.seed)
    pipeline.to(torch.float16).save_pretrained(options.out)


if __name__ == "__main__":
    main()
