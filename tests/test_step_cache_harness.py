"""The A/B harness and the calibration: what they measure, what they write, and when they refuse to be believed."""

import csv
import math
import warnings

import pytest
import torch

pytest.importorskip("cache_dit", reason="needs cache-dit")
pytest.importorskip("skimage", reason="needs scikit-image")
pytest.importorskip("matplotlib", reason="needs matplotlib")

import stepping

import dit_patch
from dit_patch import StepCache, StepCacheError, cli, extras
from dit_patch.bench.step_cache import document, harness
from dit_patch.bench.step_cache.calibrate import GRID
from dit_patch.pipelines import quality, sampling, trained_example

PROMPTS = ["a red circle moving left", "a green triangle moving up"]
FAST = StepCache(fn=1, warmup=2, threshold=0.3, calibrator="taylorseer")
CALL = dict(trained_example.CALL)


@pytest.fixture(scope="module")
def trained():
    return stepping.quiet(trained_example.pipeline())


@pytest.fixture(scope="module")
def result(trained):
    return harness.compare(trained, PROMPTS, {"fast": FAST}, CALL, steps=8, repeats=2, direct=True)


def by_name(result):
    return {summary.name: summary for summary in result.summaries}


def test_the_pipeline_comes_trained(trained):
    """A red prompt gives red frames, a green one green: the weights are those of a trained model."""
    for prompt, channel in zip(PROMPTS, (0, 1)):
        frames = sampling.generate(trained, prompt, 0, CALL | {"num_inference_steps": 12}).frames
        assert frames.shape == (trained_example.FRAMES, 3, trained_example.SIZE, trained_example.SIZE)
        bright = frames.permute(0, 2, 3, 1)[frames.amax(1) > 0.6]
        assert len(bright) > 100 and bright.mean(0).argmax() == channel


def test_the_pixel_vae_loses_nothing():
    pixels = torch.rand(2, 3, 6, 8, 12)
    assert torch.equal(trained_example.PixelVAE().decode(trained_example.PixelVAE.encode(pixels)).sample, pixels)


def test_controls(result):
    summaries = by_name(result)
    again, fast, alone = summaries["baseline again"], summaries["fast"], summaries["fast, cache-dit alone"]
    assert again.equal == 2 and again.ssim == 1 and math.isinf(again.psnr)
    assert fast.equal == 0 and 0.3 < fast.worst_frame_ssim <= fast.worst_prompt_ssim <= fast.ssim < 1
    assert fast.skipped > 0.2 and fast.calls == summaries["baseline"].calls == 16
    assert (fast.ssim, fast.psnr) == (alone.ssim, alone.psnr)
    fewer = [summary for summary in result.summaries if summary.name.endswith(" steps")]
    assert len(fewer) == 1 and fewer[0].calls == 2 * int(fewer[0].name.split()[0]) <= 16
    assert not result.failures
    assert any("the same skips, the same bits" in remark for remark in result.remarks)


def test_everything_is_generated_with_the_same_seeds_and_in_turns(result):
    runs = {(run.variant.name, run.prompt): run for run in result.runs}
    assert {run.seed for run in result.runs} == {0, 1}
    assert all(len(run.seconds) == 2 and run.repeats_itself for run in result.runs)
    for prompt in PROMPTS:
        assert torch.equal(runs["fast", prompt].frames, runs["fast, cache-dit alone", prompt].frames)
        assert len({run.seed for run in result.runs if run.prompt == prompt}) == 1


def test_the_report_and_the_csv(result, tmp_path):
    document.write(tmp_path / "report.html", result, "A title with <signs>")
    page = (tmp_path / "report.html").read_text()
    assert "A title with &lt;signs&gt;" in page and "fewer steps" not in page.partition("<table>")[0]
    assert page.count("data:image/png;base64,") == 1 + len(
        [s for s in result.summaries if s.calls != 16 or s.name == "fast"]
    )
    for word in ("cache-dit", "torch", "diffusers", "scikit-image", "1.5.3", "LPIPS", "worst frame", "baseline again"):
        assert word in page
    runs, frames = harness.write_csv(tmp_path, result)
    with runs.open() as file, frames.open() as others:
        rows, each = list(csv.DictReader(file)), list(csv.DictReader(others))
    assert len(each) == trained_example.FRAMES * len(rows)
    assert (
        min(float(row["ssim"]) for row in each if row["variant"] == "fast") == by_name(result)["fast"].worst_frame_ssim
    )
    assert len(rows) == len(result.runs)
    fast = next(row for row in rows if row["variant"] == "fast")
    assert float(fast["seconds"]) > float(fast["dit_seconds"]) > 0 and "transformer blocks cond: " in fast["cached"]
    assert fast["cache-dit"] and fast["steps"] == "8"
    lines = document.plain(result).splitlines()
    assert lines[0].startswith("variant") and any(line.startswith("note: fast beside") for line in lines)
    assert document.markdown(result).splitlines()[1].startswith("|---|")


