"""`--patch-model` and its companions in anybody's program: argparse, click, typer, and the environment."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
import toys

import dit_patch
from dit_patch.errors import DitPatchError
from dit_patch.launch.flags import VARIABLES, Choice
from dit_patch.report import journal as journals
from dit_patch.report.journal import Journal

SITES = """
- {at: table.forward, kind: rope, key: {x: [shape]}}
- {at: embed.forward, kind: context, key: {text: [identity]}}
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def specs(tmp_path):
    return toys.write_spec(tmp_path / "specs", SITES)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt")
    dit_patch.add_arguments(parser)
    return parser.parse_args([str(each) for each in arguments])


def choice(*arguments):
    return Choice.from_args(parse(*arguments))


# What is chosen


@pytest.mark.parametrize(
    "arguments, wanted, only, step_cache",
    [
        ((), False, None, None),
        (("--patch-model",), True, None, None),
        (("--patch-model", "auto"), True, None, None),
        (("--patch-model", "off"), False, (), None),
        (("--patch-model", "rope, mask"), True, ("rope", "mask"), None),
        (("--patch-model", "diffusers/wan"), True, ("diffusers/wan",), None),
        (("--step-cache",), True, None, "balanced"),
        (("--step-cache", "quality", "--patch-model", "off"), True, (), "quality"),
        (("--step-cache", "off", "--patch-model"), True, None, None),
    ],
)
def test_flags_are_what_apply_is_asked_for(arguments, wanted, only, step_cache):
    found = choice(*arguments)
    assert found.is_wanted is wanted
    assert (found.options["only"], found.options["step_cache"]) == (only, step_cache)


def test_the_environment_counts_where_a_flag_is_not_given(monkeypatch):
    monkeypatch.setenv("DIT_PATCH_MODEL", "rope")
    monkeypatch.setenv("DIT_PATCH_STEP_CACHE", "quality")
    monkeypatch.setenv("DIT_PATCH_SPEC_DIR", os.pathsep.join(["one", "two"]))
    monkeypatch.setenv("DIT_PATCH_TRUST_SPECS", "1")
    monkeypatch.setenv("DIT_PATCH_REPORT", "here.json")
    assert choice() == Choice("rope", "quality", ("one", "two"), True, "here.json")
    given = choice("--patch-model", "off", "--step-cache", "off", "--spec-dir", "three", "--patch-report", "-")
    assert given == Choice("off", "off", ("three",), True, "-") and not given.is_wanted


def test_a_choice_survives_the_environment():
    given = Choice("rope,mask", "quality", ("specs", "more"), True, "report.json")
    there = Choice.from_environment(given.to_environment())
    assert there.spec_dir == tuple(os.path.abspath(each) for each in given.spec_dir)
    assert (there.patch_model, there.step_cache, there.trust_specs) == ("rope,mask", "quality", True)
    assert Choice.from_environment(Choice().to_environment()) == Choice() and Choice().to_environment() == {}


@pytest.mark.parametrize(
    "text, trusted", [("", False), ("0", False), ("no", False), ("1", True), ("true", True), ("YES", True)]
)
def test_trust_in_the_environment_is_yes_or_no(text, trusted):
    assert Choice.from_environment({"DIT_PATCH_TRUST_SPECS": text}).trust_specs is trusted


def test_what_is_neither_is_refused():
    with pytest.raises(DitPatchError, match="DIT_PATCH_TRUST_SPECS: `maybe` is neither 1 nor 0"):
        Choice.from_environment({"DIT_PATCH_TRUST_SPECS": "maybe"})
    with pytest.raises(DitPatchError, match="patch_model: `3` is a int; expected text"):
        Choice.from_args({"patch_model": 3}, {})


def test_click_and_typer_give_mappings_with_whatever_they_have():
    """click: None and tuples where nothing was given; typer: True and False for bare flags, and paths."""
    nothing = {"patch_model": None, "step_cache": None, "spec_dir": (), "trust_specs": False, "patch_report": None}
    assert Choice.from_args(nothing, {}) == Choice()
    assert Choice.from_args({"patch_model": "rope", "spec_dir": ("one",), "prompt": "a cat"}, {}).spec_dir == ("one",)
    bare = Choice.from_args({"patch_model": True, "step_cache": True, "patch_report": Path("report.json")}, {})
    assert bare == Choice("auto", "balanced", patch_report="report.json")
    assert not Choice.from_args({"patch_model": False}, {}).is_wanted


