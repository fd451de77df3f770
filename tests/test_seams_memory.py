"""Memory that is written without a version: NumPy, DLPack, shared memory, other ranks; between two generations."""

import numpy
import pytest
import torch
from seams import case, warm

from dit_patch.contribute import verify
from dit_patch.handle import apply
from dit_patch.pipelines import tiny_pipelines

LOUD = pytest.mark.filterwarnings("ignore::dit_patch.findings.DitPatchWarning")
"""It may step aside, and says so."""


def numpy_view(tensor, values):
    tensor.numpy()[...] = values.numpy()


def dlpack(tensor, values):
    torch.from_dlpack(torch.utils.dlpack.to_dlpack(tensor)).copy_(values)


def from_dlpack(tensor, values):
    numpy.from_dlpack(tensor)
    torch.from_dlpack(tensor).copy_(values)


def storage(tensor, values):
    tensor.untyped_storage().copy_(values.clone().untyped_storage())


def typed(tensor, values):
    torch.frombuffer(tensor.numpy(), dtype=tensor.dtype).copy_(values.flatten())


def data(tensor, values):
    tensor.data.copy_(values)


def other_data(tensor, values):
    tensor.data = values.clone()


def in_place(tensor, values):
    tensor.copy_(values)


def view(tensor, values):
    tensor.view(-1)[:] = values.view(-1)


def foreach(tensor, values):
    torch._foreach_copy_([tensor], [values])


def shared(tensor, values):
    torch.frombuffer(memoryview(tensor.share_memory_().numpy()), dtype=tensor.dtype).copy_(values.flatten())


def set_source(tensor, values):
    tensor.set_(values.clone())


def inference(tensor, values):
    with torch.inference_mode():
        tensor.copy_(values)


WRITES = {
    write.__name__: write
    for write in (
        numpy_view,
        dlpack,
        from_dlpack,
        storage,
        typed,
        data,
        other_data,
        in_place,
        view,
        foreach,
        shared,
        set_source,
        inference,
    )
}


def every(kind):
    return pytest.mark.parametrize("write", [case(f"memory: {kind} {name}", write) for name, write in WRITES.items()])


def prompts(calls):
    return list({id(call["encoder_hidden_states"]): call["encoder_hidden_states"] for call in calls}.values())


@LOUD
@every("bare")
def test_a_prompt_buffer_that_is_refilled_before_the_next_generation(wan, write):
    """A bare model, whose loop says where a generation begins."""
    calls = wan.calls()
    handle = wan.apply()
    for _ in range(3):
        handle.begin_generation()
        wan.agree(calls)
    before = verify.run(wan.plain, calls)
    for prompt in prompts(calls):
        write(prompt, prompt.flip(1).clone() * 2)
    handle.begin_generation()
    wan.agree(calls)
    wan.agree(calls)
    assert verify.first_difference(before, verify.run(wan.plain, calls)) is not None


@pytest.fixture(scope="module")
def pipelines():
    from diffusers import FlowMatchEulerDiscreteScheduler

    made = [tiny_pipelines.wan_pipeline(num_layers=1) for _ in range(2)]
    for each in made:
        each.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        each.set_progress_bar_config(disable=True)
    return made


def latents(pipeline, prompt, negative, steps=3):
    return pipeline(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        height=16,
        width=16,
        num_frames=1,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames


@LOUD
@every("pipeline")
def test_a_prompt_buffer_that_is_refilled_between_two_calls_of_a_pipeline(pipelines, write):
    """Nobody says where a generation begins: what the loop does has to tell."""
    patched, plain = pipelines
    generator = torch.Generator().manual_seed(1)
    prompt, negative, other = (torch.randn(1, 8, 64, generator=generator) for _ in range(3))
    with apply(patched):
        before = latents(plain, prompt, negative)
        for _ in range(3):
            assert torch.equal(latents(patched, prompt, negative), before)
        write(prompt, other)
        after = latents(plain, prompt, negative)
        assert not torch.equal(before, after)
        for _ in range(2):
            assert torch.equal(latents(patched, prompt, negative), after)


@LOUD
@pytest.mark.parametrize("steps", [case(f"memory: {steps} steps", steps) for steps in (1, 2, 5)])
def test_generations_of_any_length(pipelines, steps):
    patched, plain = pipelines
    generator = torch.Generator().manual_seed(2)
    prompt, negative = (torch.randn(1, 8, 64, generator=generator) for _ in range(2))
    with apply(patched):
        for _ in range(4):
            assert torch.equal(latents(patched, prompt, negative, steps), latents(plain, prompt, negative, steps))
            numpy_view(prompt, prompt.flip(1).clone())


@LOUD
def test_a_result_that_a_hook_writes_into(wan):
    """Hooks get what is handed out, and may write into it."""

    def shift(_, args, output):
        output[0].add_(0.5)

    calls = wan.calls(1)
    wan.apply()
    for model in wan.both:
        model.condition_embedder.text_embedder.register_forward_hook(lambda _, args, output: output.mul_(2))
        model.rope.register_forward_hook(shift)
    for _ in range(4):
        wan.agree(calls)


RESULTS = ("in_place", "view", "data", "numpy_view")


@LOUD
@pytest.mark.parametrize("write", [case(f"memory: result {name}", WRITES[name]) for name in RESULTS])
def test_a_result_that_is_written_into_after_the_forward(wan, write):
    """Whoever keeps what a hook saw, and writes into it later, does so to each model's own."""
    calls = wan.calls(1)
    seen = [[], []]
    for model, found in zip(wan.both, seen):
        model.condition_embedder.text_embedder.register_forward_hook(
            lambda _, args, output, found=found: found.append(output)
        )
    warm(wan, calls)
    for found in seen:
        write(found[-1].detach(), torch.zeros_like(found[-1]))
    for _ in range(2):
        wan.agree(calls)


@pytest.mark.parametrize(
    "write", [case(f"memory: weight {name}", WRITES[name]) for name in ("other_data", "in_place", "foreach", "view")]
)
def test_a_weight_that_is_written(wan, write):
    calls = wan.calls(1)
    wan.apply()
    for factor in (2, 3):
        for _ in range(3):
            wan.agree(calls)
        for model in wan.both:
            weight = model.condition_embedder.text_embedder.linear_2.weight
            with torch.no_grad():
                write(weight, weight.detach() * factor)
    wan.agree(calls)