def test_a_cached_run_that_cached_nothing_is_a_failure(trained):
    timid = {"timid": StepCache(fn=1, warmup=2, threshold=1e-6)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = harness.compare(trained, PROMPTS[:1], timid, CALL, steps=4, repeats=1)
    assert len(result.failures) == 1
    assert "timid, 'a red circle moving left': nothing cached: the smallest difference was" in result.failures[0]
    assert "FAILED: timid" in document.plain(result)


def test_unequal_frames_are_a_failure(trained, monkeypatch):
    generate = sampling.generate

    def shorter(pipeline, prompt, seed, call):
        sample = generate(pipeline, prompt, seed, call)
        if getattr(pipeline.transformer.forward, "_self_own", None) is not None:  # a layer is on: the cached variant
            sample = sampling.Sample(sample.frames[:-1], sample.seconds, sample.dit_seconds, sample.calls)
        return sample

    monkeypatch.setattr(sampling, "generate", shorter)
    with pytest.raises(StepCacheError, match="the baseline has 6 frames of 32x32, the other 5 frames of 32x32"):
        harness.compare(trained, PROMPTS[:1], {"fast": FAST}, CALL, steps=4, repeats=1)


def test_likeness_is_scikit_images():
    from skimage.metrics import structural_similarity

    one = torch.rand(2, 3, 16, 16)
    other = (one + 0.05 * torch.randn(one.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    like = quality.likeness(one, other)
    expected = structural_similarity(
        one[1].permute(1, 2, 0).numpy(), other[1].permute(1, 2, 0).numpy(), channel_axis=-1, data_range=1.0
    )
    assert like.ssim[1] == pytest.approx(expected) and not like.equal
    mean = (one[0] - other[0]).double().square().mean().item()
    assert like.psnr[0] == pytest.approx(-10 * math.log10(mean), abs=1e-3)
    same = quality.likeness(one, one.clone())
    assert same.equal and same.mean_ssim == 1 and math.isinf(same.mean_psnr)


def test_lpips_where_it_is_at_hand(monkeypatch):
    assert not quality.lpips_is_at_hand()  # nothing is downloaded
    video = torch.rand(3, 3, 16, 16)
    assert quality.likeness(video, video).lpips is None
    asked = []

    def model(one, other):
        asked.append((one.min(), one.max()))
        return (one - other).abs().mean((1, 2, 3)).view(-1, 1, 1, 1)

    monkeypatch.setattr(quality, "_lpips_model", lambda: model)
    like = quality.likeness(video, video.flip(0))
    assert len(like.lpips) == 3 and like.lpips[1] == 0 < like.lpips[0]
    assert -1 <= asked[0][0] < -0.9 and 0.9 < asked[0][1] <= 1  # lpips takes pixels from -1 to 1


def test_without_scikit_image_it_is_said_before_anything_runs(trained, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(StepCacheError, match="cache-bench"):
        StepCache.calibrate(trained, PROMPTS[:1], "1.5x", **CALL)
    with pytest.raises(StepCacheError, match="cache-bench"):
        quality.likeness(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16))


def test_the_weights_can_be_trained_again(tmp_path):
    from dit_patch.pipelines.trained_example import train

    built = train.build(seed=0)
    before = [parameter.clone() for parameter in built.transformer.parameters()]
    trained = []
    for _ in range(2):
        built.transformer.load_state_dict(dict(zip(built.transformer.state_dict(), before)))
        train.train(built, steps=1, seed=0)
        trained.append([parameter.clone() for parameter in built.transformer.parameters()])
    assert not any(map(torch.equal, before, trained[0]))
    assert all(map(torch.equal, *trained))


@pytest.mark.parametrize("prompt", trained_example.PROMPTS[::5])
def test_clips_show_what_their_prompt_says(prompt):
    from dit_patch.pipelines.trained_example import train

    _, colour, _, _, way = prompt.split()
    clip = train.clip(prompt, torch.Generator().manual_seed(0))
    assert (
        clip.shape == (3, trained_example.FRAMES, trained_example.SIZE, trained_example.SIZE) and clip.abs().max() <= 1
    )
    covered = (clip - clip[:, :1, :1, :1]).abs().sum(0) > 0.5
    first, last = (torch.nonzero(frame).float().mean(0) for frame in (covered[0], covered[-1]))
    moved = (last - first) / (last - first).norm()
    assert torch.allclose(moved, torch.tensor(trained_example.DIRECTIONS[way]).float(), atol=0.1)
    assert torch.allclose(clip[:, 0][:, covered[0]].mean(1), torch.tensor(trained_example.COLOURS[colour]), atol=0.4)


def test_calls_that_the_pipeline_does_not_take(trained):
    with pytest.raises(StepCacheError, match="WanPipeline takes no `heigth`; did you mean `height`?"):
        harness.compare(trained, PROMPTS, {"fast": FAST}, {"heigth": 32}, steps=4)
    with pytest.raises(StepCacheError, match="no prompts"):
        harness.compare(trained, [], {"fast": FAST}, CALL, steps=4)


@pytest.fixture(scope="module")
def calibrated(trained):
    return StepCache.calibrate(trained, PROMPTS, "1.3x", step_cache=FAST, num_inference_steps=12, **CALL)


def test_calibration_predicts_what_then_happens(trained, calibrated):
    chosen = calibrated.calibration.chosen
    assert calibrated == StepCache(fn=1, warmup=2, threshold=chosen.threshold, calibrator="taylorseer")
    assert chosen.threshold in GRID and chosen.speedup >= 1.3 and chosen.measured is not None
    # Skipped steps cost nothing at best; the slack is for steps that took longer than others.
    for point in calibrated.calibration.points:
        assert 1 <= point.speedup <= 1.5 * point.steps / (point.steps - point.cached)
    smaller = [point for point in calibrated.calibration.points if point.threshold < chosen.threshold]
    assert all(point.speedup < 1.3 for point in smaller)
    with dit_patch.apply(
        trained, only=(), step_cache=calibrated.__class__(**{**FAST_KNOBS, "threshold": chosen.threshold})
    ) as handle:
        cached = 0
        for prompt in PROMPTS:
            sampling.generate(trained, prompt, 0, CALL | {"num_inference_steps": 12})
            cached += sum(len(row.cached) for row in handle.step_stats())
    # Skipping changes what comes after, so that not every decision is the predicted one.
    assert abs(cached - chosen.cached) <= 0.25 * chosen.steps
    assert "<- chosen" in str(calibrated.calibration) and "calibrated for 1.3x" in str(calibrated.calibration)


FAST_KNOBS = {"fn": 1, "warmup": 2, "calibrator": "taylorseer", "min_steps": 0}


def test_calibration_without_feedback_is_exact(trained):
    """Where only the last step is skipped, there is nothing that the skipping could change."""
    base = StepCache(fn=1, warmup=5)
    made = StepCache.calibrate(trained, PROMPTS[:1], "1.01x", step_cache=base, num_inference_steps=6, **CALL)
    with dit_patch.apply(
        trained, only=(), step_cache={"fn": 1, "warmup": 5, "threshold": made.threshold, "min_steps": 0}
    ) as handle:
        sampling.generate(trained, PROMPTS[0], 0, CALL | {"num_inference_steps": 6})
        assert sum(len(row.cached) for row in handle.step_stats()) == made.calibration.chosen.cached > 0


def test_calibration_for_a_likeness(trained):
    made = StepCache.calibrate(trained, PROMPTS[:1], ssim=0.9, step_cache=FAST, num_inference_steps=12, **CALL)
    assert made.calibration.chosen.ssim >= 0.9 and made.calibration.chosen.cached > 0
    higher = [point for point in made.calibration.points if point.threshold > made.threshold and point.ssim is not None]
    assert all(point.ssim < 0.9 for point in higher)


@pytest.mark.parametrize(
    "target, ssim, complaint",
    [
        ("50x", None, "50x cannot be reached .*: at most .*x is predicted"),
        (None, 1.0, "SSIM 1 cannot be reached .*: at the threshold of"),
        (None, None, "give either a speed-up"),
        ("1.5x", 0.9, "give either a speed-up"),
        ("fast", None, "target=`'fast'`: expected a speed-up above 1"),
        ("0.5x", None, "expected a speed-up above 1"),
        (None, 95, "ssim=`95`: expected a number above 0, at most 1"),
    ],
)
def test_targets_that_cannot_be_met(trained, target, ssim, complaint):
    with pytest.raises(StepCacheError, match=complaint):
        StepCache.calibrate(trained, PROMPTS[:1], target, ssim=ssim, step_cache=FAST, num_inference_steps=6, **CALL)
    assert not hasattr(trained.transformer.forward, "_self_own")  # nothing stays patched


def test_calibration_leaves_nothing_patched(trained, calibrated):
    assert "forward" not in vars(trained.transformer)


def test_the_command(tmp_path, capsys, trained):
    folder = tmp_path / "saved"
    trained.save_pretrained(folder)
    out = tmp_path / "out"
    words = ["bench", "step-cache", "--prompt", PROMPTS[0], "--steps", "8", "--repeats", "1", "--out", str(out)]
    status = cli.main([*words, "--preset", "performance", "--set", "warmup=2", "--set", "threshold=0.3"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert (out / "report.html").is_file() and (out / "runs.csv").is_file() and "performance" in said
    with (out / "generations.csv").open(newline="") as file:
        timed = list(csv.DictReader(file))
    assert {row["variant"] for row in timed} >= {"baseline", "baseline again", "performance"}
    assert all(float(row["seconds"]) > 0 and row["torch"] for row in timed)
    timid = ["--steps", "4", "--threshold", "0.000001", "--threshold", "0.00001"]
    status = cli.main([*words, *timid, "--set", "warmup=2", "--set", "fn=1"])
    said = capsys.readouterr().out
    assert status == 1 and "FAILED: R1e-06" in said and "R1e-05" in said


def test_an_interrupt_leaves_the_generations_that_were_timed(tmp_path, monkeypatch):
    out, times = tmp_path / "out", iter(range(7))

    def generate(*args, **kwargs):
        if next(times) == 6:
            raise KeyboardInterrupt
        return generated(*args, **kwargs)

    generated = sampling.generate
    monkeypatch.setattr(sampling, "generate", generate)
    words = ["--prompt", PROMPTS[0], "--steps", "6", "--repeats", "2", "--preset", "performance", "--set", "warmup=2"]
    assert cli.main(["bench", "step-cache", *words, "--set", "fn=1", "--out", str(out)]) == 130
    assert [each.name for each in out.iterdir()] == ["generations.csv"]
    assert len((out / "generations.csv").read_text().splitlines()) > 1


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--preset", "qualty"], "no preset `qualty`; did you mean `quality`?"),
        (["--set", "treshold=1"], "--set: no knob `treshold`; did you mean `threshold`?"),
        (["--set", "threshold"], "--set: `threshold`: expected NAME=VALUE"),
        (["--call", "heigth=32"], "takes no `heigth`"),
        (["--model", "/no/such/folder", "--prompt", "x"], "--model: `/no/such/folder`: there is no such folder"),
        (["--model", "somebody/something"], "no prompts: give --prompt or --prompts"),
        (["--prompts", "/no/such/file"], "--prompts: /no/such/file: No such file"),
        (["--model", "a", "--prompt", "x", "--dtype", "floot"], "`floot` is no dtype of torch"),
    ],
)
def test_errors_of_the_command(words, complaint, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["bench", "step-cache", *words]) == 1
    said = capsys.readouterr().err.rpartition("dit-patch: ")  # after what loading says
    assert "Error: " in said[2] and complaint in said[2]


def test_help_of_the_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "step-cache", "--help"])
    said = capsys.readouterr().out
    assert "usage: dit-patch bench step-cache" in said and "--beside-cache-dit" in said
