"""`dit-patch demo` and the tiny pipelines it generates with: they are real, they survive a disk, and it can say no."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from dit_patch.errors import DitPatchError
from dit_patch.pipelines import demo, tiny_pipelines

pytestmark = pytest.mark.spread()

for module in demo.NEEDED:
    pytest.importorskip(module)

SIZE = (5, 32, 48)
STEP_CACHE = all(map(find_spec, ("cache_dit", "skimage")))
BUILDERS = {
    "wan": lambda: tiny_pipelines.wan_pipeline(num_layers=2),
    "wan22": lambda: tiny_pipelines.wan22_pipeline(num_layers=1),
    "hunyuan_video": lambda: tiny_pipelines.hunyuan_video_pipeline(num_layers=1, num_single_layers=1),
}


class DoesNothing:
    """A stand-in for a handle: patches nothing, and counts how often it was removed."""

    def __init__(self, pipeline, **options):
        self.pipeline, self.removals = pipeline, 0

    def remove(self):
        self.removals += 1

    def __str__(self):
        return "the report"


class ChangesPictures(DoesNothing):
    """A patch that is not lossless: it moves one bias of the transformer by a little, and remembers where it was."""

    def __init__(self, pipeline, **options):
        super().__init__(pipeline)
        self.bias = pipeline.transformer.proj_out.bias
        self.before = self.bias.detach().clone()
        with torch.no_grad():
            self.bias[0] += 1e-3

    def remove(self):
        super().remove()
        with torch.no_grad():
            self.bias.copy_(self.before)


class StaysBehind(ChangesPictures):
    """A patch that cannot be taken back."""

    def remove(self):
        pass


def generate(pipeline, prompt=demo.PROMPT, steps=2, **guidance):
    pipeline.set_progress_bar_config(disable=True)
    frames, height, width = SIZE
    return pipeline(
        prompt=prompt,
        negative_prompt=demo.NEGATIVE_PROMPT,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **guidance,
    ).frames[0]


def forwards(model):
    """A list that grows by one with each forward of `model`."""
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.fixture
def short_scenes(monkeypatch):
    """The demo's scenes with as few blocks as the tests can do with."""
    small = tuple(
        demo.Scene(scene.name, lambda seed, name=scene.name: BUILDERS[name](), scene.guidance) for scene in demo.SCENES
    )
    monkeypatch.setattr(demo, "SCENES", small)


@pytest.fixture
def no_step_cache(monkeypatch):
    """As where cache-dit is not installed: the demo leaves its last part out."""
    monkeypatch.setattr(demo, "find_spec", lambda name: None)


# The pipelines are real.


@pytest.mark.parametrize("name", BUILDERS)
def test_a_prompt_becomes_frames_that_show_something(name):
    video = generate(BUILDERS[name]())

    assert video.shape == (5, 3, 32, 48)
    assert video.isfinite().all()
    assert video.std() > 0.1


@pytest.mark.parametrize("name", BUILDERS)
def test_another_prompt_makes_other_frames(name):
    pipeline = BUILDERS[name]()

    assert demo.difference(generate(pipeline), generate(pipeline, prompt="a green stone")) is not None


@pytest.mark.parametrize("name", BUILDERS)
def test_a_saved_pipeline_loads_and_makes_the_same_frames(name, tmp_path):
    pipeline = BUILDERS[name]()
    pipeline.save_pretrained(tmp_path)

    loaded = type(pipeline).from_pretrained(tmp_path, local_files_only=True)

    for module in loaded.components.values():
        for weight in module.parameters() if isinstance(module, torch.nn.Module) else ():
            # Mapped from the file it may lie at an odd address, where some processors sum in another order.
            weight.data = weight.data.clone()
    assert demo.difference(generate(pipeline), generate(loaded)) is None


def test_both_experts_of_wan22_are_used():
    pipeline = BUILDERS["wan22"]()
    high_noise, low_noise = forwards(pipeline.transformer), forwards(pipeline.transformer_2)

    generate(pipeline, steps=4)

    assert high_noise and low_noise
    assert len(high_noise) + len(low_noise) == 4 * 2


@pytest.mark.parametrize("scene", demo.SCENES, ids=lambda scene: scene.name)
def test_the_guidance_of_the_demo_runs_two_passes_a_step(scene):
    pipeline = BUILDERS[scene.name]()
    calls = forwards(pipeline.transformer)

    generate(pipeline, steps=3, **scene.guidance)

    assert len(calls) == 3 * 2


def test_the_prompt_template_of_hunyuan_video_is_as_long_as_what_the_pipeline_crops():
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    start, _ = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")

    assert len(tiny_pipelines.llama3_tokenizer()(start).input_ids) == DEFAULT_PROMPT_TEMPLATE["crop_start"]


