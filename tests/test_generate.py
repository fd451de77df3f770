"""`dit-patch generate`, as somebody at a shell meets it: what it writes is read back, and what it refuses is quoted."""

import http.server
import os
import re
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from packaging.version import Version

from dit_patch import cli, extras
from dit_patch.errors import DitPatchError
from dit_patch.pipelines import generate, loading, tiny_pipelines

diffusers, huggingface_hub = pytest.importorskip("diffusers"), pytest.importorskip("huggingface_hub")
Image = pytest.importorskip("PIL.Image", reason="needs pillow")
for module in ("transformers", "accelerate", "ftfy"):
    pytest.importorskip(module)

PROMPT = "a red balloon drifts over a quiet harbour"
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 2}
CALL = ["--height", 32, "--width", 48, "--frames", 5, "--steps", 3, "--dtype", "float32"]
CALL += ["--call", "max_sequence_length=16"]
PATCHABLE = pytest.mark.skipif(Version(diffusers.__version__) < Version("0.36"), reason="diffusers/wan requires 0.36")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with pipelines that were saved: Wan from text and from a picture, and one that takes no prompt."""
    folder = tmp_path_factory.mktemp("saved")
    wan = tiny_pipelines.wan_pipeline(**SMALL)
    wan.save_pretrained(folder / "wan")
    parts = {name: part for name, part in wan.components.items() if name in ("tokenizer", "text_encoder", "vae")}
    diffusers.WanImageToVideoPipeline(
        **parts,
        scheduler=wan.scheduler,
        image_processor=None,
        image_encoder=None,
        transformer=tiny_pipelines.wan_pipeline(in_channels=36, **SMALL).transformer,
    ).save_pretrained(folder / "wan_i2v")
    unet = {"layers_per_block": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}
    unet |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    diffusers.ConsistencyModelPipeline(
        diffusers.UNet2DModel(sample_size=16, **unet), diffusers.CMStochasticIterativeScheduler()
    ).save_pretrained(folder / "pictures")
    return folder


@pytest.fixture
def run(saved, tmp_path, monkeypatch, capsys):
    """Runs `dit-patch generate` in a folder of its own with the model of that name: status, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(model, *words):
        status = cli.main(["generate", "--model", str(saved / model), *map(str, words)])
        return status, *capsys.readouterr()

    return run


def frames_in(path):
    with Image.open(path) as file:
        found = []
        for number in range(getattr(file, "n_frames", 1)):
            file.seek(number)
            found.append(file.convert("RGB").copy())
    return found


def colours(picture):
    return len(set(picture.tobytes()))


# What comes out.


def test_a_video_and_the_timings(run, tmp_path):
    imageio = pytest.importorskip("imageio")
    pytest.importorskip("imageio_ffmpeg")
    status, out, err = run("wan", *CALL, "--prompt", PROMPT, "--out", "it.mp4", "--fps", 12)
    assert status == 0, err
    with imageio.get_reader(tmp_path / "it.mp4") as reader:
        assert reader.get_meta_data()["fps"] == 12
        frames = list(reader.iter_data())
    assert [frame.shape for frame in frames] == [(32, 48, 3)] * 5 and frames[0].std() > 10
    assert re.search(r"^WanPipeline on cpu, loaded in \d+\.\d s$", out, re.M)
    assert re.search(r"^generated: 5 frames of 32x48 in \d+\.\d\d s, 3 steps at \d+\.\d\d a second$", out, re.M)
    assert "nothing patched" in out and out.splitlines()[-1] == "it.mp4"
    assert "generating: 100%" in err and "3/3" in err


@PATCHABLE
def test_patches_are_reported_and_a_seed_makes_the_same_frames_with_and_without(run, tmp_path):
    words = [*CALL, "--prompt", PROMPT, "--negative-prompt", "blurred", "--guidance", 4]
    plain, patched = (run("wan", *words, "--out", name, *more) for name, more in (("a", []), ("b", ["--patch-model"])))
    other = run("wan", *words, "--seed", 1, "--out", "c")
    assert [status for status, _, _ in (plain, patched, other)] == [0, 0, 0]
    row = re.search(r"rope\.forward +(\d+) +(\d+) ", patched[1])
    assert (int(row[1]), int(row[2])) == (5, 1)  # three steps with CFG
    assert "rope.forward" not in plain[1]
    made = {name: [frames_in(path)[0] for path in sorted((tmp_path / name).iterdir())] for name in "abc"}
    assert len(made["a"]) == 5 and colours(made["a"][0]) > 20
    assert made["a"] == made["b"] != made["c"]


