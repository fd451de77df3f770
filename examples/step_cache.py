"""Trade likeness for speed: find a threshold on your own prompts, keep it in a file, and use it.

    python examples/step_cache.py --target 1.1x --out shapes.yaml

The output changes, and the program prints by how much. It needs the extra `cache-bench`.
"""

import argparse

import torch

import dit_patch
from dit_patch.pipelines import loading

PROMPT = "a red circle moving up"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", default="1.1x", help="speed-up of the whole call")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--out", default="step_cache.yaml")
    options = parser.parse_args()

    pipeline = loading.load("shapes", torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    call = {**loading.call_defaults("shapes"), "num_inference_steps": options.steps}
    base = {"preset": "performance", "fn": 1, "warmup": 2}
    found = dit_patch.StepCache.calibrate(pipeline, [PROMPT], options.target, step_cache=base, **call)
    print(found.calibration)
    found.save(options.out)

    with dit_patch.apply(pipeline, step_cache=options.out) as handle:
        pipeline(prompt=PROMPT, **call)
        print(handle)


if __name__ == "__main__":
    main()
