"""The `dit-patch` command, as somebody at a shell meets it."""

import csv
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from dit_patch import cli
from dit_patch.bench import recorded_calls, surroundings
from dit_patch.handle import transaction
from dit_patch.spec.registry import Registry


def run(*arguments, capsys):
    status = cli.main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_list_names_every_bundled_spec_with_its_class(capsys):
    status, out, _ = run("list", capsys=capsys)
    assert status == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert set(rows) >= set(Registry(plugins=False).names())
    assert rows["diffusers/wan"].endswith("WanTransformer3DModel")


@pytest.mark.parametrize("name", Registry(plugins=False).names())
def test_show_says_of_every_site_what_its_result_depends_on(name, capsys):
    status, out, _ = run("show", name, capsys=capsys)
    assert status == 0
    for site in Registry(plugins=False).get(name).sites:
        assert f"  {site.at}\n" in out
        for argument, facets in site.key.items():
            assert f"{argument}: {', '.join(facets)}" in out


def test_an_unknown_name_is_one_clear_line_with_the_nearest_and_status_1(capsys):
    status, out, err = run("show", "diffusers/wam", capsys=capsys)
    assert status == 1 and not out
    assert "`diffusers/wam`" in err and "did you mean `diffusers/wan`?" in err
    assert "Traceback" not in err


def test_a_broken_spec_in_a_directory_is_named_with_its_line(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: a.B\nsites:\n  - at: rope.forward\n    kind: ropes\n")
    status, _, err = run("list", "--spec-dir", tmp_path, capsys=capsys)
    assert status == 1
    assert "mine.yaml:4:" in err and "did you mean `rope`?" in err


def test_specs_from_a_directory_are_listed_beside_the_bundled_ones(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: a.B\nsites:\n  - at: rope.forward\n    kind: rope\n")
    status, out, _ = run("list", "--spec-dir", tmp_path, capsys=capsys)
    assert status == 0 and any(line.startswith("mine ") and line.endswith("B") for line in out.splitlines())


def test_the_schema_is_json_that_knows_the_words_of_a_spec(capsys):
    status, out, _ = run("schema", capsys=capsys)
    assert status == 0
    assert {"model", "sites", "mini", "requires"} <= set(json.loads(out)["properties"])


def shell(*arguments):
    command = [sys.executable, "-X", "importtime", "-m", "dit_patch", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = "\n".join(line for line in lines if not line.startswith("import time:"))
    return done.returncode, done.stdout, said, imported


def test_help_names_every_command_and_says_where_to_begin():
    status, out, _, imported = shell("--help")
    assert status == 0
    assert all(f"\n    {name}" in out for name in cli.COMMANDS)
    assert "to begin with:" in out and "dit-patch run -- python" in out
    assert not {"torch", "pydantic", "wrapt"} & imported


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_says_what_it_does_and_takes_without_torch(name):
    status, out, _, imported = shell(*name.split(), "--help")
    assert status == 0 and f"usage: dit-patch {name}" in out and "torch" not in imported
    text = cli.COMMANDS[name]
    assert f"{text[0].upper()}{text[1:]}." in " ".join(out.split())
    # Each option has its line, and each line its words.
    options = [line for line in out.splitlines() if line.startswith("  --")]
    assert options or name in ("schema", "run")


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        ((), 2, "COMMAND"),
        (("lisst",), 2, "lisst"),
        (("list", "--spec-dir", "nowhere"), 1, "the directory `nowhere` does not exist"),
        (("show",), 2, "NAME"),
        (("show", "diffusers/wam"), 1, "did you mean `diffusers/wan`?"),
        (("schema", "--all"), 2, "--all"),
        (("demo", "--steps", "few"), 2, "few"),
        (("check",), 2, "SPEC"),
        (("check", "diffusers/wam"), 1, "did you mean `diffusers/wan`?"),
        (("new",), 2, "CLASS"),
        (("new", "json.Decoder"), 1, "`json.Decoder`: expected the dotted name of a class"),
        (("generate",), 2, "--model"),
        (("run",), 2, "no COMMAND to run"),
        (("run", "--", "no-such-command"), 127, "no command `no-such-command`"),
        (("bench", "--only", "everything"), 2, "everything"),
        pytest.param(
            *(("bench", "step-cache", "--preset", "fastest"), 1, "`fastest`"),
            marks=pytest.mark.skipif(find_spec("cache_dit") is None, reason="needs cache-dit"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_answered_by_one_message_and_a_status(arguments, status, said, capsys):
    try:
        found, out, err = run(*arguments, capsys=capsys)
    except SystemExit as exit:
        found, (out, err) = exit.code, capsys.readouterr()
    assert (found, said in err) == (status, True), err
    assert not out


@pytest.mark.parametrize("arguments, status", [(("lisst",), 2), (("show", "diffusers/wam"), 1)])
def test_a_mistake_at_the_shell_has_no_traceback(arguments, status):
    found, out, err, _ = shell(*arguments)
    assert found == status and arguments[-1] in err
    assert "Traceback" not in err and not out


def test_bench_prints_a_table_and_writes_every_row_with_the_environment(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    arguments = ("--only", "hits", "--only", "kernels", "--only", "forwards", "diffusers/wan")
    status, out, _ = run("bench", *arguments, "--device", "cpu", "--seconds", 0.01, "--csv", file, capsys=capsys)
    assert status == 0
    rows = list(csv.DictReader(file.open()))
    assert {row["part"] for row in rows} == {"hits", "kernels", "forwards"}
    assert all(float(row["patched"]) > 0 and row["torch"] and row["diffusers"] for row in rows)
    kernels = [row for row in rows if row["part"] == "kernels"]
    assert kernels and all(float(row["patched"]) < float(row["plain"]) for row in kernels)
    assert out.count("rope.forward") == 1 and str(file) in out


def test_bench_finds_out_the_calls_of_a_real_size_by_a_forward_up_to_the_first_block():
    spec = Registry(plugins=False).get("diffusers/wan")
    model, arguments, calls = recorded_calls.model_at_real_size(spec, spec.bench_case("wan-2.1-1.3b-480p"), "cpu")
    called = {call.site.at: call for call in calls}
    assert tuple(called["rope.forward"].args[0].shape) == (1, 16, 21, 60, 104)
    assert called["condition_embedder.text_embedder.forward"].args[0] is arguments["encoder_hidden_states"]
    assert "forward" not in vars(model.rope) and not model.blocks[0]._forward_pre_hooks


def test_bench_refuses_what_is_not_installed(capsys, monkeypatch):
    for room in (surroundings, transaction):
        monkeypatch.setattr(room, "version", lambda package: None)
    status, out, err = run("bench", "fastvideo", "--only", "hits", capsys=capsys)
    assert status == 1 and not out
    assert "fastvideo/causal_wan needs fastvideo>=0.2.1, which is not installed: pip install 'fastvideo>=0.2.1'" in err
    status, out, err = run("bench", capsys=capsys)
    assert status == 1 and not out and "no library that there are specs for is installed" in err


@pytest.mark.skipif(find_spec("fastvideo") is None, reason="needs FastVideo")
def test_bench_takes_a_library_for_all_its_specs():
    names = [spec.name for spec in surroundings.choose(Registry(plugins=False), ["fastvideo", "diffusers/wan"])]
    assert names[-1] == "diffusers/wan" and len(names) > 5 and all(each.startswith("fastvideo/") for each in names[:-1])


def test_bench_refuses_an_unknown_spec(capsys):
    status, _, err = run("bench", "diffusers/nothing", capsys=capsys)
    assert status == 1 and "`diffusers/nothing`" in err
