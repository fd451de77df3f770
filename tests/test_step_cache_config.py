"""What may be asked of the step cache, and what it answers to what may not; no cache-dit is needed for that."""

import pickle

import pytest

from dit_patch import StepCache, StepCacheError
from dit_patch.findings import Finding, FindingKind
from dit_patch.step_cache.config import KNOBS, PRESETS
from dit_patch.step_cache.stats import StepStats, text, why_nothing


def test_presets_hold_the_published_operating_points():
    assert StepCache.of("quality") == StepCache(threshold=0.08, warmup=8, bn=0, calibrator="taylorseer")
    assert StepCache.of("balanced").threshold == 0.15
    assert [StepCache.of(name).blocks(30, "a Wan 1.3B") for name in PRESETS] == [(8, 0), (8, 0), (1, 0)]
    assert str(StepCache.of("performance")) == (
        "performance (threshold=0.24 warmup=4 fn=1 max_continuous=3 calibrator=taylorseer)"
    )


def test_a_mapping_starts_from_a_preset():
    assert StepCache.of({"preset": "balanced", "bn": 2}) == StepCache(threshold=0.15, bn=2, calibrator="taylorseer")
    assert StepCache.of({"threshold": 0.2}) == StepCache(threshold=0.2)
    assert StepCache.of(None) is None and StepCache.of(False) is None
    made = StepCache(fn=2)
    assert StepCache.of(made) is made and pickle.loads(pickle.dumps(made)) == made
    assert hash(made) == hash(StepCache(fn=2))


@pytest.mark.parametrize(
    "count, expected", [(2, 1), (3, 1), (4, 2), (6, 2), (8, 3), (12, 5), (20, 8), (30, 8), (40, 8), (60, 8)]
)
def test_first_blocks_scale_with_the_depth(count, expected):
    assert StepCache().blocks(count, "a model") == (expected, 0)


@pytest.mark.parametrize(
    "asked, complaint",
    [
        ("qualty", "no preset `qualty`; did you mean `quality`?"),
        ({"preset": "fast"}, "no preset `fast`"),
        ({"treshold": 0.1}, "no knob `treshold`; did you mean `threshold`?"),
        ({"Fn_compute_blocks": 8}, "no knob `Fn_compute_blocks`; here it is called `fn`"),
        ({"residual_diff_threshold": 8}, "here it is called `threshold`"),
        (
            ["quality"],
            "expected a preset (quality, balanced, performance), a YAML file, a mapping of knobs or a StepCache, not",
        ),
        (0.08, "not `0.08`"),
        ({"fn": 0}, "fn=`0`: expected a whole number of at least 1"),
        ({"fn": 1.0}, "fn=`1.0`: expected a whole number"),
        ({"bn": -1}, "bn=`-1`"),
        ({"warmup": True}, "warmup=`True`"),
        ({"threshold": -0.1}, "threshold=`-0.1`: expected a number of at least 0"),
        ({"threshold": "0.1"}, "threshold=`'0.1'`"),
        ({"threshold": float("nan")}, "threshold=`nan`"),
        ({"threshold": None}, "threshold=`None`"),
        ({"max_cached": -1}, "max_cached=`-1`"),
        (
            {"calibrator": "taylor"},
            "calibrator=`'taylor'`: expected one of taylorseer, foca, dmd; did you mean `taylorseer`?",
        ),
        ({"order": 2}, 'order=`2`: goes only with calibrator="taylorseer"'),
        ({"calibrator": "foca", "history": 6}, 'history=`6`: goes only with calibrator="dmd"'),
        ({"mask": "0111"}, "mask=`'0111'`: begins with 0"),
        ({"mask": (0, 1)}, "begins with 0"),
        ({"mask": "1120"}, "expected one of slow, medium, fast, ultra, or a 0 or 1 for each step"),
        ({"mask": "meduim"}, "did you mean `medium`?"),
        ({"mask": []}, "mask=`[]`"),
        ({"mask": 1011}, "mask=`1011`"),
        ({"mask_policy": "static"}, "needs a mask"),
        ({"mask": "110", "mask_policy": "strict"}, "mask_policy=`'strict'`: expected one of dynamic, static"),
        ({"release": "yes"}, "release=`'yes'`: expected True or False"),
    ],
)
def test_what_is_wrong_is_said_in_the_users_words(asked, complaint):
    with pytest.raises(StepCacheError) as caught:
        StepCache.of(asked)
    assert str(caught.value).startswith("step_cache: ") and complaint in str(caught.value)


def test_every_knob_is_documented():
    assert all(f"\n        {knob}: " in StepCache.__doc__ for knob in KNOBS)


