"""What is promised around the code: a version, types, a command line that starts at once, commands in the README."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import dit_patch

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not list(metadata.Distribution.discover(name="dit-patch")), reason="a plain checkout")
def test_the_version_is_the_one_in_pyproject():
    assert f'\nversion = "{dit_patch.__version__}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_type_checkers_see_the_annotations():
    assert Path(dit_patch.__file__).with_name("py.typed").is_file()


def test_every_public_name_is_there():
    assert [name for name in dit_patch.__all__ if not hasattr(dit_patch, name)] == []


def test_the_command_line_starts_without_torch():
    program = """
import sys
from dit_patch.cli import main

sys.argv = ["dit-patch", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: dit-patch" in done.stdout


def test_a_run_waits_for_its_program_without_torch():
    program = """
import sys
from dit_patch.launch.flags import Choice
from dit_patch.launch.run_command import run_command

assert not run_command(Choice(patch_model="auto"), [sys.executable, "-c", ""])
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["demo", "test"])
def test_the_readme_marks_the_command(name):
    assert f"<!-- command: {name} -->\n```sh\n" in (ROOT / "README.md").read_text(encoding="utf-8")
