"""`dit-patch run`: unmodified programs, their workers and their ranks, as somebody at a shell meets them.

First with real pipelines, whose outputs must be those of the plain run; then with small models, all that can go wrong.
"""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import toys
from conftest import skip_unless_installed

from dit_patch.spec.registry import Registry

pytestmark = pytest.mark.spread("real")

HERE = Path(__file__).parent
DIT_PATCH = [sys.executable, "-m", "dit_patch"]
RUN = [*DIT_PATCH, "run"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
STEPS, PASSES = 3, 2
LIMIT = 240


def environment(**variables):
    names = [name for name in os.environ if name.startswith("DIT_PATCH_")]
    clean = {name: value for name, value in os.environ.items() if name not in (*names, "PYTHONPATH", "RANK")}
    return {**clean, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **variables}


def start(folder, *command, **variables):
    """Run a command in a folder to its end."""
    return subprocess.run(
        [str(each) for each in command],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def program(folder, text, name="program.py"):
    (folder / name).write_text(textwrap.dedent(text))
    return name


# Real pipelines

SCRIPT = """
    import sys

    import torch

    SIZE = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "freq_dim": 32}


    def generate(seed):
        from dit_patch.pipelines.tiny_pipelines import wan_pipeline

        torch.set_num_threads(1)
        pipeline = wan_pipeline(**SIZE)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "output_type": "latent"}
        return pipeline("a cat", guidance_scale=5.0, generator=generator, **size).frames


    if __name__ == "__main__":
        name, *seeds = sys.argv[1:]
        for seed in seeds:
            torch.save(generate(int(seed)), f"{name}{seed}.pt")
"""
SPAWNS = """
    import sys

    import torch
    from script import generate


    def work(rank, name):
        torch.save(generate(rank), f"{name}{rank}.pt")


    if __name__ == "__main__":
        torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
"""
RANKS = """
    import os
    import sys

    import torch
    from script import generate

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mine = generate(rank)
    both = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(both, mine)
    torch.save(both, f"{sys.argv[1]}{rank}.pt")
    torch.distributed.destroy_process_group()
"""


class Done(NamedTuple):
    status: int
    out: str
    document: dict

    @property
    def processes(self):
        return self.document["processes"]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """`real(name)` is what there is to say of a patched program, all of which have run beside the plain ones."""
    skip_unless_installed(Registry(plugins=False).get("diffusers/wan"))
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("real")
    for name, text in (("script", SCRIPT), ("spawns", SPAWNS), ("ranks", RANKS)):
        program(folder, text, f"{name}.py")
    plain = {"__name__": "script"}
    exec(textwrap.dedent(SCRIPT), plain)
    for seed in (0, 1):
        torch.save(plain["generate"](seed), folder / f"plain{seed}.pt")
    python = sys.executable
    commands = {
        "script": [*RUN, "--patch-report", "script.json", "--", python, "script.py", "script", "0"],
        "spawns": [*RUN, "--patch-report", "spawns.json", "--", python, "spawns.py", "spawns"],
        "ranks": [*RUN, "--patch-report", "ranks.json", "--", *TORCHRUN, "ranks.py", "ranks"],
    }
    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(commands, pool.map(lambda command: start(folder, *command), commands.values())))
    for name, each in done.items():
        assert each.returncode == 0, f"{name}: {each.stderr[-4000:]}"

    def found(name):
        document = json.loads((folder / f"{name}.json").read_text())
        return Done(done[name].returncode, done[name].stderr, document)

    found.folder = folder
    return found


def outputs(real, name):
    """What a program has saved, of each of its processes."""
    return [torch.load(file) for file in sorted(real.folder.glob(f"{name}[0-9].pt"))]


def check(process):
    """The report on a process that has generated once."""
    assert process["ended"] and process["uncaught"] is None and not process["failures"]
    assert {(each["state"], each["count"]) for each in process["models"]} == {("patched", 1)}
    [handle] = process["handles"]
    assert "lossless" in handle["report"] and not handle["removed"]
    rows = {row["at"]: row for row in handle["sites"]}
    assert {row["model"] for row in rows.values()} == {"transformer"}  # as the pipeline calls it
    rope, text = rows["rope.forward"], rows["condition_embedder.text_embedder.forward"]
    assert (rope["hits"], rope["misses"]) == (STEPS * PASSES - 1, 1)
    assert (text["hits"], text["misses"]) == ((STEPS - 1) * PASSES, PASSES)
    assert not any(row["bypassed"] for row in rows.values())  # the first forward counts as any other
    assert process["versions"]["torch"] == torch.__version__


def test_a_program_puts_out_what_it_does_without(real):
    first, second = outputs(real, "plain")
    assert not torch.equal(first, second)
    [patched] = outputs(real, "script")
    assert torch.equal(patched, first)


def test_workers_put_out_what_they_do_without(real):
    for plain, patched in zip(outputs(real, "plain"), outputs(real, "spawns"), strict=True):
        assert torch.equal(patched, plain)


def test_ranks_put_out_what_they_do_without_and_exchange_it(real):
    plain, ranks = outputs(real, "plain"), outputs(real, "ranks")
    assert len(ranks) == 2
    for gathered in ranks:
        assert all(map(torch.equal, gathered, plain))


def test_a_script_is_patched_and_reported(real):
    done = real("script")
    [process] = done.processes
    check(process)
    assert process["argv"] == ["script.py", "script", "0"]
    assert done.document["pythons"] == 1 and done.document["why_nothing"] is None
    assert "1 process patched; the report is in" in done.out and "NOTHING" not in done.out


def test_each_spawned_worker_is_patched_and_reported_and_the_others_counted(real):
    done = real("spawns")
    assert len(done.processes) == 2
    for process in done.processes:
        check(process)
    assert len({process["pid"] for process in done.processes}) == 2
    assert done.document["pythons"] >= 3
    assert re.search(r"2 processes patched; \d more Python process(es)? made none of these models", done.out)


def test_each_rank_of_torchrun_is_patched_and_reported(real):
    done = real("ranks")
    assert [(process["rank"], process["world_size"]) for process in done.processes] == [(0, 2), (1, 2)]
    for process in done.processes:
        check(process)


# FastVideo: its models are made in worker processes

GENERATOR = """
    import sys

    if __name__ == "__main__":
        import torch
        from fastvideo import VideoGenerator
        from fastvideo.configs.pipelines.wan import WanT2V480PConfig

        import dit_patch

        config = WanT2V480PConfig(vae_decode_precision="fp32")
        config.dit_config.arch_config.cast_prompt_embeds_to_dit_dtype = True  # elsewhere autocast("cuda") does that
        parts = ("dit_cpu_offload", "dit_layerwise_offload", "text_encoder_cpu_offload", "vae_cpu_offload")
        generator = VideoGenerator.from_pretrained(
            "wan",
            num_gpus=1,
            pipeline_config=config,
            pin_cpu_memory=False,
            use_fsdp_inference=False,
            **dict.fromkeys(parts, False),
        )

        def frames():
            size = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 5.0}
            return generator.generate(
                {
                    "prompt": "a cat",
                    "negative_prompt": "a dog",
                    "sampling": {**size, "seed": 1},
                    "output": {"save_video": False, "return_frames": True},
                }
            ).samples

        patched = frames()
        dit_patch.apply(generator, only="rope").remove()  # takes the place of what the run has done
        print("equal", torch.equal(patched, frames()))
"""


def test_the_worker_of_a_video_generator_is_patched_and_reported(tmp_path):
    spec = Registry(plugins=False).get("fastvideo/wan")
    skip_unless_installed(spec)
    from test_remote import SITECUSTOMIZE

    from dit_patch.pipelines.tiny_pipelines import wan_pipeline

    program(tmp_path, SITECUSTOMIZE, "sitecustomize.py")
    size = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "freq_dim": 32}
    wan_pipeline(**size).save_pretrained(tmp_path / "wan")
    # FastVideo's scheduler of that name knows fewer options than diffusers', and makes another for Wan anyway.
    scheduler = {"_class_name": "UniPCMultistepScheduler", "_diffusers_version": "0.35.0"}
    (tmp_path / "wan/scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    command = [*RUN, "--patch-report", "report.json", "--", sys.executable, program(tmp_path, GENERATOR)]
    quiet = {"FASTVIDEO_ATTENTION_BACKEND": "TORCH_SDPA", "FASTVIDEO_LOGGING_LEVEL": "ERROR"}
    done = start(tmp_path, *command, PYTHONPATH=str(tmp_path), **quiet)
    assert done.returncode == 0 and "equal True" in done.stdout, done.stderr[-4000:]
    [process] = json.loads((tmp_path / "report.json").read_text())["processes"]
    assert process["ended"] and {(each["state"], each["count"]) for each in process["models"]} == {("patched", 1)}
    [handle] = process["handles"]
    rope = handle["sites"][0]
    assert handle["removed"] and (rope["model"], rope["spec"]) == ("transformer", spec.name)
    assert (rope["hits"], rope["misses"]) == (STEPS * PASSES - 1, 1)


# Small models

SITES = """
- {at: table.forward, kind: rope, key: {x: [shape]}}
- {at: embed.forward, kind: context, key: {text: [identity]}}
"""
THREE_STEPS = """
import sys, torch, toys
model = toys.build()
inputs = toys.inputs()
with torch.no_grad():
    for _ in range(3):
        out = model(**inputs)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """`toy(text, *options)`: run a program that uses `toys`, with a spec for it."""
    specs = toys.write_spec(tmp_path_factory.mktemp("toy") / "specs", SITES)

    def run(text, *options, python=(), arguments=(), report=True, folder=None, **variables):
        folder = folder or tmp_path_factory.mktemp("toy")
        name = program(folder, text)
        command = [sys.executable, *python, name, *arguments]
        to = ["--patch-report", "report.json"] if report else []
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), variables.get("PYTHONPATH")]))
        done = start(folder, *RUN, "--spec-dir", specs, *to, *options, "--", *command, **variables)
        document = json.loads((folder / "report.json").read_text()) if report else {}
        return Done(done.returncode, done.stdout + done.stderr, document)

    run.specs = specs
    return run


def rows(process, handle=0):
    return {row["at"]: (row["hits"], row["misses"]) for row in process["handles"][handle]["sites"]}


def test_the_report_goes_to_standard_error_and_the_status_is_the_commands(toy):
    done = toy(THREE_STEPS + "print('out', toys.Toy.__init__.__name__)\nsys.exit(7)", report=False)
    assert done.status == 7
    assert "out __init__" in done.out
    assert "dit-patch run: 1 process patched" in done.out
    assert re.search(r"^process \d+: program.py$", done.out, re.MULTILINE)
    assert re.search(r"rope +table.forward +2 +1 +-", done.out)


def test_a_program_that_ends_by_an_error_or_a_signal_has_its_report_and_its_status(toy):
    done = toy(THREE_STEPS + "raise KeyError('mine')")
    [process] = done.processes
    assert done.status == 1 and "Traceback" in done.out
    assert process["ended"] and process["uncaught"] == "KeyError: 'mine'" and rows(process)["table.forward"] == (2, 1)
    done = toy(THREE_STEPS + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    [process] = done.processes
    assert done.status == 128 + 9
    assert not process["ended"] and process["handles"]
    assert process["handles"][0]["sites"][0]["model_class"] == "Toy"


def test_an_existing_sitecustomize_still_runs_and_is_the_one_that_is_imported(toy, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nprint('theirs', __name__, sys.argv)\nNAME = 'theirs'\n")
    text = THREE_STEPS + "import sitecustomize; print(sitecustomize.NAME, sitecustomize.__file__); print(*sys.path)"
    done = toy(text, PYTHONPATH=str(tmp_path))
    assert done.status == 0 and done.document["patched"] == 1
    assert "theirs sitecustomize" in done.out and f"theirs {tmp_path}" in done.out
    assert f"run{os.sep}site" not in done.out


def test_without_another_sitecustomize_there_is_none(toy):
    if start(HERE, sys.executable, "-c", "import sitecustomize").returncode == 0:
        pytest.skip("this Python has one of its own")
    done = toy("import sys; print('sitecustomize' in sys.modules)\nimport sitecustomize")
    assert "False" in done.out and "No module named 'sitecustomize'" in done.out and done.status == 1


def test_an_error_in_the_existing_sitecustomize_is_reported_as_python_does(toy, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("raise ValueError('theirs')\n")
    done = toy(THREE_STEPS, PYTHONPATH=str(tmp_path))
    assert done.status == 0 and done.document["patched"] == 1
    plain = start(tmp_path, sys.executable, "-c", "pass", PYTHONPATH=str(tmp_path)).stderr
    assert "ValueError: theirs" in plain and plain in done.out


def test_grandchildren_are_patched_too(toy, tmp_path):
    program(tmp_path, THREE_STEPS, "child.py")
    text = "import subprocess, sys\nsys.exit(subprocess.run([sys.executable, 'child.py']).returncode)"
    done = toy(text, folder=tmp_path)
    [process] = done.processes
    assert process["argv"] == ["child.py"] and rows(process) == {"table.forward": (2, 1), "embed.forward": (2, 1)}
    assert done.document["pythons"] == 2


def test_a_forked_child_reports_what_it_did_itself_and_never_its_parent(toy):
    text = """
        import multiprocessing, sys, torch, toys
        torch.set_num_threads(1)
        model, other, inputs = toys.build(), toys.build(), toys.inputs()

        def steps(count, model):
            with torch.no_grad():
                for _ in range(count):
                    model(**inputs)

        if __name__ == "__main__":
            steps(3, model)
            fork = multiprocessing.get_context("fork")
            children = [fork.Process(target=steps, args=each) for each in ((4, model), (2, other), (0, model))]
            for child in children:
                child.start()
            for child in children:
                child.join()
            print("pids", *(child.pid for child in children))
    """
    done = toy(text)
    pids = [int(pid) for pid in re.search(r"^pids (.*)$", done.out, re.MULTILINE)[1].split()]
    by_pid = {process["pid"]: process for process in done.processes}
    assert pids[2] not in by_pid and len(by_pid) == 3
    assert rows(by_pid[pids[0]])["table.forward"] == (4, 0)  # with what its parent had kept
    assert rows(by_pid[pids[1]])["table.forward"] == (1, 1)
    [parent] = by_pid.keys() - set(pids)
    assert rows(by_pid[parent])["table.forward"] == (2, 1)
    assert all(process["ended"] for process in done.processes)


def test_what_was_made_and_not_called_is_said(toy):
    done = toy("import toys\nmodel = toys.build()")
    assert done.status == 0 and done.document["patched"] == 0
    [process] = done.processes
    assert [(each["class"], each["count"]) for each in process["models"]] == [("toys.Toy", 1)]
    assert "NOTHING WAS PATCHED: Toy: made, and never called" in done.out


def test_a_run_without_any_model_says_so_and_fails_only_when_strict(toy):
    done = toy("pass")
    assert done.status == 0 and not done.processes
    assert "NOTHING WAS PATCHED: the Python process made no model that there is a spec for" in done.out
    assert toy("pass", "--strict").status == 3
    assert toy("import sys; sys.exit(5)", "--strict").status == 5


@pytest.mark.parametrize("flag", ["-I", "-E", "-S"])
def test_a_python_that_does_not_come_by_is_said(toy, flag):
    done = toy("pass", python=[flag])
    assert done.status == 0
    assert "NOTHING WAS PATCHED: no Python process of this command came by" in done.out and "-I, -E" in done.out


def test_an_interpreter_without_dit_patch_says_so_once(toy, tmp_path):
    """Another environment is simulated by a package of that name that is not ours."""
    (tmp_path / "other/dit_patch").mkdir(parents=True)
    (tmp_path / "other/dit_patch/__init__.py").write_text("raise ImportError('another environment')")
    program(tmp_path / "other", "NAME = 'no torch'", "toys.py")
    program(tmp_path, "import toys; print(toys.NAME)", "child.py")
    text = """
        import os, subprocess, sys
        site, *others = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join([site, "other", *others])
        sys.exit(max(subprocess.run([sys.executable, "child.py"]).returncode for _ in range(2)))
    """
    done = toy(text, folder=tmp_path)
    assert done.status == 0 and done.out.count("no torch") == 2
    assert done.out.count("dit_patch: dit_patch cannot be imported by") == 1
    assert "NOTHING WAS PATCHED: dit_patch cannot be imported" in done.out and "another environment" in done.out
    strict = toy(text, "--strict", folder=tmp_path)
    assert strict.status == 3 and "no torch" not in strict.out


BROKEN = "- {at: tabel.forward, kind: rope, key: {x: [shape]}}"


def test_a_failure_to_patch_leaves_the_program_alone_and_is_said(toy, tmp_path):
    other = toys.write_spec(tmp_path / "broken", BROKEN, model="toys.Child", name="child")
    text = THREE_STEPS + "for each in range(2): toys.build(toys.Child)(**inputs)\nprint('went on')"
    done = toy(text, "--spec-dir", other)
    assert done.status == 0 and "went on" in done.out
    assert done.out.count("dit_patch: toys.Child is not patched, and runs as it is: SiteError") == 1
    [process] = done.processes
    [failure] = process["failures"]
    assert failure["what"] == "toys.Child" and "did you mean `table`" in failure["message"]
    assert rows(process)["table.forward"] == (2, 1)
    assert "NOT EVERYTHING WAS PATCHED: toys.Child" in done.out
    strict = toy(text, "--spec-dir", other, "--strict")
    assert strict.status == 1 and "went on" not in strict.out and "SiteError" in strict.out
    caught = text.replace("for each", "try:\n  for each").replace("\nprint", "\nexcept Exception: pass\nprint")
    strict = toy(caught, "--spec-dir", other, "--strict")
    assert strict.status == 3 and "went on" in strict.out


def test_kinds_and_specs_may_be_chosen(toy):
    [process] = toy(THREE_STEPS, "--patch-model", "rope").processes
    assert rows(process) == {"table.forward": (2, 1)}
    done = toy(THREE_STEPS, "--patch-model", "diffusers/wan")
    assert "NOTHING WAS PATCHED" in done.out and not done.processes


def test_off_runs_the_command_as_it_is(toy, tmp_path):
    text = "import os; print([name for name in os.environ if name.startswith('DIT_PATCH')])"
    done = start(tmp_path, *RUN, "--patch-model", "off", "--", sys.executable, program(tmp_path, text))
    assert done.returncode == 0 and "[]" in done.stdout and "runs as it is" in done.stderr


def test_what_the_program_applies_itself_goes_before(toy):
    text = """
        import os, sys, torch, toys, dit_patch
        specs = os.environ["DIT_PATCH_SPEC_DIR"]
        model, other, third = toys.build(), toys.build(), toys.build()
        inputs = toys.inputs()
        with torch.no_grad():
            own = dit_patch.apply(other, only="rope", specs=[specs])
            other(**inputs)
            model(**inputs)
            handle = dit_patch.apply(model, only="context", specs=[specs])
            model(**inputs), model(**inputs)
            assert [(row.at, row.hits, row.misses) for row in handle.stats()] == [("embed.forward", 1, 1)]
            third(**inputs)
            same = dit_patch.apply(third, specs=[specs])
            assert {row.misses for row in same.stats()} == {1}
            same.remove()
            assert "forward" not in vars(third.table)
    """
    done = toy(text)
    assert done.status == 0, done.out
    [process] = done.processes
    assert [handle["removed"] for handle in process["handles"]] == [True, True]
    assert {(each["state"], each["count"]) for each in process["models"]} == {
        ("patched", 2),
        ("patched by the program itself", 1),
    }


def test_a_program_with_the_flags_of_its_own_has_the_same_choice(toy):
    text = """
        import argparse, torch, toys, dit_patch
        parser = argparse.ArgumentParser()
        dit_patch.add_arguments(parser)
        model, inputs = toys.build(), toys.inputs()
        handle = dit_patch.from_args(model, parser.parse_args())
        with torch.no_grad():
            model(**inputs), model(**inputs)
        print([row.hits for row in handle.stats()])
    """
    done = toy(text, "--patch-model", "rope")
    assert done.status == 0 and "[1]" in done.out


def test_accelerate_launch(toy, tmp_path):
    pytest.importorskip("accelerate")
    program(tmp_path, THREE_STEPS)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "program.py"]
    command = [*RUN, "--spec-dir", toy.specs, "--patch-report", "report.json", "--", *launch]
    done = start(tmp_path, *command, PYTHONPATH=str(HERE))
    assert done.returncode == 0, done.stderr[-3000:]
    [process] = json.loads((tmp_path / "report.json").read_text())["processes"]
    assert rows(process)["table.forward"] == (2, 1)


def test_torchrun_may_start_a_run_in_each_rank_which_reports_for_itself(toy, tmp_path):
    program(tmp_path, THREE_STEPS)
    inside = [*RUN, "--spec-dir", toy.specs, "--patch-report", "report.json", "--", sys.executable, "program.py"]
    done = start(tmp_path, *TORCHRUN, "--no-python", *inside, PYTHONPATH=str(HERE))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank, name in enumerate(["report.json", "report.rank1.json"]):
        [process] = json.loads((tmp_path / name).read_text())["processes"]
        assert (process["rank"], process["world_size"]) == (rank, 2)
        assert rows(process)["table.forward"] == (2, 1)


# The command and its errors


def refused(*arguments, folder=HERE, **variables):
    done = start(folder, *RUN, *arguments, **variables)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [(), ("--",), ("--strict",), ("--patch-model",)])
def test_no_command_is_one_clear_error(arguments):
    status, err = refused(*arguments)
    assert status == 2 and "no COMMAND to run: dit-patch run -- python program.py" in err


def test_a_command_that_a_flag_has_swallowed_is_told(tmp_path):
    status, err = refused("--patch-model", "python")
    assert status == 2 and "`python`" in err and "put -- before it" in err
    status, err = refused("--patch-model", "python", "x.py")
    assert status == 1 and "`python` is no kind and no spec" in err and "put -- before it" in err


def test_a_command_that_is_not_there_or_may_not_run_has_the_status_of_a_shell(tmp_path):
    status, err = refused("--", "no-such-command", "x")
    assert status == 127 and "no command `no-such-command`" in err
    program(tmp_path, "pass", "x.py")
    status, err = refused("--", "./x.py", folder=tmp_path)
    assert status == 126 and "`python ./x.py ...`" in err
    status, err = refused("--", "x.py", folder=tmp_path)
    assert status == 127 and "`python x.py ...`" in err


def test_mistakes_are_said_before_anything_starts(tmp_path):
    touch = [sys.executable, "-c", "open('started', 'w')"]
    for arguments, words in [
        (("--patch-model", "rop"), "`rop` is no kind and no spec; did you mean `rope`?"),
        (("--step-cache", "balance"), "balanced"),
        (("--spec-dir", "nowhere"), "`nowhere` does not exist"),
        (("--patch-report", "nowhere/report.json"), "cannot be written"),
    ]:
        status, err = refused(*arguments, "--", *touch, folder=tmp_path)
        assert status == 1 and words in err
    for flag in ("--strcit", "--step-cach", "--patch"):  # the second would change the output
        status, err = refused(flag, "--", *touch, folder=tmp_path)
        assert status == 2 and flag in err and "usage: dit-patch run" in err
    assert not (tmp_path / "started").exists()


def test_the_dashes_may_be_left_out_and_the_commands_own_flags_stay_its_own(tmp_path):
    name = program(tmp_path, "import sys; print(sys.argv[1:])")
    done = start(tmp_path, *RUN, "--strict", sys.executable, name, "--patch-model", "--", "--strict")
    assert "['--patch-model', '--', '--strict']" in done.stdout and done.returncode == 3


def test_help_says_what_it_takes_and_what_the_statuses_are():
    done = start(HERE, *RUN, "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("-- COMMAND", "--patch-model", "--strict", "torchrun", "exit status"))


def test_the_report_may_be_text_in_a_file(toy, tmp_path):
    toy(THREE_STEPS, "--patch-report", "report.txt", report=False, folder=tmp_path)
    assert "table.forward" in (tmp_path / "report.txt").read_text()


def test_nothing_is_left_behind(toy, tmp_path):
    toy(THREE_STEPS, TMPDIR=str(tmp_path))
    assert not list(tmp_path.glob("dit-patch-run-*"))


# Signals

WAITS = """
    import signal, sys, time

    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append("INT"))
    signal.signal(signal.SIGTERM, lambda *_: seen.append("TERM"))
    print("ready", flush=True)
    deadline = time.monotonic() + 20
    while not seen and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    print("seen", *seen, flush=True)
    sys.exit(9)
"""


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_a_signal_to_the_run_reaches_the_command_once(tmp_path, name):
    command = [*RUN, "--", sys.executable, program(tmp_path, WAITS)]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, f"SIG{name}"))
    out, _ = process.communicate(timeout=30)
    assert out == f"seen {name}\n" and process.returncode == 9


def test_ctrl_c_in_a_terminal_reaches_the_command_once(tmp_path):
    name = program(tmp_path, WAITS)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, [*RUN, "--", sys.executable, name], environment())
    said = b""

    def read_until(words):
        nonlocal said
        deadline = time.monotonic() + 60
        while words not in said and time.monotonic() < deadline:
            try:
                said += os.read(terminal, 1000)
            except OSError:
                break
        assert words in said, said

    read_until(b"ready")
    os.write(terminal, b"\x03")
    read_until(b"seen INT")
    read_until(b"NOTHING WAS PATCHED")
    assert b"seen INT INT" not in said and b"Traceback" not in said
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 9
