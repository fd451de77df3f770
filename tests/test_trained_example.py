"""The small trained pipeline: what it shows is what the prompt says, or figures of quality would mean nothing."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("ftfy", reason="needs ftfy")

from dit_patch.errors import DitPatchError  # noqa: E402
from dit_patch.pipelines import loading, sampling, trained_example  # noqa: E402
from dit_patch.pipelines.demo import SHAPES_PROMPT, STEP_CACHE_STEPS  # noqa: E402

SHOWN = (*trained_example.PROMPTS[::5], *trained_example.PROMPTS[2::8])  # every colour, shape and direction


@pytest.fixture(scope="module")
def pipeline():
    try:
        made = loading.load(loading.TRAINED_EXAMPLE, torch.float32)
    except DitPatchError as error:
        pytest.skip(str(error))
    made.set_progress_bar_config(disable=True)
    return made


def moves(frames):
    """Which way the centre of what is not background goes, and its mean colour."""
    background = torch.tensor([-0.9, -0.9, -0.85]).view(3, 1, 1) * 0.5 + 0.5
    weight = (frames - background).abs().sum(1)
    weight = weight * (weight > 0.4)
    total = weight.sum((1, 2)).clamp(min=1e-6)
    at = torch.arange(float(trained_example.SIZE))
    y, x = ((weight * at.view(shape)).sum((1, 2)) / total for shape in ((1, -1, 1), (1, 1, -1)))
    down, right = float(y[-1] - y[0]), float(x[-1] - x[0])
    way = ("down" if down > 0 else "up") if abs(down) > abs(right) else ("right" if right > 0 else "left")
    colour = (frames * weight[:, None]).sum((0, 2, 3)) / weight.sum()
    known = {name: (torch.tensor(rgb) * 0.5 + 0.5) for name, rgb in trained_example.COLOURS.items()}
    return way, min(known, key=lambda name: float((known[name] - colour).abs().sum()))


def generated(pipeline, prompt, seed, steps=20):
    return sampling.generate(pipeline, prompt, seed, {**trained_example.CALL, "num_inference_steps": steps}).frames


def test_shapes_move_as_the_prompt_says_and_have_its_colour(pipeline):
    found = {prompt: moves(generated(pipeline, prompt, seed)) for seed, prompt in enumerate(SHOWN)}
    wrong_way = [prompt for prompt, (way, _) in found.items() if not prompt.endswith(way)]
    wrong_colour = [prompt for prompt, (_, colour) in found.items() if colour not in prompt]
    assert len(wrong_way) <= len(SHOWN) // 8 and len(wrong_colour) <= len(SHOWN) // 8, (wrong_way, wrong_colour)


def test_the_demo_shows_what_it_says(pipeline):
    way, colour = moves(generated(pipeline, SHAPES_PROMPT, seed=0, steps=STEP_CACHE_STEPS))
    assert SHAPES_PROMPT.endswith(way) and colour in SHAPES_PROMPT
