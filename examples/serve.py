"""A worker that serves requests for a long time: patch once, watch the memory, report now and then.

    python examples/serve.py --requests 3

It shows what a server needs: the logger instead of warnings, a bound for the caches, the report as JSON.
"""

import argparse
import json
import logging

import torch

import dit_patch
from dit_patch.pipelines import loading

PROMPTS = ("a red circle moving up", "a blue square moving left", "a green triangle moving down")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=3)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)

    pipeline = loading.load("shapes", torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    handle = dit_patch.apply(pipeline, max_bytes=64 << 20)
    call = {**loading.call_defaults("shapes"), "num_inference_steps": 8, "output_type": "pt"}
    for number in range(options.requests):
        pipeline(prompt=PROMPTS[number % len(PROMPTS)], **call)
        hits = sum(row.hits for row in handle.stats())
        logging.info("request %d: %d hits so far, %.2f MiB held", number, hits, handle.nbytes / 2**20)
    print(json.dumps([row.as_dict() for row in handle.stats()]))


if __name__ == "__main__":
    main()
