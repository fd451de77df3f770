"""`dit-patch doctor`: one page on an environment, for bug reports."""

import json

import pytest

from dit_patch import cli
from dit_patch.contribute import doctor
from dit_patch.errors import VersionError
from dit_patch.spec.registry import Registry

pytest.importorskip("diffusers")


@pytest.fixture
def few(monkeypatch):
    """Only a few specs, since each takes its time; the rest is as it is."""

    def choose(*names):
        specs = [spec for spec in Registry(plugins=False) if spec.name in names]

        class Few(Registry):
            def __iter__(self):
                return iter(specs)

        monkeypatch.setattr(doctor, "Registry", Few)

    return choose


def run(*words, capsys):
    status = cli.main(["doctor", *words])
    return status, capsys.readouterr().out


def test_it_says_what_there_is_and_what_apply_would_do(few, capsys, monkeypatch):
    few("diffusers/wan", "diffusers/mochi")
    monkeypatch.setenv("DIT_PATCH_MODEL", "rope")
    status, out = run(capsys=capsys)
    assert status == 0 and "!!" not in out
    for words in (
        ("torch", "threads"),
        ("diffusers", "0."),
        ("DIT_PATCH_MODEL", "rope"),
        ("diffusers/wan", "patches 6 of 7 sites of a tiny WanTransformer3DModel"),
        ("diffusers/mochi", "patches 4 of 4 sites"),
    ):
        assert any(all(word in line for word in words) for line in out.splitlines()), words


def test_it_is_json_too(few, capsys):
    few("diffusers/mochi")
    status, out = run("--json", capsys=capsys)
    facts = json.loads(out)
    assert status == 0 and facts[-1]["what"] == "diffusers/mochi" and not facts[-1]["is_fault"]
    assert {"environment", "packages"} <= {fact["heading"] for fact in facts}


@pytest.mark.parametrize(
    "problem, is_fault",
    [
        ("needs diffusers>=9; 0.42.1 is installed.", True),
        ("needs diffusers>=9, which is not installed: pip install 'diffusers>=9'", False),
    ],
)
def test_a_version_that_a_spec_excludes_is_a_fault_and_what_is_missing_is_none(
    problem, is_fault, few, capsys, monkeypatch
):
    few("diffusers/wan")

    def refuse(spec, strict):
        raise VersionError(f"{spec.name} {problem}")

    monkeypatch.setattr(doctor, "check_versions", refuse)
    monkeypatch.setattr(doctor, "is_installed", lambda spec: "not installed" not in problem)
    status, out = run(capsys=capsys)
    assert status == int(is_fault) and problem in out and ("!! diffusers/wan" in out) == is_fault


def test_a_model_that_cannot_be_built_is_a_fault_of_one_line(few, capsys, monkeypatch):
    few("diffusers/wan")
    monkeypatch.setattr(doctor.mini, "build", lambda *_: 1 / 0)
    status, out = run(capsys=capsys)
    assert status == 1 and "ZeroDivisionError: division by zero" in out and "Traceback" not in out
