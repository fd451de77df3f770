"""Workers that somebody else starts: the variables of `run --print-env`, and `report` on what they have left."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("diffusers")

PROGRAM = """
import sys, time, torch
from diffusers import WanTransformer3DModel
model = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=1, rope_max_seq_len=32,
)
x, t, text = torch.randn(1, 4, 2, 4, 4), torch.ones(1), torch.randn(1, 6, 16)
with torch.no_grad():
    for _ in range(3):
        model(x, t, text)
    print("ready", flush=True)
    while len(sys.argv) > 1:
        time.sleep(0.1)
        model(x, t, text)
"""


def dit_patch(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "dit_patch", *map(str, words)], capture_output=True, text=True, **options
    )


def printed(*words):
    """The variables, as a program of the cluster's gets them."""
    done = dit_patch("run", "--print-env", "json", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def worker(variables, *words):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIT_PATCH")} | variables
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_shell_and_json_say_the_same():
    lines = dit_patch("run", "--print-env", "--patch-model", "rope").stdout.splitlines()
    shell = dict(shlex.split(line)[1].split("=", 1) for line in lines)
    assert shell == printed("--patch-model", "rope") and shell["DIT_PATCH_MODEL"] == "rope"
    assert "diffusers.models.transformers.transformer_wan.WanTransformer3DModel" in shell["DIT_PATCH_CLASSES"]


def test_workers_are_patched_and_what_each_did_is_one_report_even_of_one_that_was_killed(tmp_path):
    folder = tmp_path / "reports"
    variables = printed("--patch-report", folder)
    first = worker(variables)
    assert first.wait(120) == 0, first.stderr.read()
    second = worker(variables, "on")
    second.stdout.readline()
    time.sleep(7)  # the report is kept current to three seconds
    second.send_signal(signal.SIGKILL)
    second.wait()
    done = dit_patch("report", folder)
    assert done.returncode == 0 and "2 processes patched" in done.stdout
    assert done.stdout.count("spec diffusers/wan") == 2 and done.stdout.count("killed?") == 1
    document = json.loads(dit_patch("report", folder, "--json").stdout)
    hits = [sum(row["hits"] for row in each["handles"][0]["sites"]) for each in document["processes"]]
    assert len(hits) == 2 and min(hits) > 0 and max(hits) > 3 * min(hits)


def test_without_a_folder_each_process_prints_its_report(tmp_path):
    process = worker(printed())
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "spec diffusers/wan" in err and "lossless" in err


def test_a_machine_that_lacks_the_folder_says_so_and_prints_its_report(tmp_path):
    variables = printed("--patch-report", tmp_path / "reports") | {"DIT_PATCH_RUN": str(tmp_path / "gone")}
    process = worker(variables)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "no report can be written in" in err and "spec diffusers/wan" in err


@pytest.mark.parametrize(
    "words, status, said",
    [
        (("run", "--print-env", "--", "python"), 2, "--print-env runs no COMMAND"),
        (("run", "--print-env", "yaml"), 2, "invalid choice: 'yaml'"),
        (("run", "--print-env", "--patch-model", "rop"), 1, "`rop` is no kind and no spec"),
        (("run", "--print-env", "--patch-report", "file"), 1, "--patch-report: `file` is a file; give a folder"),
        (("report", "missing"), 1, "`missing`: there is no such folder"),
        (("report", "."), 1, ""),
    ],
)
def test_mistakes_are_one_message_each(words, status, said, tmp_path):
    (tmp_path / "file").touch()
    done = dit_patch(*words, cwd=tmp_path)
    assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    if words == ("report", "."):
        assert "NOTHING WAS PATCHED" in done.stdout