def test_the_programs_own_flags_and_help_stay(capsys):
    assert parse("--prompt", "a cat", "--patch-model").prompt == "a cat"
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    flags = ("--prompt", "--patch-model", "--step-cache", "--spec-dir", "--trust-specs", "--patch-report")
    assert all(flag in out for flag in flags)


# What comes of it


def test_without_a_flag_nothing_happens(specs):
    model = toys.build()
    before = toys.snapshot(model)
    assert dit_patch.from_args(model, parse("--spec-dir", specs)) is None
    assert dit_patch.from_args(model, parse("--spec-dir", specs, "--patch-model", "off")) is None
    assert toys.same_snapshot(before, toys.snapshot(model))


def test_with_a_flag_the_model_is_patched(specs, monkeypatch):
    model = toys.build()
    with dit_patch.from_args(model, parse("--patch-model", "--spec-dir", specs)) as handle:
        assert [row.at for row in handle.stats()] == ["table.forward", "embed.forward"]
    with dit_patch.from_args(model, {"patch_model": "rope", "spec_dir": str(specs)}) as handle:
        assert [row.at for row in handle.stats()] == ["table.forward"]
    monkeypatch.setenv("DIT_PATCH_MODEL", "context")
    monkeypatch.setenv("DIT_PATCH_SPEC_DIR", str(specs))
    with dit_patch.from_args(model, parse()) as handle:
        assert [row.at for row in handle.stats()] == ["embed.forward"]


def test_mistakes_are_those_of_apply(specs):
    with pytest.raises(DitPatchError, match="only: `rop` is no kind and no spec; did you mean `rope`"):
        dit_patch.from_args(toys.build(), parse("--patch-model", "rop", "--spec-dir", specs))
    with pytest.raises(DitPatchError, match="balanced"):
        dit_patch.from_args(toys.build(), parse("--step-cache", "balance", "--spec-dir", specs))
    with pytest.raises(dit_patch.UnsupportedModelError, match="no spec for Toy"):
        dit_patch.from_args(toys.build(), parse("--patch-model"))


@pytest.mark.parametrize("path", ["-", "report.json", "report.txt"])
def test_a_report_is_left_at_exit(specs, tmp_path, monkeypatch, capsys, path):
    journal = Journal()
    monkeypatch.setattr(journals, "journal", journal)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    model, inputs = toys.build(), toys.inputs()
    handle = dit_patch.from_args(model, parse("--patch-model", "--spec-dir", specs, "--patch-report", path))
    with torch.no_grad():
        model(**inputs), model(**inputs)
    assert not Path(path).exists()
    handle.remove()
    journal.finish()  # as at exit
    if path == "-":
        said = capsys.readouterr().err
    elif path == "report.txt":
        said = Path(path).read_text()
    else:
        [told] = json.loads(Path(path).read_text())["handles"]
        assert told["removed"] and [row["hits"] for row in told["sites"]] == [1, 1]
        return
    assert f"process {os.getpid()}" in said and "table.forward" in said


def test_where_no_report_is_asked_for_none_is_kept(specs, monkeypatch):
    journal = Journal()
    monkeypatch.setattr(journals, "journal", journal)
    with dit_patch.from_args(toys.build(), parse("--patch-model", "--spec-dir", specs)):
        assert journal.document["handles"] == []


@pytest.mark.parametrize(
    "text, expected",
    [("4096", 4096), ("2GiB", 2 << 30), ("500MB", 500_000_000), ("1.5 kib", 1536), ("1g", 10**9), (7, 7), ("", None)],
)
def test_a_number_of_bytes_may_have_a_unit(text, expected):
    choice = Choice.from_args({"max_bytes": text}, {})
    assert choice.max_bytes == expected and choice.options.get("max_bytes") == expected
    assert Choice.from_environment(choice.to_environment()) == choice


@pytest.mark.parametrize("text", ["much", "-1", "0", "2 GiBs", "1e3"])
def test_what_is_no_number_of_bytes_is_quoted(text):
    with pytest.raises(DitPatchError, match=f"max_bytes: `{text}` is no number of bytes"):
        Choice.from_args({"max_bytes": text}, {})


def test_a_step_cache_s_file_is_found_from_other_directories_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("preset: quality\n")
    variables = Choice(step_cache="mine.yaml").to_environment()
    assert variables["DIT_PATCH_STEP_CACHE"] == str(tmp_path / "mine.yaml")
