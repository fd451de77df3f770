"""The journal: what the handles of a process did, told at its end, with no model kept alive for it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path

import pytest
import torch
import toys
from test_remote import Generator

import dit_patch
from dit_patch.report import journal as journals
from dit_patch.report import kept
from dit_patch.report.document import document_text, path_of_process, save
from dit_patch.report.journal import Journal

HERE = Path(__file__).parent
SITES = """
- {at: table.forward, kind: rope, key: {x: [shape]}}
- {at: embed.forward, kind: context, key: {text: [identity]}}
"""


@pytest.fixture
def journal():
    return Journal()


@pytest.fixture
def specs(tmp_path):
    return toys.write_spec(tmp_path / "specs", SITES)


def steps(model, count=3):
    inputs = toys.inputs()
    with torch.no_grad():
        for _ in range(count):
            model(**inputs)


def counts(journal):
    return [
        [(row["at"], row["hits"], row["misses"]) for row in handle["sites"]] for handle in journal.document["handles"]
    ]


THREE = [("table.forward", 2, 1), ("embed.forward", 2, 1)]


def test_a_handle_is_told_of_while_it_lives_and_once(journal, specs):
    model = toys.build()
    handle = dit_patch.apply(model, specs=[specs])
    journal.keep(handle)
    journal.keep(handle)
    steps(model)
    assert counts(journal) == [THREE]
    assert "table.forward" in journal.document["handles"][0]["report"]


def test_a_model_that_was_dropped_is_freed_and_its_numbers_stay(journal, specs):
    model = toys.build()
    journal.keep(dit_patch.apply(model, specs=[specs]))
    steps(model)
    gone, weight = weakref.ref(model), weakref.ref(model.embed.first.weight)
    del model
    gc.collect()
    assert gone() is None and weight() is None
    assert counts(journal) == [THREE]
    assert not journal.document["handles"][0]["removed"]


def test_what_was_taken_back_is_told_as_it_was_then(journal, specs):
    model = toys.build()
    with dit_patch.apply(model, specs=[specs]) as handle:
        journal.keep(handle)
        steps(model)
        held = handle.nbytes
    assert not model._forward_hooks and not model._forward_pre_hooks
    steps(model)
    del handle, model
    gc.collect()
    assert counts(journal) == [THREE]
    [told] = journal.document["handles"]
    assert told["removed"] and sum(row["nbytes"] for row in told["sites"]) == held > 0
    assert "taken back before the process ended" in document_text(journal.document)


def test_a_handle_in_workers_is_told_of_before_they_go(journal, specs):
    generator = Generator(toys.build(), toys.build())
    generator.executor.shutdown = generator.workers.clear
    executor = generator.executor
    journal.keep(dit_patch.apply(generator, specs=[specs]))
    gc.collect()
    generator.generate_video()
    assert counts(journal) == [THREE * 2]
    generator.generate_video()
    executor.shutdown()
    assert counts(journal) == [[("table.forward", 5, 1), ("embed.forward", 4, 2)] * 2]
    rows = journal.document["handles"][0]["sites"]
    assert {row["model"] for row in rows} == {"rank 0: transformer", "rank 1: transformer"}


def test_a_handle_in_workers_that_is_removed_leaves_what_they_said(journal, specs):
    generator = Generator(toys.build())
    with dit_patch.apply(generator, specs=[specs]) as handle:
        journal.keep(handle)
        journal.keep(dit_patch.apply(generator, specs=[specs]))
        generator.generate_video()
    assert counts(journal) == [THREE] and journal.document["handles"][0]["removed"]


def test_workers_that_do_not_answer_are_not_waited_for(journal, specs, monkeypatch, capsys):
    generator = Generator(toys.build())
    journal.keep(dit_patch.apply(generator, specs=[specs]))
    monkeypatch.setattr(kept, "_PATIENCE", 0.2)
    generator.executor.collective_rpc = lambda *_, **__: time.sleep(60)
    journal.report_at_exit("-")
    start = time.monotonic()
    journal.finish()
    assert time.monotonic() - start < 5
    assert "could not be asked any more" in capsys.readouterr().err


def test_the_journal_keeps_no_generator_and_no_handle_of_it(journal, specs):
    generator = Generator(toys.build())
    journal.keep(dit_patch.apply(generator, specs=[specs]))
    gone = weakref.ref(generator.executor)
    del generator
    gc.collect()
    assert gone() is None
    assert "could not be asked" in document_text(journal.document)


def test_a_document_is_json_and_complete(journal, specs):
    model = toys.build()
    journal.keep(dit_patch.apply(model, specs=[specs]))
    steps(model)
    journal.add_failure("a.B", "SiteError: no")
    document = json.loads(json.dumps(journal.document))
    assert document["pid"] == os.getpid() and document["parent"] == os.getppid()
    assert document["versions"]["torch"] == torch.__version__ and document["python"] in sys.version
    assert document["failures"] == [{"what": "a.B", "message": "SiteError: no"}]
    assert document["ended"] is False and "killed?" in document_text(document)
    [handle] = document["handles"]
    assert handle["sites"][0]["spec"] == "toy" and handle["steps"] == []
    assert "NOT PATCHED: a.B: SiteError: no" in document_text(document)


def test_a_file_is_written_at_once_kept_fresh_and_final_at_the_end(journal, specs, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(journals, "REFRESHED", 0.0)
    journal.record_in(str(folder))
    assert not list(folder.iterdir())
    model = toys.build()
    journal.keep(dit_patch.apply(model, specs=[specs]), refreshing=True)

    def found():
        [file] = folder.glob("*.json")
        document = json.loads(file.read_text())
        return document["ended"], document["handles"][0]["sites"][0]["hits"]

    assert found() == (False, 0)
    steps(model)
    assert found() == (False, 2)
    monkeypatch.setattr(journals, "REFRESHED", 100.0)
    steps(model)
    assert found() == (False, 2)
    journal.finish()
    assert found() == (True, 5)
    journal.finish()
    steps(model)
    assert found() == (True, 5)


def test_ranks_and_children_have_files_of_their_own(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert path_of_process("a/report.json") == "a/report.json"
    assert path_of_process("report", child=True) == f"report.pid{os.getpid()}"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert path_of_process("report.json") == "report.json"
    monkeypatch.setenv("RANK", "1")
    assert path_of_process("report.json") == "report.rank1.json" and path_of_process("-") == "-"


# At the end of real processes

PROGRAM = """
    import multiprocessing, os, sys, torch, toys, dit_patch
    torch.set_num_threads(1)

    def patched():
        model = toys.build()
        dit_patch.from_args(model, {"patch_model": True, "spec_dir": [sys.argv[1]], "patch_report": sys.argv[2]})
        return model

    def steps(count, model=None):
        model, inputs = model or patched(), toys.inputs()
        with torch.no_grad():
            for _ in range(count):
                model(**inputs)
