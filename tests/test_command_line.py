"""Every command at the shell: no traceback, one clear message on standard error, the right status, no partial file."""

import os
import resource
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from dit_patch import cli
from dit_patch.errors import DitPatchError

needs = {name: pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name}") for name in ("cache_dit", "imageio")}
needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers")
REQUIRED = {  # what a command cannot do without, so that the mistake after it is the one that is found
    "show": ["diffusers/wan"],
    "check": ["diffusers/wan"],
    "new": ["diffusers.WanTransformer3DModel"],
    "generate": ["--model", "shapes", "--prompt", "a red circle moving up"],
    "report": ["."],
}


def shell(*words, cwd=None, env=None, **options):
    command = [sys.executable, "-m", "dit_patch", *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=300, **options)


@pytest.fixture
def in_process(capsys, monkeypatch, tmp_path):
    """Run a command here, in an empty folder; what it says, its status, and what it has left."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        try:
            status = cli.main(list(words))
        except SystemExit as exit:
            status = exit.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err, sorted(each.name for each in tmp_path.rglob("*"))

    return run


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_goes_to_standard_output(name, in_process):
    status, out, err, left = in_process(*name.split(), "--help")
    assert status == 0 and out.startswith(f"usage: dit-patch {name}") and not err and not left


@pytest.mark.parametrize("flag", ["--no-such-flag", "--hel"])
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_an_unknown_flag_shows_the_usage_of_its_command(name, flag, in_process):
    status, out, err, left = in_process(*name.split(), *REQUIRED.get(name, ()), flag)
    assert status == 2 and not out and not left
    assert err.startswith(f"usage: dit-patch {name}") and err.rstrip().endswith(f"unrecognized arguments: {flag}")


def options_of(name):
    """The long options of a command that take a value."""
    return [
        option
        for action in cli.command._parser(name)._actions
        for option in action.option_strings
        if option.startswith("--") and action.nargs is None
    ]


FULL_OPTIONS = [(name, option) for name in cli.COMMANDS for option in options_of(name)]


@pytest.mark.parametrize("name, option", FULL_OPTIONS, ids=" ".join)
def test_an_option_that_is_cut_short_is_no_option(name, option, in_process):
    cut = option[:-1]
    if cut in options_of(name) or len(cut) < 4:
        pytest.skip("another option")
    status, out, err, left = in_process(*name.split(), *REQUIRED.get(name, ()), cut, "1")
    assert status == 2 and cut in err and not out and not left


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_an_option_without_its_value_is_named(name, in_process):
    for option in options_of(name):
        status, out, err, left = in_process(*name.split(), *REQUIRED.get(name, ()), option)
        assert status == 2 and f"argument {option}: expected one argument" in err and not out and not left


NUMBERS = {
    "bench": ["--seconds"],
    "bench here": ["--minutes"],
    "bench host": ["--layers", "--rounds"],
    "bench rotary": ["--threads", "--seconds", "--layers"],
    "bench step-cache": ["--threshold", "--steps", "--seed", "--repeats"],
    "demo": ["--steps", "--seed"],
    "generate": ["--height", "--width", "--frames", "--steps", "--guidance", "--seed", "--fps"],
}


@pytest.mark.parametrize("value", ["0x", "nan", "-1.5e999", ""])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_quoted(name, value, in_process):
    for option in NUMBERS[name]:
        status, out, err, left = in_process(*name.split(), *REQUIRED.get(name, ()), f"{option}={value}")
        assert status == 2 and f"argument {option}: `{value}` is no " in err and not out and not left


@pytest.mark.parametrize(
    "words, said",
    [
        ("demo --steps=0", "--steps: `0` is less than 1"),
        ("demo --seed=-1", "--seed: `-1` is less than 0"),
        ("generate --model x --height=0", "--height: `0` is less than 1"),
        ("generate --model x --fps=0", "--fps: `0` is not above 0"),
        ("bench step-cache --seed=99999999999999999999", "is more than 9223372036854775807"),
        ("bench --seconds=-1", "--seconds: `-1` is not above 0"),
        ("bench here --minutes=0", "--minutes: `0` is not above 0"),
        ("bench host --rounds=3", "--rounds: `3` is less than 9"),
        ("bench rotary --threads=0", "--threads: `0` is less than 1"),
        ("bench rotary --layers=-1", "--layers: `-1` is less than 1"),
        ("bench step-cache --steps=0", "--steps: `0` is less than 1"),
    ],
)
def test_a_number_that_no_command_can_use_is_refused_before_anything_begins(words, said, in_process):
    status, out, err, left = in_process(*words.split())
    assert status == 2 and said in err and not out and not left


@pytest.mark.parametrize("name", REQUIRED)
def test_a_command_without_what_it_cannot_do_without_names_it(name, in_process):
    status, out, err, left = in_process(name)
    assert status == 2 and "the following arguments are required" in err and not out and not left


CHOICES = [
    ("bench diffusers/wan", "--only", 2),
    ("bench diffusers/wan", "--device", 1),
    ("bench host diffusers/wan", "--only", 2),
    ("bench here --tiny", "--only", 1),
    ("bench here --tiny", "--device", 1),
    ("bench rotary qwen3", "--only", 2),
    ("bench rotary qwen3", "--device", 1),
    pytest.param("bench step-cache", "--preset", 1, marks=needs["cache_dit"]),
    pytest.param("bench step-cache", "--set", 1, marks=needs["cache_dit"]),
    pytest.param("bench step-cache", "--call", 1, marks=needs["cache_dit"]),
    pytest.param("bench step-cache", "--device", 1, marks=needs["cache_dit"]),
    pytest.param("bench step-cache --model x --prompt x", "--dtype", 1, marks=needs["cache_dit"]),
    pytest.param("bench step-cache", "--prompts", 1, marks=needs["cache_dit"]),
    ("check diffusers/wan", "--device", 1),
    ("check diffusers/wan", "--dtype", 1),
    ("check diffusers/wan", "--config", 1),
    ("check diffusers/wan", "--model", 1),
    ("check diffusers/wan", "--spec-dir", 1),
    ("list", "--spec-dir", 1),
    ("show diffusers/wan", "--spec-dir", 1),
    ("new diffusers.WanTransformer3DModel", "--mini", 1),
    ("generate --model shapes --prompt x", "--dtype", 1),
    ("generate --model shapes --prompt x", "--device", 1),
    ("generate --model shapes --prompt x", "--offload", 2),
    ("generate --model shapes --prompt x", "--compile", 2),
    ("generate --model shapes --prompt x", "--call", 1),
    ("generate --model shapes --prompt x", "--image", 1),
    ("generate --model shapes --prompt x", "--spec-dir", 1),
    ("generate --model shapes --prompt x", "--patch-model", 1),
    ("generate --model shapes --prompt x", "--step-cache", 1),
    ("generate --model shapes --prompt x", "--max-bytes", 1),
    ("run", "--print-env", 2),
]


@needs_diffusers
@pytest.mark.parametrize("words, option, expected", CHOICES)
def test_a_value_that_does_not_exist_is_quoted_before_anything_begins(words, option, expected, in_process):
    extra = ["--patch-model"] if option == "--spec-dir" and words.startswith("generate") else []
    status, out, err, left = in_process(*words.split(), *extra, f"{option}=nowhat")
    assert status == expected and "nowhat" in err and "Traceback" not in err and not left
    assert not out or words == "check diffusers/wan"


OUTPUTS = [
    ("bench diffusers/wan", "--csv", "x.csv"),
    ("bench host diffusers/wan", "--csv", "x.csv"),
    ("bench rotary qwen3", "--csv", "x.csv"),
    ("bench rotary qwen3", "--json", "x.json"),
    ("bench here --tiny --device cpu", "--out", "x.json"),
    ("new diffusers.WanTransformer3DModel", "--out", "x.yaml"),
    ("generate --model shapes --prompt x", "--out", "x.png"),
    ("generate --model shapes --prompt x", "--patch-report", "x.json"),
    ("run", "--patch-report", "x.json"),
]


@needs_diffusers
@pytest.mark.parametrize("where, said", [("missing", "No such file"), ("file", "Not a directory"), ("/proc", "")])
@pytest.mark.parametrize("words, option, name", OUTPUTS, ids=lambda value: value.split()[0])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(words, option, name, where, said, in_process):
    open("file", "w").close()
    path = f"{where}/{name}"
    rest = ["--", sys.executable, "-c", "open('started', 'w')"] if words == "run" else []
    status, out, err, left = in_process(*words.split(), option, path, *rest)
    assert status == 1 and f"{option}: `" in err and f"{path}` cannot be written: {said}" in err
    assert not out and left == ["file"]


@pytest.mark.parametrize("words", ["demo", pytest.param("bench step-cache", marks=needs["cache_dit"])])
@needs_diffusers
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(words, in_process):
    open("file", "w").close()
    for path, said in (("file", "is a file; give a folder"), ("file/x", "cannot be written"), ("/proc/x", "cannot be")):
        status, out, err, left = in_process(*words.split(), "--out", path)
        assert status == 1 and f"--out: `{path}` {said}" in err and not out and left == ["file"]


def test_a_command_that_is_none_is_answered_with_the_nearest(in_process):
    status, _, err, _ = in_process("chekc", "diffusers/wan")
    assert status == 2 and "no command `chekc`; did you mean `check`?" in err
    status, _, err, _ = in_process()
    assert status == 2 and "no COMMAND is given" in err and "usage: dit-patch" in err


def test_the_version_is_printed_without_torch():
    done = shell("--version")
    assert done.returncode == 0 and done.stdout.startswith("dit-patch ") and not done.stderr


def test_a_reader_who_has_enough_ends_the_command_quietly():
    command = f"{sys.executable} -m dit_patch schema | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout in ("{141\n", "{0\n") and not done.stderr  # the pipe may hold it all


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("buffering", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", ["--help", "list --help", "--version", "list", "schema"])
def test_a_full_standard_output_is_one_message(words, buffering):
    with open("/dev/full", "w") as full:
        command = [sys.executable, *buffering, "-m", "dit_patch", *words.split()]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "dit-patch: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("words", ["list", "--version"])
def test_a_closed_standard_output_does_no_harm(words):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m dit_patch {words} >&-"], stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0 and not done.stderr


def test_no_home_does_no_harm():
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    command = [sys.executable, "-m", "dit_patch", "show", "diffusers/wan"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "rope.forward" in done.stdout and not done.stderr


INTERRUPTED = [
    "demo --out out",
    "check diffusers/wan_vace",
    "bench diffusers/wan --csv x.csv --seconds 60",
    "bench host diffusers/wan --csv x.csv",
    "bench rotary qwen3 --csv x.csv --seconds 60",
    "bench here --tiny --device cpu --out x.json",
    pytest.param("bench step-cache --out out", marks=needs["cache_dit"]),
    "generate --model shapes --prompt x --steps 500 --out x.png",
    "doctor",
]


@needs_diffusers
@pytest.mark.parametrize("words", INTERRUPTED)
def test_ctrl_c_ends_a_command_with_one_word_and_nothing_half_written(words, tmp_path):
    command = [sys.executable, "-m", "dit_patch", *words.split()]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(1.5)
    while process.poll() is None and _has_no_torch(process.pid):
        time.sleep(0.2)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), err  # a shell makes 130 of both
    assert "dit-patch: interrupted" in err and "Traceback" not in err
    assert not [each for each in tmp_path.rglob("*") if each.name.startswith(".")]
    assert not list(tmp_path.rglob("*.png"))


def _has_no_torch(pid):
    with open(f"/proc/{pid}/maps") as maps:
        return "libtorch_cpu" not in maps.read()


@needs_diffusers
@needs["imageio"]
def test_a_disk_that_fills_up_leaves_no_video_and_no_success(tmp_path):
    from dit_patch.pipelines import loading

    try:
        loading.load("shapes", None)
    except DitPatchError as error:
        pytest.skip(str(error))

    def at_most_a_kilobyte():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    words = ["--model", "shapes", "--prompt", "a red circle moving up", "--steps", "2", "--call", "height=64"]
    words += ["--call", "width=64", "--out", "x.mp4"]
    done = shell("generate", *words, cwd=tmp_path, preexec_fn=at_most_a_kilobyte)
    assert done.returncode == 1 and "--out: `x.mp4` cannot be written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
