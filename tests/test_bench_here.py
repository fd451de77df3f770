"""`dit-patch bench here`: every part in a process of its own, bounded in time, and written out as it ends."""

from __future__ import annotations

import json

import pytest
import torch

from dit_patch.bench import here
from dit_patch.bench.here import results
from dit_patch.bench.here.parts import PARTS, Part
from dit_patch.bench.here.results import Row
from dit_patch.bench.here.targets import MATRIX_GAME_2, WAN_SHORT
from dit_patch.bench.here.whole_forwards import twin
from dit_patch.cli import main
from dit_patch.spec import mini

DRY = ["bench", "here", "--tiny", "--device", "cpu"]


def test_a_dry_run_has_rows_of_every_part(tmp_path, capsys):
    pytest.importorskip("fastvideo")
    out = tmp_path / "here.json"
    assert main([*DRY, "--minutes", "20", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "figures are of toys" in said
    content = json.loads(out.read_text())
    rows = [Row(**each) for each in content["rows"]]
    assert list(dict.fromkeys(row.part for row in rows)) == list(PARTS)
    assert not any(row.is_bad or "cut off" in row.note or "no time" in row.note for row in rows)
    for name in PARTS:
        of = [row for row in rows if row.part == name]
        if name == "capture":
            assert [row.note for row in of] == ["skipped: needs a CUDA device"]
        elif name == "rotation":
            assert {row.note for row in of if row.unit == "us"} == {"equal bits"}
        else:
            assert of[0].note.startswith("equal bits in ")
            assert {row.what for row in of if row.unit == "ms"} == {"a forward", "a forward, blocks compiled"}
            assert all(row.plain > 0 and row.patched > 0 for row in of if row.unit == "ms")
            assert int(of[-1].note.split()[0]) > 0, "sites hit"
        assert name in said
    assert content["environment"]["torch"] == torch.__version__
    assert [each.name for each in tmp_path.iterdir()] == ["here.json"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--only", "wan-shrt"], "no part 'wan-shrt'; did you mean 'wan-short'"),
        (["--device", "gpu0"], "--device: torch knows no device 'gpu0'"),
        (["--out", "missing/here.json"], "--out: 'missing/here.json' cannot be written: No such file"),
        (["--out", "."], "--out: '.' is a folder"),
    ],
)
def test_a_bad_option_is_one_error_before_anything_is_measured(arguments, error, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(here, "_run", lambda *_, **__: pytest.fail("it measures"))
    assert main([*DRY, *arguments]) == 1
    said = capsys.readouterr().err.replace("`", "'").replace('"', "'")
    assert error in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_real_sizes_need_a_gpu(capsys):
    assert main(["bench", "here", "--device", "cpu"]) == 1
    assert "add --tiny for a dry run" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["bench", "here"]) == 1
        assert "torch finds no GPU here. Without one: --tiny --device cpu" in capsys.readouterr().err


def test_what_fails_or_takes_too_long_stops_no_other(tmp_path, monkeypatch, capsys):
    """The processes know their own parts, so one is given a part that they do not have, and one no time."""
    out = tmp_path / "here.json"
    nothing = Part("a part that its process does not know", lambda *_: iter(()))
    monkeypatch.setattr(here, "PARTS", {"absent": nothing, "capture": PARTS["capture"]})
    assert main([*DRY, "--minutes", "3", "--out", str(out)]) == 1
    first, last = (Row(**each) for each in json.loads(out.read_text())["rows"])
    assert first.part == "absent" and first.note.startswith("failed: ") and "invalid choice" in first.note
    assert last == Row("capture", "a warm forward, replayed", note="skipped: needs a CUDA device")
    monkeypatch.setattr(here, "_LEAST", 0.0)
    assert main([*DRY, "--minutes", "0.001", "--only", "capture", "--out", str(out)]) == 1
    [row] = json.loads(out.read_text())["rows"]
    assert row["note"].startswith("skipped: cut off after its ")
    captured = capsys.readouterr()
    assert "cut off" in captured.out and "nothing was measured" in captured.err


def test_other_bits_and_failures_are_bad_and_rows_that_were_cut_off_are_left_out(tmp_path):
    assert Row("a", note=f"{results.DIFFERS}: first in forward 3").is_bad
    assert Row("a", note="failed: RuntimeError: no").is_bad
    assert not Row("a", note="skipped: no time is left").is_bad
    file = tmp_path / "rows"
    results.append_row(file, Row("a", "b", "ms", 2.0, 1.0))
    with file.open("a") as open_file:
        open_file.write('{"part": "a", "wh')
    assert list(results.read_rows(file)) == [Row("a", "b", "ms", 2.0, 1.0)]
    assert list(results.read_rows(tmp_path / "none")) == []
    assert "2.00x" in Row("a", "b", "ms", 2.0, 1.0).line() and "x" not in Row("a", "b", "GB/s", 2.0, 1.0).line()


@pytest.mark.parametrize("target", [WAN_SHORT, MATRIX_GAME_2], ids=lambda target: target.spec)
def test_a_target_has_the_sizes_of_the_real_model(target):
    spec, case = target.resolve(tiny=False)
    assert case.config["num_layers"] == 30 and case.config["num_attention_heads"] == 12
    assert dict(case.sizes[0]) == dict(target.size or spec.bench_case(target.bench).sizes[0])


def test_a_twin_shares_weights_and_buffers_and_nothing_else():
    spec, case = WAN_SHORT.resolve(tiny=True)
    model = mini.build(spec, case)
    other = twin(model)
    for one, same in zip((*model.parameters(), *model.buffers()), (*other.parameters(), *other.buffers()), strict=True):
        assert one is same
    assert not set(model.modules()) & set(other.modules())


@pytest.mark.gpu
def test_on_a_gpu_every_part_has_figures(tmp_path):
    out = tmp_path / "here.json"
    assert main(["bench", "here", "--tiny", "--minutes", "8", "--out", str(out)]) == 0
    rows = [Row(**each) for each in json.loads(out.read_text())["rows"]]
    assert not any("needs a CUDA device" in row.note for row in rows)
    assert {row.what for row in rows if row.part == "wan-short"} >= {
        "copies to the GPU, a forward",
        "waits for the GPU, a forward",
        "the GPU is busy",
    }