def test_building_leaves_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)

    BUILDERS["wan"]()

    assert torch.equal(torch.rand(4), expected)


def test_a_seed_names_the_weights():
    first, same, other = (tiny_pipelines.wan_pipeline(seed, num_layers=1).transformer for seed in (1, 1, 2))

    assert torch.equal(first.proj_out.weight, same.proj_out.weight)
    assert not torch.equal(first.proj_out.weight, other.proj_out.weight)


# What the demo says.


def test_the_demo_is_identical_with_the_real_patches(no_step_cache, tmp_path, capsys):
    pytest.importorskip("diffusers", minversion="0.36", reason="diffusers/wan requires it")

    code = demo.run_demo(tmp_path / "out", steps=2, size=SIZE)

    printed = capsys.readouterr().out
    assert code == 0
    assert printed.count("identical: yes") == 2
    assert printed.count("removed:   identical again") == 2


def test_a_patch_that_changes_a_picture_is_told_with_the_place(short_scenes, no_step_cache, tmp_path, capsys):
    code = demo.run_demo(tmp_path, steps=2, size=SIZE, apply=ChangesPictures)

    printed = capsys.readouterr().out
    assert code == 1
    assert printed.count("identical: no, first in frame 0 of 5; largest difference ") == 2
    assert printed.count("removed:   identical again") == 2


def test_a_patch_that_cannot_be_taken_back_is_told(short_scenes, no_step_cache, tmp_path, capsys):
    code = demo.run_demo(tmp_path, steps=2, size=SIZE, apply=StaysBehind)

    assert code == 1
    assert capsys.readouterr().out.count("removed:   no, first in frame 0 of 5; largest difference ") == 2


def test_the_report_comes_first_and_the_files_last(short_scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "STEP_CACHE_STEPS", 4)
    demo.run_demo(tmp_path, steps=1, size=SIZE, apply=DoesNothing)

    lines = capsys.readouterr().out.splitlines()
    assert lines.index("the report") < lines.index("identical: yes")
    files = ["wan.png", "wan.mp4", "hunyuan_video.png", "hunyuan_video.mp4", *["step_cache.png"] * STEP_CACHE]
    assert lines[-len(files) :] == [str(tmp_path / name) for name in files]
    assert all((tmp_path / name).stat().st_size for name in files)
    assert STEP_CACHE or any(line.startswith("no step cache shown, since cache-dit") for line in lines)


@pytest.mark.skipif(not STEP_CACHE, reason="needs cache-dit and scikit-image")
def test_the_step_cache_is_faster_and_says_what_it_costs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "SCENES", ())
    monkeypatch.setattr(demo, "STEP_CACHE_STEPS", 16)
    assert demo.run_demo(tmp_path) == 0

    said = capsys.readouterr().out
    assert "identical with the exact caches: yes" in said
    assert re.search(r"\d+ of 16 steps cached", said)
    assert re.search(r"with the step cache: \d\.\d\dx as fast in this one run, SSIM 0\.[89]", said)


def test_the_patches_are_removed_when_a_generation_fails(short_scenes, tmp_path):
    handles = []

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    def break_decoder(pipeline):
        pipeline.vae.decode = fail
        handles.append(DoesNothing(pipeline))
        return handles[0]

    with pytest.raises(RuntimeError, match="out of memory"):
        demo.run_demo(tmp_path, steps=1, size=SIZE, apply=break_decoder)

    assert [handle.removals for handle in handles] == [1]


# What it writes.


def test_without_ffmpeg_the_video_is_a_gif(tmp_path, monkeypatch, capsys):
    from PIL import Image

    def no_ffmpeg(path, frames):
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setattr(demo, "write_mp4", no_ffmpeg)
    ramp = torch.linspace(0, 1, 3)[:, None, None, None].expand(3, 3, 16, 16)

    path = demo._write_video(tmp_path / "wan.mp4", ramp, ramp)

    assert path == tmp_path / "wan.gif"
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.size) == (3, (32, 32))
    assert "wan.gif instead" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "package"), [("imageio", "imageio"), ("PIL", "pillow"), ("diffusers", "diffusers")])
def test_what_is_missing_is_named_with_the_remedy(module, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(DitPatchError) as raised:
        demo.run_demo(tmp_path / "out")

    assert str(raised.value) == f"the demo needs {package}: pip install 'dit-patch[demo]'"
    assert not (tmp_path / "out").exists()


def test_importing_the_demo_imports_neither_torch_nor_diffusers():
    heavy = {"torch", "diffusers", "transformers", "PIL"}
    program = f"import sys, dit_patch.pipelines.demo; sys.exit(bool({heavy} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