@PATCHABLE
def test_what_is_compared_is_said_to_be_identical_with_both_times(run, tmp_path):
    words = [*CALL, "--prompt", PROMPT, "--out", "x.gif", "--patch-model", "rope"]
    status, out, err = run("wan", *words, "--compare")
    assert status == 0, err
    assert "identical: yes" in out
    assert re.search(r"^plain \d+\.\d\d s, patched \d+\.\d\d s: \d+\.\d\dx as fast", out, re.M)
    assert "rope.forward" in out and "text_embedder" not in out
    assert [frame.size for frame in frames_in(tmp_path / "x.gif")] == [(48, 32)] * 5
    assert not (tmp_path / "x-plain.gif").exists()


@PATCHABLE
def test_to_compare_alone_is_to_compare_with_the_lossless_patches(run):
    status, out, _ = run("wan", *CALL, "--prompt", PROMPT, "--compare", "--out", "x.png")
    assert status == 0 and "identical: yes" in out and "text_embedder" in out


@PATCHABLE
def test_a_patch_that_changes_the_frames_is_told_and_both_are_written(run, tmp_path, monkeypatch):
    from_args = generate.flags.from_args

    def harmful(pipeline, args):
        with torch.no_grad():
            pipeline.transformer.proj_out.bias[0] += 0.1
        return from_args(pipeline, args)

    monkeypatch.setattr(generate.flags, "from_args", harmful)
    status, out, _ = run("wan", *CALL, "--prompt", PROMPT, "--compare", "--out", "x.png")
    assert status == 1 and "identical: no, first in frame 0 of 5; largest difference " in out
    one, other = (frames_in(tmp_path / name)[0] for name in ("x.png", "x-plain.png"))
    assert one.size == other.size and one != other


@PATCHABLE
def test_a_step_cache_differs_as_it_was_asked_to(run, tmp_path):
    pytest.importorskip("cache_dit", reason="needs cache-dit")
    words = [*CALL, "--prompt", PROMPT, "--steps", 16, "--step-cache", "performance", "--out", "x"]
    status, out, err = run("wan", *words, "--compare")
    assert status == 0, err
    assert "identical: no" in out and "(as a step cache was asked for)" in out
    assert re.search(r"\d+ of 16 steps cached", out)
    assert len(list((tmp_path / "x-plain").iterdir())) == len(list((tmp_path / "x").iterdir())) == 5


def test_a_png_of_a_video_is_a_contact_sheet_and_of_one_frame_the_frame(run, tmp_path):
    words = [*CALL, "--prompt", PROMPT]
    assert run("wan", *words, "--out", "sheet.png")[0] == run("wan", *words, "--frames", 1, "--out", "one.png")[0] == 0
    assert frames_in(tmp_path / "sheet.png")[0].size == (64 + 5 * (48 + 4), 20 + 32 + 4)
    [picture] = frames_in(tmp_path / "one.png")
    assert picture.size == (48, 32) and colours(picture) > 20


def test_a_pipeline_of_pictures_without_a_prompt_and_several_at_once(run, tmp_path):
    status, out, err = run("pictures", "--steps", 2, "--dtype", "float32", "--call", "batch_size=2")
    assert status == 0, err
    assert "2 times a picture of 16x16" in out
    one, other = (frames_in(tmp_path / f"dit-patch-{number}.png")[0] for number in (0, 1))
    assert one.size == (16, 16) and one != other


