"""`dit-patch bench rotary`: what its rows say, on tensors of a few tokens; how long anything takes is not looked at."""

import csv
import json
import subprocess
import sys
from dataclasses import asdict, fields, replace
from importlib.util import find_spec

import pytest
import torch
from conftest import skip_unless_installed

from dit_patch import cli
from dit_patch.bench import rotary
from dit_patch.bench.rotary import cases, contestants, forwards, operations, timing, verdict
from dit_patch.bench.rotary.contestants import CLONE, COMPILE, CONTESTANTS, EAGER, FLASH, IN_PLACE, OURS, Contestant
from dit_patch.bench.rotary.rows import Row
from dit_patch.spec.registry import Registry

CPU = torch.device("cpu")
QUICK = {name: make for name, make in CONTESTANTS.items() if "compile" not in name}


def rotate(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def tables(q):
    angles = torch.rand(q.shape[1], 1, q.shape[-1] // 2, device=q.device)
    return angles.cos(), angles.sin()


def halves(q, k, *tables):
    def each(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * tables[0] - b * tables[1], b * tables[0] + a * tables[1]), dim=-1)

    return each(q), each(k)


def problem(q, k):
    cos, sin = tables(q)
    return cases.Problem(rotate, (cos, sin), q, k, cos[None], sin[None])


def problem_of_halves(q, k):
    cos, sin = tables(q)
    return cases.Problem(halves, (cos, sin), q, k, cos[None], sin[None], pairs="half", both=True)


TINY = cases.Case("tiny", "a function of ours", (1, 6, 2, 16), torch.float32, "torch", problem)
HALVES = replace(TINY, name="halves", make=problem_of_halves)


def measured(case=TINY, ways=QUICK):
    return {row.contestant: row for row in operations.measure(case, CPU, 0.0, ways)}


def wrong(problem):
    """Rotates, and gets one element wrong."""

    def call():
        result = problem.call(problem.live)[0].clone()
        result[0, 0, 0, 0] += 1
        return (result,)

    return Contestant(call)


@pytest.mark.parametrize("case", [TINY, HALVES], ids=lambda case: case.name)
def test_every_contestant_has_a_row_with_all_figures_or_with_a_reason(case):
    rows = measured(case)
    expected = set(QUICK) if case is HALVES else set(QUICK) - {"liger"}
    assert set(rows) == expected
    for row in rows.values():
        assert (row.part, row.case, row.dtype, row.shape) == ("ops", case.name, "float32", "1x6x2x16")
        if row.us is None:
            assert row.note
        else:
            assert 0 < row.us_20 <= row.us <= row.us_80 and not row.note
            assert row.speedup > 0 and row.gb_per_s > 0 and row.of_clone > 0
    assert rows[EAGER].speedup == 1 and rows[CLONE].of_clone == 1


@pytest.mark.parametrize("case", [TINY, HALVES], ids=lambda case: case.name)
def test_exact_is_said_of_equal_bits_only(case):
    rows = measured(case, {**QUICK, "wrong": wrong})
    assert rows[EAGER].exact == rows[OURS].exact == rows[IN_PLACE].exact == "yes"
    assert rows["wrong"].differing == 1 / (6 * 2 * 16)
    assert rows["wrong"].exact == "no, 0.0052"
    assert rows[CLONE].exact == "-"


def test_other_signs_of_zero_and_other_dtypes_are_not_the_same_bits():
    zeros = torch.zeros(4)
    assert timing.differing([-zeros], [zeros]) == 1
    assert timing.differing([zeros.half()], [zeros]) == 1
    assert timing.differing([zeros * torch.nan], [zeros * torch.nan]) == 0


def test_what_rotates_in_place_begins_each_turn_with_what_the_others_have():
    case = TINY.problem(CPU)
    contestant = CONTESTANTS[IN_PLACE](case)
    first = [each.clone() for each in contestant.call()]
    again = contestant.call()
    assert not torch.equal(again[0], first[0])
    contestant.begin()
    assert all(map(torch.equal, contestant.call(), first))
    assert all(map(torch.equal, (case.q, case.k), (TINY.problem(CPU).q, TINY.problem(CPU).k)))


def test_what_is_not_installed_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(contestants, "version", lambda package: None)
    rows = measured(HALVES)
    assert rows[FLASH].note == rows["liger"].note == "not installed"
    assert rows[FLASH].us is None and "not installed" in rows[FLASH].line()


def test_kernels_for_gpus_are_not_tried_on_a_cpu(monkeypatch):
    monkeypatch.setattr(contestants, "version", lambda package: "1.0")
    rows = measured(HALVES)
    assert rows[FLASH].note == rows["liger"].note == "needs a CUDA device"


def test_a_contestant_that_fails_is_a_row_with_the_error_and_the_others_go_on(monkeypatch):
    def compile(function, **options):
        raise RuntimeError("no C++ compiler\nand a page of advice")

    monkeypatch.setattr(torch, "compile", compile)
    rows = measured(ways=CONTESTANTS)
    assert rows[COMPILE].note == "failed: RuntimeError: no C++ compiler"
    assert rows[OURS].us > 0


@pytest.mark.parametrize("error", [ImportError("no such module"), LookupError("no such function")])
def test_a_case_whose_library_lacks_the_function_is_skipped_in_one_row(error):
    def make(q, k):
        raise error

    (missing,) = operations.measure(replace(TINY, library="no-such-package", make=make), CPU, 0.0)
    assert missing.note == "skipped: no-such-package is not installed"
    (other,) = operations.measure(replace(TINY, make=make), CPU, 0.0)
    assert other.note == f"skipped: torch {torch.__version__}: {error}"


@pytest.mark.parametrize("case", cases.CASES.values(), ids=cases.CASES)
def test_at_every_case_rotary_gives_the_bits_of_the_live_function(case):
    tokens = case.shape[1] if case.name == "matrix-game-2" else min(case.shape[1], 70)
    try:
        case = replace(case, shape=(1, tokens, 2, case.shape[-1]))
        case.problem(CPU)
    except ImportError as error:
        pytest.skip(str(error))
    rows = measured(case, {name: CONTESTANTS[name] for name in (EAGER, OURS, IN_PLACE)})
    assert rows[OURS].exact == rows[IN_PLACE].exact == "yes"


def test_every_row_is_in_the_csv_and_the_json_with_the_environment(tmp_path, capsys):
    files = {"csv": tmp_path / "rows.csv", "json": tmp_path / "rows.json"}
    given = {"tiny": TINY, "halves": HALVES}
    plan = rotary.Plan.from_options(["halves", "tiny"], device="cpu", seconds=0.0, cases=given)
    assert rotary.run_benchmark(plan, contestants=QUICK, **files) == 0
    content = json.loads(files["json"].read_text())
    rows = [Row(**row) for row in content["rows"]]
    assert [row.case for row in rows] == ["halves"] * len(QUICK) + ["tiny"] * (len(QUICK) - 1)
    assert content["environment"]["torch"] == torch.__version__ and "flash-attn" in content["environment"]
    with files["csv"].open(newline="") as file:
        read = list(csv.DictReader(file))
    for line, row in zip(read, rows, strict=True):
        assert all(line[name] == str(value) for name, value in content["environment"].items())
        shown = {name: "" if value is None else str(value) for name, value in asdict(row).items()}
        assert {field.name: line[field.name] for field in fields(Row)} == shown
    out = capsys.readouterr().out
    assert "halves: a function of ours; (1, 6, 2, 16), float32" in out and str(files["csv"]) in out
    assert all(row.line() in out for row in rows)


def test_rotary_with_other_bits_is_status_1_and_the_threads_are_as_before(capsys):
    threads = torch.get_num_threads()
    options = {"device": "cpu", "seconds": 0.0, "threads": threads + 1, "cases": {"tiny": TINY}}
    plan = rotary.Plan.from_options(["tiny"], **options)
    assert rotary.run_benchmark(plan, contestants={EAGER: CONTESTANTS[EAGER], OURS: wrong}) == 1
    assert "no, 0.0052" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_the_verdict_counts_cases_and_names_those_that_miss_it():
    first, second = verdict.CPU_CASES
    times = {first: (9.0, 3.0, 3.1, 6.0), second: (9.0, 4.0, 3.0, 4.0), "qwen3": (9.0, 9.0, 9.0, 18.0)}
    rows = [
        Row("ops", case, contestant, us=us, of_clone=of_clone)
        for case, each in times.items()
        for contestant, us, of_clone in zip((EAGER, OURS, COMPILE, FLASH), each, (0.1, 0.8, 0.7, 0.4))
    ]
    (eager,) = verdict.verdict_lines(rows, CPU)
    assert eager == f"  at least 3x as fast as eager at Wan 1.3B, 480p: 1 of 2 cases; not in {second} (2.25)"
    bandwidth, compiled, flash = verdict.verdict_lines(rows, torch.device("cuda"))
    assert bandwidth.endswith("bandwidth: 3 of 3 cases")
    assert compiled.endswith(f"2 of 3 cases; not in {second} (0.75)")
    assert flash.endswith(f"2 of 3 cases; not in {second} (1.00)")
    assert all(line.endswith(": not measured") for line in verdict.verdict_lines([], torch.device("cuda")))


def test_forwards_are_compared_without_the_sites_and_with_them(monkeypatch):
    spec = Registry(plugins=False).get("diffusers/wan")
    skip_unless_installed(spec)
    monkeypatch.setattr(forwards, "KIND", "rope")  # of which there are sites in any case
    monkeypatch.setattr(timing, "_ROUNDS", 2)
    case = forwards._with_layers(spec.mini.case(), 1)
    assert case.config["num_layers"] == 1
    rows = forwards.measure(spec, "mini", case, CPU, 0.0, None)
    assert [row.contestant for row in rows] == [forwards.WITHOUT, forwards.WITH]
    assert all(row.exact == "yes" and row.us > 0 for row in rows)


def test_a_cpu_measures_forwards_of_sizes_that_it_is_done_with_soon():
    registry = Registry(plugins=False)
    assert set(forwards.sizes(registry.get("diffusers/wan"), real=False)) == {"mini"}
    assert "wan-2.1-14b-720p" in forwards.sizes(registry.get("diffusers/wan"), real=True)
    assert set(forwards.sizes(registry.get("fastvideo/wan"), real=False)) == {"4680-tokens-2-layers"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("wan-1.3b",), "`wan-1.3b` is no case and no spec; did you mean `wan-1.3b-480p`?"),
        (("diffusers/wam",), "did you mean `diffusers/wan`?"),
        (("tests", "--csv", "no/such/folder.csv"), "`tests` is no case"),
        (("qwen3", "--csv", "no/such/folder.csv"), "--csv: `no/such/folder.csv` cannot be written"),
        (("qwen3", "--json", "."), "--json: `.` is a folder"),
        (("qwen3", "--device", "cuds"), "--device: `cuds` is no device of torch"),
        (("qwen3", "--device", "cpu", "--checks"), "--checks: they need a CUDA device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_clear_error_before_anything_is_measured(arguments, said, capsys):
    assert cli.main(["bench", "rotary", *arguments]) == 1
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out


def test_an_unknown_case_at_the_shell_is_answered_with_the_cases_there_are():
    command = [sys.executable, "-m", "dit_patch", "bench", "rotary", "everything"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(name in done.stderr for name in cases.CASES)


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_on_a_gpu_the_ops_work_in_a_cuda_graph_and_beyond_32_bits():
    from dit_patch.bench.rotary import checks

    for row in checks.run_checks(torch.device("cuda", 0)):
        assert row.differing == 0 or row.note.startswith("skipped"), row


@pytest.mark.gpu
def test_on_a_gpu_every_contestant_is_timed_and_its_memory_known():
    device = torch.device("cuda", 0)
    rows = {row.contestant: row for row in operations.measure(TINY, device, 0.0, QUICK)}
    assert rows[IN_PLACE].peak_bytes == 0 < rows[CLONE].peak_bytes
    assert rows[OURS].exact == rows[IN_PLACE].exact == "yes"
