"""README, docs and examples: every block of code runs, or is marked with why it cannot; every figure has its command.

A block below `<!-- not run: why -->` is not run; commands in it are still read by their parsers. Blocks of a page share
one namespace, in which `pipeline` is a real diffusers pipeline, small and trained, called with sizes that it knows.
"""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from dit_patch import cli
from dit_patch.spec.loading import loads
from dit_patch.spec.recipe import Case, Input, Mini
from dit_patch.spec.registry import Registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # other tests run beside it
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
needs_all = pytest.mark.skipif(
    any(find_spec(each) is None for each in ("diffusers", "cache_dit", "skimage", "jinja2")),
    reason="needs diffusers, cache-dit and the packages of cache-bench",
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    mark: str
    language: str
    code: str

    @property
    def is_run(self):
        return not self.mark.startswith(("not run: ", "command: "))

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(*languages):
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("language")) + 1
            block = Block(
                page.relative_to(ROOT).as_posix(), line, match["mark"] or "", match["language"], match["code"]
            )
            found += [block] if block.language in languages else []
    return found


def commands(block):
    """The `dit-patch` command lines in a block for a shell."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        starts = [index for index, word in enumerate(words) if word.rpartition("/")[2] == "dit-patch"]
        for start in starts:
            yield words[start + 1 :]


def test_every_block_has_a_language_that_is_tested_or_is_plain_text():
    for page in PAGES:
        languages = {match["language"] for match in _BLOCK.finditer(page.read_text())}
        assert languages <= {"python", "sh", "yaml", "text"}, page
        assert page.read_text().count("\n```") % 2 == 0
    assert len(blocks("python")) >= 12 and len(blocks("sh")) >= 12


def test_what_is_not_run_says_why():
    for block in blocks("python", "sh", "yaml"):
        assert not block.mark or re.fullmatch(r"not run: .{10,}|command: (demo|test)", block.mark), str(block)


@pytest.fixture(scope="module")
def small_pipeline():
    """A class of pipelines that is diffusers' own, with other defaults: small enough for a test."""
    diffusers = pytest.importorskip("diffusers")
    from dit_patch.pipelines import trained_example

    class Small(diffusers.WanPipeline):
        def to(self, *args, **kwargs):
            return self

        @functools.wraps(diffusers.WanPipeline.__call__)  # what it takes can be asked for
        def __call__(self, *args, **kwargs):
            sizes = dict(trained_example.CALL)
            given = {name: value for name, value in kwargs.items() if name not in sizes}
            return super().__call__(*args, **{**sizes, "num_inference_steps": 4, **given})

    made = trained_example.pipeline()
    made.set_progress_bar_config(disable=True)
    return lambda: Small(**made.components)


@needs_all
@pytest.mark.parametrize("page", sorted({block.page for block in blocks("python") if block.is_run}))
def test_the_programs_of_a_page_run_one_after_the_other(page, small_pipeline, tmp_path, monkeypatch):
    import diffusers

    import dit_patch

    monkeypatch.chdir(tmp_path)
    pipeline = small_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", lambda *args, **kwargs: pipeline)
    names = {"dit_patch": dit_patch, "pipeline": pipeline, "prompt": "a red circle moving up"}
    for block in blocks("python"):
        if block.page == page and block.is_run:
            exec(compile("\n" * block.line + block.code, page, "exec"), names)
            dit_patch.remove(pipeline)


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_on_a_page_are_commands(block):
    for words in commands(block):
        name = next(" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in cli.COMMANDS)
        assert cli.command._parser(name).parse_args(words[len(name.split()) :]).run


@needs_all
@pytest.mark.parametrize("block", [block for block in blocks("sh") if block.is_run], ids=str)
def test_what_a_page_says_to_a_shell_runs(block, tmp_path):
    (tmp_path / "bin").mkdir()
    for name, code in (("dit-patch", "-m dit_patch"), ("python", "")):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {code} "$@"\n')
        script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        **ONE_THREAD,
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_spec_on_a_page_is_one(block):
    spec = loads(block.code, file=str(block))
    assert spec.sites and spec.mini.case().sizes


@needs_all
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_as_it_stands(path, tmp_path):
    environment = {**os.environ, **ONE_THREAD}
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    if path.name == "patch_a_pipeline.py":
        assert done.stdout.rstrip().endswith("identical: yes")
    if path.name == "serve.py":
        assert any(row["hits"] for row in json.loads(done.stdout.splitlines()[-1]))
    if path.name == "step_cache.py":
        assert yaml.safe_load((tmp_path / "step_cache.yaml").read_text())["warmup"] == 2


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_on_specs_has_every_word():
    text = (ROOT / "docs" / "specs.md").read_text()
    words = {*Mini.model_fields, *Case.model_fields, *Input.model_fields}
    assert not [word for word in words if f"| `{word}` |" not in text]


def test_the_page_on_models_names_every_spec():
    text = (ROOT / "docs" / "models.md").read_text()
    for name in Registry(plugins=False).names():
        library, _, model = name.partition("/")
        assert f"`{name}`" in text or re.search(rf"\| `{library}/[^|]*`{model}`", text), name


def test_the_page_on_programs_has_every_flag_and_its_variable():
    from dit_patch.launch.flags import VARIABLES

    text = (ROOT / "docs" / "programs.md").read_text()
    for name, variable in VARIABLES.items():
        assert re.search(rf"\| `--{name.replace('_', '-')}[^|]*` \| `{variable}` \|", text), name