def test_a_picture_to_begin_with(run, tmp_path):
    made = {}
    for name, colour in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{name}.png")
        words = [*CALL, "--prompt", PROMPT, "--image", f"{name}.png", "--out", name]
        status, _, err = run("wan_i2v", *words)
        assert status == 0, err
        made[name] = [frames_in(path)[0] for path in sorted((tmp_path / name).iterdir())]
    assert len(made["red"]) == 5 and made["red"] != made["blue"]


def test_a_program_of_its_own_from_the_first_word_to_the_file(saved, tmp_path):
    words = ["generate", "--model", saved / "wan", *CALL, "--prompt", PROMPT, "--out", tmp_path / "x.gif"]
    done = subprocess.run(
        [sys.executable, "-m", "dit_patch", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "x.gif") and len(frames_in(tmp_path / "x.gif")) == 5


# Where it runs.


@PATCHABLE
def test_with_group_offload_the_frames_are_the_same(run):
    words = [*CALL, "--prompt", PROMPT, "--offload", "group", "--compare", "--out", "x.png"]
    status, out, err = run("wan", *words)
    assert status == 0, err
    assert "identical: yes" in out and re.search(r"rope\.forward +5 +1 ", out)


@PATCHABLE
@pytest.mark.parametrize(
    "what, classes, hits, warned",
    [
        ("blocks", ["WanTransformerBlock"] * 2, r"rope\.forward +5 +1 ", False),
        ("model", ["WanTransformer3DModel"], r"rope\.forward +0 +0 ", True),
    ],
    ids=["blocks", "model"],
)
def test_compiled_blocks_hit_and_a_compiled_model_is_warned_of(what, classes, hits, warned, run, monkeypatch):
    compiled = []

    def eager(module):
        compiled.append(type(module).__name__)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    words = [*CALL, "--prompt", PROMPT, "--compile", what, "--patch-model", "--out", "x.png"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        status, out, err = run("wan", *words)
    torch.compiler.reset()
    said = " ".join(str(each.message) for each in caught)
    assert status == 0, err
    assert compiled == classes and re.search(hits, out)
    assert ("is compiled as a whole" in said) == warned


def test_of_a_model_that_does_not_name_its_blocks_it_is_said_that_it_runs_uncompiled(run):
    words = ["--steps", 2, "--dtype", "float32", "--compile", "blocks"]
    status, out, _ = run("pictures", *words)
    assert status == 0 and "--compile blocks: unet (UNet2DModel) does not say which of its blocks repeat" in out


def test_a_dtype_for_all_and_another_for_one_component(saved):
    chosen = loading.dtype(["bfloat16", "vae=float32"])
    pipeline = loading.load(str(saved / "wan"), chosen)
    assert pipeline.transformer.proj_out.weight.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float32
    assert loading.dtype(["bfloat16", "float16"]) == torch.float16  # the last word counts


# What is refused, and how.


@pytest.mark.parametrize(
    "model, words, complaint",
    [
        ("wan", [], "--prompt: WanPipeline takes one, and none is given"),
        ("wan", ["--prompt", "x", "--image", "no.png"], "--image: `no.png`: No such file"),
        (
            "wan",
            ["--prompt", "x", "--call", "heigth=32"],
            "--call: WanPipeline takes no `heigth`; did you mean `height`",
        ),
        ("wan", ["--prompt", "x", "--call", "heigth"], "--call: `heigth`: expected NAME=VALUE"),
        ("wan", ["--prompt", "x", "--height", "32", "--call", "height=48"], "`height` is given by --height already"),
        ("wan", ["--prompt", "x", "--call", "output_type=np"], "--call: `output_type` is for --out to say"),
        (
            "wan",
            ["--prompt", "x", "--dtype", "floot16"],
            "--dtype: `floot16` is no dtype of torch; did you mean `float16`",
        ),
        ("wan", ["--prompt", "x", "--dtype", "vae=int8"], "--dtype: `vae=int8` is not a floating point dtype"),
        ("wan", ["--prompt", "x", "--device", "cuba"], "--device: `cuba` is no device of torch; did you mean `cuda`"),
        ("wan", ["--prompt", "x", "--device", "meta"], "--device: `meta` cannot be used on this machine"),
        ("wan", ["--prompt", "x", "--device", "cpu", "--offload", "model"], "--offload: `model` needs an accelerator"),
        ("wan", ["--prompt", "x", "--height", "35"], "WanPipeline: ValueError: `height` and `width` have to be divis"),
        ("wan", ["--prompt", "x", "--out", "x.webm"], "--out: `x.webm`: expected a name that ends in .mp4, .gif or"),
        ("wan", ["--prompt", "x", "--out", "file/x.png"], "--out: `file/x.png` cannot be written"),
        ("wan", ["--prompt", "x", "--compare", "--patch-model", "off"], "--compare: there is nothing to compare with"),
        ("pictures", ["--prompt", "x"], "--prompt: ConsistencyModelPipeline takes no `prompt`"),
        ("pictures", ["--frames", "5"], "--frames: ConsistencyModelPipeline takes no `num_frames`"),
        ("pictures", ["--patch-model"], "no spec for UNet2DModel"),
        ("nothing", ["--prompt", "x"], "there is no such folder"),
        ("wan/vae", ["--prompt", "x"], "cannot be loaded: Error no file named model_index.json"),
        ("wan/model_index.json", ["--prompt", "x"], "is a file, and not the folder of a saved pipeline"),
    ],
)
def test_mistakes_are_one_error_each(model, words, complaint, run, tmp_path):
    (tmp_path / "file").touch()
    rest = CALL[:8] + CALL[10:] if model == "wan" else []  # each sets what it is about last
    status, _, err = run(model, *rest, *words)
    said = err.rpartition("dit-patch: ")[2]
    assert status == 1 and complaint in said and "Traceback" not in err


def test_an_error_names_the_pipeline_s_own_parameters(run):
    said = run("pictures", "--frames", 5)[2]
    assert "It takes: batch_size, class_labels, num_inference_steps, " in said


@pytest.mark.parametrize(
    "words, environment, complaint",
    [
        (["--compare", "--patch-model", "ropes"], {}, "`ropes` is no kind and no spec; did you mean `rope`?"),
        (["--patch-model", "--spec-dir", "nowhere"], {}, "the directory `nowhere` does not exist"),
        (["--step-cache", "qualty"], {}, "no preset `qualty`; did you mean `quality`?"),
        (["--step-cache", "mine.yaml"], {}, "`mine.yaml` cannot be read: No such file"),
        (["--patch-model", "--max-bytes", "much"], {}, "max_bytes: `much` is no number of bytes"),
        ([], {"DIT_PATCH_STEP_CACHE": "fast"}, "no preset `fast`"),
        (
            [],
            {"DIT_PATCH_MODEL": "diffusers/flux"},
            "no spec for UMT5EncoderModel, WanTransformer3DModel, ",
        ),
    ],
)
def test_what_is_wrong_with_the_patches_is_told_before_the_weights_are_read(
    words, environment, complaint, run, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("it loads"))
    status, out, err = run("wan", *CALL, "--prompt", PROMPT, *words)
    assert status == 1 and complaint in err and not out


@PATCHABLE
def test_the_trained_example_needs_no_folder_and_no_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--prompt", "a red circle moving up", "--steps", "3", "--compare", "--out", "x.png"]
    assert cli.main(["generate", "--model", "shapes", *words]) == 0
    out = capsys.readouterr().out
    assert "identical: yes" in out and "6 frames of 32x32" in out and (tmp_path / "x.png").exists()


def test_a_folder_of_frames_takes_the_place_of_an_earlier_one_and_of_nothing_else(run, tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0099.png").touch()
    assert run("wan", *CALL, "--prompt", PROMPT, "--out", "frames")[0] == 0
    assert len(list((tmp_path / "frames").iterdir())) == 5
    (tmp_path / "frames" / "notes.txt").touch()
    status, _, err = run("wan", *CALL, "--prompt", PROMPT, "--out", "frames")
    assert status == 1 and "--out: `frames` holds other files, such as `notes.txt`" in err


def test_weights_that_are_missing_are_told_with_where_a_whole_folder_comes_from(saved, tmp_path, run):
    folder = tmp_path / "broken"
    subprocess.run(["cp", "-r", saved / "wan", folder], check=True)
    for weights in (folder / "transformer").glob("*.safetensors"):
        weights.unlink()
    status, _, err = run(folder, "--prompt", "x")
    assert status == 1 and f"--model: `{folder}` cannot be loaded: " in err
    assert "`hf download ID --local-dir DIR`" in err and "Traceback" not in err


@pytest.mark.parametrize("missing, out", [("imageio_ffmpeg", "x.mp4"), ("PIL", "x.gif"), ("transformers", "x.png")])
def test_what_is_missing_is_named_with_the_extra_that_brings_it(missing, out, run, monkeypatch):
    found = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == missing else found(name))
    status, _, err = run("wan", "--prompt", "x", "--out", out)
    assert status == 1 and "pip install 'dit-patch[generate]'" in err


def test_an_exception_from_within_a_later_step_is_not_dressed_up(run, monkeypatch):
    step = diffusers.UniPCMultistepScheduler.step

    def fails(self, *args, **kwargs):
        if self.step_index == 1:
            raise ValueError("a mistake")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.UniPCMultistepScheduler, "step", fails)
    with pytest.raises(ValueError, match="^a mistake$"):
        run("wan", *CALL, "--prompt", PROMPT)


# The hub.


@pytest.fixture
def fresh_client():
    """The hub's client keeps connections that know whether they are offline."""
    http = huggingface_hub.utils._http
    forget = getattr(http, "close_session", None) or http.reset_sessions
    forget()
    yield
    forget()


def test_offline_the_message_says_how_to_bring_the_model_here(capsys, monkeypatch, fresh_client):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    status = cli.main(["generate", "--model", "somebody/something", "--prompt", "x"])
    said = capsys.readouterr().err
    assert status == 1 and "Traceback" not in said
    assert (
        "--model: `somebody/something` cannot be loaded: HF_HUB_OFFLINE is set, it is not in this machine's cache"
        in said
    )
    assert "`hf download somebody/something --local-dir DIR`" in said and "--model DIR" in said


@pytest.mark.parametrize("kind", ["builtins.ConnectionError", "requests.exceptions.ConnectionError"])
def test_no_network_is_told_as_such(kind, monkeypatch):
    module, _, name = kind.rpartition(".")
    error = getattr(pytest.importorskip(module), name)

    def unreachable(*args, **kwargs):
        try:
            raise error("[Errno -2] Name or service not known")
        except error:
            raise OSError("It looks like the model is not the path to a directory") from None

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", unreachable)
    with pytest.raises(DitPatchError, match="the hub cannot be reached(.|\n)*hf download somebody/something"):
        loading.load("somebody/something", torch.float32)


@pytest.fixture
def hub(monkeypatch, fresh_client):
    """A server of the test's own, which the hub's real client asks: it answers with the error that a model is named."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            code = self.path.split("/")[2]
            self.send_response(403 if code == "GatedRepo" else 404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    constants = huggingface_hub.constants
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        place = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, place)
        for module in (constants, huggingface_hub.file_download):  # which has one of its own in older versions
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", place)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


@pytest.mark.parametrize(
    "code, complaint",
    [
        (
            "GatedRepo",
            "it is gated. Accept its terms at https://huggingface.co/somebody/GatedRepo, then `hf auth login`",
        ),
        ("RepoNotFound", "the hub has no repository of that name"),
        ("RevisionNotFound", "the hub has no such --revision of it"),
        ("EntryNotFound", "it lacks a file that a diffusers pipeline has: "),
    ],
)
def test_what_the_hub_refuses_is_told_apart(code, complaint, hub):
    with pytest.raises(DitPatchError) as raised:
        loading.read_index(f"somebody/{code}")
    assert f"--model: `somebody/{code}` cannot be loaded: {complaint}" in str(raised.value)
    assert f"`hf download somebody/{code} --local-dir DIR`" in str(raised.value)


def test_the_command_line_is_read_without_torch():
    program = (
        "import sys, argparse\nfrom dit_patch.cli import generate\nparser = argparse.ArgumentParser()\n"
        "generate.arguments(parser)\nparser.parse_args(['--model', 'x'])\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
