"""`dit-patch bench host`: plain and patched side by side on a CPU, in whole forwards and inside them."""

from __future__ import annotations

import csv

import pytest
import torch
from conftest import skip_unless_installed

from dit_patch.bench import host
from dit_patch.cli import main
from dit_patch.spec.registry import Registry


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(host, "_MANY", 7)
    monkeypatch.setattr(host, "_STEPS", 40)


def test_every_part_has_its_rows_and_says_what_its_sizes_mean(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert main(["bench", "host", "diffusers/wan", "--layers", "3", "--csv", str(tmp_path / "rows.csv")]) == 0
    assert torch.get_num_threads() == threads
    said = capsys.readouterr().out
    assert "Toy width" in said and all(title in said for title, _ in host.PARTS.values())
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert all(float(row["plain"]) > 0 and float(row["patched"]) > 0 for row in rows)
    of = {part: [row["what"] for row in rows if row["part"] == part] for part in host.PARTS}
    kinds = {site.kind for site in Registry().get("diffusers/wan").sites}
    assert of["forwards"] == ["everything", *(f"{kind} alone" for kind in ("rope", "timestep", "context", "rotary"))]
    assert kinds == {"rope", "timestep", "context", "rotary"}
    assert "rope.forward" in of["inside"] and "condition_embedder.time_proj.forward" in of["inside"]
    assert [what.partition(":")[0] for what in of["growth"]] == ["apply", "a forward", "a forward with a new timestep"]


def test_one_part_alone(capsys):
    assert main(["bench", "host", "diffusers/mochi", "--only", "inside", "--layers", "2"]) == 0
    said = capsys.readouterr().out
    assert host.PARTS["inside"][0] in said and host.PARTS["growth"][0] not in said


@pytest.mark.parametrize("spec", list(Registry(plugins=False)), ids=lambda spec: spec.name)
def test_a_mini_that_cannot_be_deepened_is_measured_as_it_is(spec):
    skip_unless_installed(spec)
    case, depth = host.deepened(spec, 6)
    assert depth in ("6 layers", "mini's depth")
    assert (case.config != spec.mini.config) == (depth == "6 layers")


def test_an_unknown_spec_is_one_clear_error(capsys):
    assert main(["bench", "host", "diffusers/wann"]) == 1
    assert "diffusers/wan" in capsys.readouterr().err
