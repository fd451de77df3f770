"""Files that commands write: refused before the work where they cannot be written, then whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from dit_patch.bench.rows import Comparison, CsvFile
from dit_patch.errors import DitPatchError
from dit_patch.outputs import check_file, check_folder, replacing, write_errors

ROW = Comparison("hits", "diffusers/wan", "mini", "rope.forward", "us", 1.0, 2.0)


@pytest.mark.parametrize(
    "path, said",
    [
        ("missing/x.csv", "`missing/x.csv` cannot be written: No such file or directory"),
        ("folder", "`folder` is a folder; give the name of a file"),
        ("file/x.csv", "`file/x.csv` cannot be written: Not a directory"),
        ("/proc/x.csv", "`/proc/x.csv` cannot be written"),  # read-only, whoever one is
    ],
)
def test_a_file_that_cannot_be_written_is_refused_and_nothing_is_made(path, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(DitPatchError) as caught:
        check_file("--csv", path)
    assert str(caught.value).startswith(f"--csv: {said}")
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_file_that_somebody_has_made_read_only_is_not_replaced(tmp_path, monkeypatch):
    file = tmp_path / "x.csv"
    file.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != file)  # root may write everything
    with pytest.raises(DitPatchError, match="x.csv` cannot be written: it is read-only"):
        check_file("--csv", file)


def test_a_file_that_can_be_written_is_not_made_by_looking(tmp_path):
    check_file("--csv", None)
    check_file("--csv", tmp_path / "x.csv")
    check_file("--csv", os.devnull)
    check_folder("--out", tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DitPatchError, match="file` is a file; give a folder"):
        check_folder("--out", tmp_path / "file")
    with pytest.raises(DitPatchError, match="cannot be written: Not a directory"):
        check_folder("--out", tmp_path / "file" / "folder")


def test_a_draft_takes_the_place_of_the_file_only_when_all_went_well(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["x.json"]
    with replacing(file) as draft:
        assert draft.suffix == ".json" and draft.parent == tmp_path
        draft.write_text("new")
    assert file.read_text() == "new" and [each.name for each in tmp_path.iterdir()] == ["x.json"]


def test_a_link_stays_a_link(tmp_path):
    file, link = tmp_path / "x.json", tmp_path / "latest.json"
    link.symlink_to(file)
    with replacing(link) as draft:
        draft.write_text("new")
    assert link.is_symlink() and file.read_text() == "new"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / "0007.png").touch()
    with replacing(folder) as draft:
        draft.mkdir()
        (draft / "0000.png").touch()
    assert [each.name for each in folder.iterdir()] == ["0000.png"]


def test_a_device_is_written_as_it_is():
    with replacing(os.devnull) as draft:
        draft.write_text("gone")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_csv_has_every_row_as_soon_as_it_is_measured_and_none_before(tmp_path):
    file = CsvFile(tmp_path / "x.csv", Comparison, {"torch": "2"})
    assert not file.path.exists()
    for count in (1, 2):
        file.add(ROW)
        assert len(file.path.read_text().splitlines()) == 1 + count
    assert file.path.read_text().splitlines()[0].endswith("spread,torch")


def test_a_full_disk_is_told_with_the_flag():
    with pytest.raises(DitPatchError, match="--csv: `/dev/full` cannot be written: No space left on device"):
        CsvFile(Path("/dev/full"), Comparison, {}).add(ROW)
    with pytest.raises(DitPatchError, match="--out: `x` cannot be written: No space"), write_errors("--out", "x"):
        raise OSError(28, "No space left on device")