"""


def program(tmp_path, specs, body, report="report.json"):
    file = tmp_path / "program.py"
    file.write_text(textwrap.dedent(PROGRAM) + textwrap.dedent(body))
    names = [name for name in os.environ if name.startswith("DIT_PATCH_")] + ["RANK", "WORLD_SIZE"]
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, file.name, specs, report]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    found = sorted(tmp_path.glob("report*.json"))
    return done, [json.loads(each.read_text()) for each in found]


def hits(document):
    return document["handles"][0]["sites"][0]["hits"]


def test_children_of_every_kind_report_for_themselves(tmp_path, specs):
    body = """
        if __name__ == "__main__":
            model = patched()
            steps(3, model)
            fork, spawn = (multiprocessing.get_context(each) for each in ("fork", "spawn"))
            children = [fork.Process(target=steps, args=(5, model)), fork.Process(target=steps, args=(0, model))]
            children += [spawn.Process(target=steps, args=(2,))]
            for child in children:
                child.start()
            for child in children:
                child.join()
            pid = os.fork()
            if not pid:
                steps(9, model)
                sys.exit()
            os.waitpid(pid, 0)
            del model
            print("exitcodes", *(child.exitcode for child in children))
    """
    done, documents = program(tmp_path, specs, body)
    assert "exitcodes 0 0 0" in done.stdout, done.stderr
    assert not done.stderr
    main = json.loads((tmp_path / "report.json").read_text())
    assert hits(main) == 2 and main["ended"]
    others = [document for document in documents if document["pid"] != main["pid"]]
    assert sorted(map(hits, others)) == [1, 5, 9]
    assert all(document["parent"] == main["pid"] and document["ended"] for document in others)
    for document in others:
        assert (tmp_path / f"report.pid{document['pid']}.json").exists()


def test_a_report_is_printed_or_written_as_text(tmp_path, specs):
    done, _ = program(tmp_path, specs, "steps(3)", report="-")
    assert f"process {''}" in done.stderr and "table.forward" in done.stderr and done.returncode == 0
    program(tmp_path, specs, "steps(3)", report="report.txt")
    assert "table.forward" in (tmp_path / "report.txt").read_text()


def test_a_failing_program_has_its_report_and_an_unwritable_one_is_printed(tmp_path, specs):
    done, [document] = program(tmp_path, specs, "steps(3)\nraise KeyError('mine')")
    assert done.returncode == 1 and document["uncaught"] == "KeyError: 'mine'" and hits(document) == 2
    done, _ = program(tmp_path, specs, "steps(3)", report="nowhere/report.json")
    assert done.returncode == 0
    assert "the report could not be written to `nowhere/report.json`" in done.stderr and "table.forward" in done.stderr


def test_a_model_is_counted_in_its_latest_state(journal):
    journal.count_model("a.B", "waiting")
    journal.count_model("a.B", "waiting")
    journal.count_model("a.B", "patched", "waiting")
    assert {(each["state"], each["count"]) for each in journal.document["models"]} == {("waiting", 1), ("patched", 1)}


def test_a_file_that_cannot_be_written_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(OSError, match="taken.json"):
        save(str(tmp_path / "taken.json"), {}, str)
    assert [each.name for each in tmp_path.iterdir()] == ["taken.json"]