@pytest.mark.parametrize(
    "knobs, count, complaint",
    [
        ({"fn": 3, "bn": 3}, 4, "has 4 blocks, and fn=3 and bn=3 leave none to skip"),
        ({"fn": 4}, 4, "fn + bn must be less than 4"),
        ({"bn": 3}, 4, "has 4 blocks, and bn=3 leave none"),
        ({}, 1, "has 1 block, and bn=0 leave none to skip"),
    ],
)
def test_more_blocks_than_there_are(knobs, count, complaint):
    with pytest.raises(StepCacheError) as caught:
        StepCache(**knobs).blocks(count, "transformer (WanTransformer3DModel).blocks")
    assert complaint in str(caught.value) and "WanTransformer3DModel" in str(caught.value)


def test_masks_in_every_form():
    assert StepCache(mask="1101").mask == StepCache(mask=[1, 1, 0, 1]).mask == (1, 1, 0, 1)
    assert StepCache(mask="fast").mask == "fast"
    assert str(StepCache(mask="1101", mask_policy="static")).endswith("mask=1101 mask_policy=static")


def test_memory_at_real_size():
    # Wan 14B, 720p, 81 frames, bf16, as measured: 2.9 GiB without a calibrator, 7.2 with TaylorSeer, 10.1 at order 2.
    activation = 738 << 20
    held = [StepCache(), StepCache(calibrator="taylorseer"), StepCache(calibrator="taylorseer", order=2)]
    assert [round(each.memory(activation) / 2**30, 1) for each in held] == [2.9, 7.2, 10.1]
    assert StepCache().memory(100, passes=1) == 200 and StepCache().memory(100, encoder=10) == 420


def test_why_nothing_was_cached():
    diffs = {9: 0.21, 10: 0.34, 11: 0.4}
    said = why_nothing(StepCache(threshold=0.08), 12, diffs).note
    assert "the smallest difference was 0.21, not below the threshold of 0.08" in said
    assert "0.212 would have cached a step, 0.343 about every second" in said
    assert "max_cached is 0" in why_nothing(StepCache(max_cached=0), 12, diffs).note
    assert "within the warm-up of 8" in why_nothing(StepCache(), 8, {}).note
    assert "the mask has all steps computed" in why_nothing(StepCache(mask="1" * 12), 12, {}).note


def test_the_reports_lines():
    noticed = (Finding(FindingKind.LEFT_ALONE_BY_AUTOGRAD),)
    row = StepStats(
        "transformer", "cond", "blocks", 30, 8, 0, 20, (8, 9, 10, 14, 19), {8: 0.05, 9: 0.07}, 3 << 20, noticed
    )
    assert row.skipped == pytest.approx(5 * 22 / (20 * 30))
    first, second, note = text(StepCache.of("quality"), [row])
    assert first.startswith("step cache  quality (threshold=0.08 warmup=8 calibrator=taylorseer)")
    assert "changes the output" in first
    assert "blocks: 30 (always run: first 8)  5 of 20 steps cached: 8-10, 14, 19  (18% of its blocks' calls)" in second
    assert "held 3.00 MiB" in second and note == "    left alone while autograd records"
    assert "nothing has run yet" in "\n".join(text(StepCache(), [StepStats("transformer", "", "blocks", 30, 8, 0)]))


def test_a_step_cache_is_saved_and_loaded_and_taken_by_its_file_wherever_one_is_asked_for(tmp_path):
    file = tmp_path / "mine.yaml"
    for made in (*PRESETS.values(), StepCache(), StepCache(mask="1101", mask_policy="static", release=True)):
        made.save(file)
        assert StepCache.load(file) == StepCache.of(str(file)) == StepCache.of(file) == made
    file.write_text("preset: balanced\nbn: 2\n")
    assert StepCache.load(file) == StepCache(threshold=0.15, bn=2, calibrator="taylorseer")


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("treshold: 1", "mine.yaml`: step_cache: no knob `treshold`; did you mean `threshold`?"),
        ("threshold: -1", "mine.yaml`: step_cache: threshold=`-1`"),
        ("- 1", "mine.yaml`: expected a mapping of knobs"),
        ("", "mine.yaml`: expected a mapping of knobs"),
        ("{", "mine.yaml` is no YAML"),
        (None, "mine.yaml` cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_step_cache_is_quoted(text, complaint, tmp_path):
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(StepCacheError) as caught:
        StepCache.of(str(file))
    assert complaint in str(caught.value)


def test_a_step_cache_that_cannot_be_saved_is_one_error(tmp_path):
    with pytest.raises(StepCacheError, match=r"mine.json`: expected a name that ends in .yaml"):
        StepCache().save(tmp_path / "mine.json")
    with pytest.raises(StepCacheError, match=r"mine.yaml` cannot be written: No such file"):
        StepCache().save(tmp_path / "missing" / "mine.yaml")
    assert not list(tmp_path.iterdir())
