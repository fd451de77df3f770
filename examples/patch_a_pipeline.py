"""Patch a diffusers pipeline, compare it with itself unpatched, and take everything back.

    python examples/patch_a_pipeline.py
    python examples/patch_a_pipeline.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat" --device cuda

Without `--model` it runs the small trained pipeline that comes with dit_patch, on a CPU, in seconds.
"""

import argparse

import torch

import dit_patch
from dit_patch.pipelines import loading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="shapes", help="folder or hub id of a diffusers pipeline")
    parser.add_argument("--prompt", default="a red circle moving up")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    pipeline = loading.load(options.model, torch.bfloat16).to(options.device)
    call = {**loading.call_defaults(options.model), "prompt": options.prompt, "num_inference_steps": options.steps}

    def generate() -> torch.Tensor:
        return pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="pt").frames

    plain = generate()
    with dit_patch.apply(pipeline) as handle:
        patched = generate()
        print(handle)
    print("identical:", "yes" if torch.equal(plain, patched) else "NO")


if __name__ == "__main__":
    main()
