"""`dit-patch audit` at the shell: a spec, a class, a folder, a program, a whole library."""

import json
import subprocess
import sys

import pytest

from dit_patch import cli
from dit_patch.contribute.audit import table
from dit_patch.contribute.audit.accelerator import SUPPORTED
from dit_patch.spec.loading import load

pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="this torch has no device types written in Python")

SMALL = ("--config", "num_layers=2", "--size", "f=2,h=8,w=8")
ALLEGRO = "diffusers.AllegroTransformer3DModel"


@pytest.fixture
def audit(capsys):
    def run(*words):
        status = cli.main(["audit", *map(str, words)])
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def test_a_spec_as_text_and_page(audit, tmp_path):
    page = tmp_path / "wan.html"
    status, out, err = audit("diffusers/wan", *SMALL, "--out", page)
    assert status == 0
    assert "spec diffusers/wan" in out and "what is left that repeats, patched" in out
    assert err.splitlines()[-1] == str(page)
    assert page.read_text().startswith("<!doctype html>")


def test_a_class_without_a_spec_as_json(audit, tmp_path):
    status, out, _ = audit(ALLEGRO, *SMALL, "--json", "--device", "rtx-4090", "--dtype", "float32")
    found = json.loads(out)
    assert status == 0
    assert found["spec"] is None and found["patched"] is None
    assert found["device_of_estimates"] == "RTX-4090"
    assert found["is_full_size"] and found["plain"]["repeats"]["kernels"] > 0


def test_the_folder_of_a_pipeline_of_which_no_weights_are_read(audit, tmp_path):
    from dit_patch.pipelines.tiny_pipelines import wan_pipeline

    wan_pipeline().save_pretrained(tmp_path / "wan")
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    status, out, _ = audit("--model", tmp_path / "wan", "--size", "f=2,h=8,w=8")
    assert status == 0
    assert out.startswith("wan (WanTransformer3DModel): WanTransformer3DModel, 0.01 billion weights, f=2, h=8, w=8")


def test_a_draft_of_a_spec_is_written_with_what_each_site_is_worth(audit, tmp_path):
    file = tmp_path / "allegro.yaml"
    status, _, err = audit(ALLEGRO, *SMALL, "--write-spec", file)
    assert status == 0 and str(file) in err
    spec = load(file)
    assert spec.sites
    assert "of a forward's time (an estimate)" in file.read_text()
    status, _, err = audit(ALLEGRO, *SMALL, "--write-spec", file)
    assert status == 1 and "exists; --force overwrites it" in err


PROGRAM = """
import sys
from dit_patch.pipelines.tiny_pipelines import wan_pipeline

pipeline = wan_pipeline()
pipeline.set_progress_bar_config(disable=True)
options = dict(num_inference_steps=int(sys.argv[1]), height=32, width=32, num_frames=5, output_type="latent")
print("frames", tuple(pipeline("a cat", **options).frames.shape))
sys.exit(int(sys.argv[2]))
"""


def audit_program(tmp_path, *words, steps=8, status=0):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "dit_patch", "audit", *words, "--", sys.executable, str(program)]
    return subprocess.run([*command, str(steps), str(status)], capture_output=True, text=True, timeout=300)


def test_a_program_of_somebody_else_runs_as_it_is_and_its_model_is_audited_plain_and_patched(tmp_path):
    done = audit_program(tmp_path, "--forwards", "4", "--out", str(tmp_path / "found.json"), status=5)
    assert done.returncode == 5, done.stderr
    assert done.stdout.startswith("frames (")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["classes"] == ["diffusers.models.transformers.transformer_wan.WanTransformer3DModel"]
    assert found["notes"] == ["4 forwards of the program, on cpu: 2 steps with 2 passes each"]
    plain, patched = found["plain"], found["patched"]
    assert patched["total"]["kernels"] < plain["total"]["kernels"]
    rows = {row["module"]: row for row in plain["rows"]}
    assert rows["blocks.*.attn2.to_k"]["category"] == "steps"
    assert rows["blocks.*.attn2.to_k"]["depends_on"] == ["encoder_hidden_states"]
    assert rows["rope"]["category"] == "sizes"


def test_a_program_that_ends_before_it_could_be_patched(tmp_path):
    done = audit_program(tmp_path, "--json", steps=3)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["patched"] is None and found["plain"]["total"]["kernels"]


def test_a_program_without_a_model(tmp_path):
    command = [sys.executable, "-m", "dit_patch", "audit", "--", sys.executable, "-c", "print('nothing')"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stdout == "nothing\n"
    assert "no model with a list of blocks ran" in done.stderr


def test_a_command_that_does_not_exist(audit):
    status, _, err = audit("--", "no-such-program", "x")
    assert status == 127 and "no command `no-such-program`" in err


def test_all_of_a_library_a_row_each(audit, tmp_path, monkeypatch):
    names = ["diffusers.AllegroTransformer3DModel", "diffusers.models.transformers.prior_transformer.PriorTransformer"]
    monkeypatch.setattr(table, "class_names", lambda library: iter(names))
    out = tmp_path / "table.md"
    status, printed, err = audit("--all", "diffusers", "--out", out)
    assert status == 0
    head, _, first, second = out.read_text().splitlines()
    assert printed.splitlines() == [head, *out.read_text().splitlines()[1:]]
    assert first.startswith("| `AllegroTransformer3DModel` | none | 2.8 billion | ")
    assert (
        second
        == "| `PriorTransformer` |  |  |  |  |  |  |  | nothing could be guessed for the forward's proj_embedding |"
    )
    assert "2/2 " in err


def test_the_classes_of_a_library_are_its_whole_models():
    names = {each.rpartition(".")[2] for each in table.class_names("diffusers")}
    assert {"WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "FluxTransformer2DModel"} <= names
    assert not {"WanTransformerBlock", "FluxSingleTransformerBlock"} & names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("diffusers/wam",), "`diffusers/wam`"),
        (("diffusers.NoSuchModel",), "expected the dotted name of a class"),
        (("torch.nn.Linear",), "`torch.nn.modules.linear.Linear`: a small model was guessed, and does not run"),
        (("diffusers/wan", "--device", "H1OO"), "--device: no peak figures for `H1OO`"),
        (("diffusers/wan", "--dtype", "int8"), "--dtype: `int8` is not a floating point dtype"),
        (("diffusers/wan", "--size", "g=3"), "--size: no size `g`"),
        (("diffusers/wan", "--bench", "wan-2.1-2b"), "no bench `wan-2.1-2b`"),
        (("diffusers/wan", "--out", "wan.txt"), "--out: `wan.txt` ends in none of .html, .json"),
        (("--all", "diffusers", "--out", "t.html"), "--out: `t.html` ends in none of .md, .json"),
        (("--model", "nowhere"), "--model: `nowhere` has no config.json"),
    ],
)
def test_what_cannot_be_audited_is_one_message(audit, words, message):
    status, out, err = audit(*words)
    assert (status, out) == (1, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give one of SPEC, CLASS, --model FOLDER, --all LIBRARY, or -- COMMAND"),
        (("diffusers/wan", "--all", "diffusers"), "give one of"),
        (("diffusers/wan", "--write-spec", "x.yaml"), "--write-spec drafts a spec for a CLASS"),
        (("diffusers/wan", "--size", "f"), "`f` is not NAME=VALUE"),
        (("diffusers/wan", "--size", "f=0"), "`f=0` is no whole number from 1 on"),
        (("diffusers/wan", "--forwards", "1"), "`1` is less than 2"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(audit, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        audit(*words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
