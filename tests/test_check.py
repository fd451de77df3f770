"""`dit-patch check`: mistakes planted in the spec of a real model, each found and called by its name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dit_patch import cli
from dit_patch.contribute.check import blocks, cases, probe
from dit_patch.spec import mini
from dit_patch.spec.registry import BUNDLED, Registry

pytest.importorskip("diffusers")
WAN = BUNDLED / "diffusers" / "wan.yaml"
ROPE, TEXT, TIME = (
    "rope.forward",
    "condition_embedder.text_embedder.forward",
    "condition_embedder.time_embedder.forward",
)


@pytest.fixture
def check(tmp_path, capsys):
    """Checks Wan's spec after `change` has had its way with it; the exit status, and what was printed."""

    def run(change=lambda spec: None, *flags):
        spec = yaml.safe_load(WAN.read_text())
        spec.pop("bench")
        spec["mini"].pop("variants")
        spec["sites"] = [site for site in spec["sites"] if "image" not in site["at"]]
        change(spec)
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False))
        status = cli.main(["check", str(path), *flags])
        return status, capsys.readouterr().out

    return run


def site(spec, at):
    return next(each for each in spec["sites"] if each["at"] == at)


def problems(out):
    return [line.removeprefix("problem: ") for line in out.splitlines() if line.startswith("problem: ")]


def test_a_spec_without_mistakes_passes_with_every_site_equal_and_hit(check):
    status, out = check()
    assert status == 0 and out.endswith("no problems found\n")
    rows = {line.split()[0]: line.split()[2:5] for line in out.splitlines() if line.startswith("  ") and "." in line}
    assert rows[ROPE] == ["48", "42", "yes"]
    [turned] = [rows.pop(at) for at in list(rows) if at.endswith(".apply_rotary_emb")]
    assert turned == ["192", "192", "yes"]  # never kept: each call is one of the replacement
    assert all(equal == "yes" and 0 < int(hits) < int(calls) for calls, hits, equal in rows.values())
    assert out.count("equal: yes") == 2 and "NO" not in out


def too_coarse(spec):
    site(spec, TEXT)["key"] = {"caption": ["shape"]}


def too_coarse_where_it_is_used(spec):
    site(spec, TEXT).update(key={"caption": ["shape"]}, unused_with=["model.attention_kwargs"])


def wrong_pattern(spec):
    spec["blocks"] = [{"at": "blocks", "pattern": 0}]


def missing_address(spec):
    site(spec, ROPE)["at"] = "ropes.forward"


def misspelt_argument(spec):
    site(spec, TIME)["key"] = {"sample": ["shape", "dtype", "device"], "model.timesteps": ["identity"]}


def content_that_changes(spec):
    site(spec, ROPE)["key"] = {"hidden_states": ["identity"]}


def never_reached(spec):
    spec["sites"].append({"at": "blocks.0.attn1.set_processor", "kind": "context", "key": {}})


def one_bit_off(spec):
    own = site(spec, "condition_embedder.timesteps_proj.forward")
    own["use"] = "toys:sinusoid_off_by_a_bit"


@pytest.mark.parametrize(
    "mistake, said",
    [
        (too_coarse, (TEXT, "its key is too coarse", "`caption: [shape, identity]` would tell them apart")),
        (too_coarse_where_it_is_used, (TEXT, "`caption: [shape, identity]` would tell them apart")),
        (wrong_pattern, ("blocks", "pattern 0 is for blocks that", "these return one tensor", "2 or 3")),
        (missing_address, ("ropes.forward", "no submodule `ropes`; did you mean `rope`?")),
        (misspelt_argument, (TIME, "no parameter `timesteps`; did you mean `timestep`?")),
        (
            content_that_changes,
            (ROPE, "its key is finer than needed", "new one at each step", "hidden_states: [shape]"),
        ),
        (never_reached, ("blocks.0.attn1.set_processor", "never reached")),
        (one_bit_off, ("timesteps_proj", "toys:sinusoid_off_by_a_bit is not equal to the original")),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_mistake_is_the_one_problem_that_is_named(check, mistake, said):
    status, out = check(mistake, "--trust-specs")
    assert status == 1
    [problem] = problems(out)
    assert all(words in problem for words in said), problem
    assert "mine.yaml" in problem or mistake is wrong_pattern


def test_an_output_that_differs_is_said_whatever_the_sites_look_like(check):
    def negate(spec):
        spec["sites"] = [{"at": TEXT, "kind": "context", "then": "toys:negated"}]

    status, out = check(negate, "--trust-specs")
    assert status == 1 and "equal: NO" in out
    assert any("forward 0 of the patched model differs from the unpatched one's" in each for each in problems(out))


def test_a_file_may_extend_a_spec_that_is_known(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: my.Model\nextends: diffusers/wan\nsites:\n  - {at: rope.forward, kind: mask}\n")
    kinds = {each.at: each.kind for each in Registry().read(path).sites}
    assert kinds[ROPE] == "mask" and kinds[TEXT] == "context"


def test_several_mistakes_are_all_found_in_one_run(check):
    def all_of_them(spec):
        for mistake in (too_coarse, wrong_pattern, misspelt_argument, content_that_changes, never_reached, one_bit_off):
            mistake(spec)

    status, out = check(all_of_them, "--trust-specs")
    assert status == 1 and len(problems(out)) == 6


def test_a_tensor_that_the_key_does_not_mention_is_named(check):
    def forget(spec):
        site(spec, TEXT)["key"] = {}

    status, out = check(forget)
    assert status == 1
    assert "`caption` is a tensor, and `key` does not say what of it counts" in out


def test_weights_that_an_argument_was_computed_with_have_to_be_read(check):
    status, out = check(lambda spec: site(spec, "condition_embedder.time_proj.forward").pop("reads"))
    assert status == 1
    [problem] = problems(out)
    assert "condition_embedder.time_proj.forward" in problem
    assert "`reads: [condition_embedder.time_embedder]` would have them counted" in problem


def test_a_key_by_something_else_that_happens_to_change_with_it_is_too_coarse(tmp_path, capsys):
    spec = yaml.safe_load((BUNDLED / "diffusers" / "flux.yaml").read_text())
    metadata = ["shape", "dtype", "device"]
    site(spec, "pos_embed.forward")["key"] = {"ids": metadata, "model.encoder_hidden_states": ["identity"]}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(spec))
    assert cli.main(["check", str(path)]) == 1
    [problem] = problems(capsys.readouterr().out)
    assert "pos_embed.forward" in problem and "its key is too coarse" in problem
    assert "`model.txt_ids: [identity], model.img_ids: [identity]`" in problem or "model.img_ids" in problem


def test_an_address_that_only_a_variant_has_must_be_in_one_of_the_minis(check):
    def optional(spec):
        spec["sites"].append({"at": "condition_embedder.imagembedder.forward", "kind": "context", "optional": True})

    status, out = check(optional)
    assert status == 1 and "in none of the minis; is it misspelt, or a variant missing?" in out


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda spec: spec["mini"]["config"].update(attention_head_dim=7), "the unpatched model cannot be built"),
        (
            lambda spec: spec["mini"]["inputs"].pop("timestep"),
            "the unpatched model cannot be built or called so: TypeError",
        ),
        (lambda spec: spec.update(model=spec["model"][:-1]), "has no class WanTransformer3DMode"),
        (lambda spec: spec.update(model="no_such_package.Model"), "No module named 'no_such_package'"),
        (lambda spec: spec.update(requires=["diffusers>=99"]), "needs diffusers>=99"),
    ],
    ids=["config", "inputs", "class", "package", "version"],
)
def test_a_model_that_cannot_be_had_is_said_with_the_reason(check, change, said):
    status, out = check(change)
    assert status == 1 and said in problems(out)[0]


def test_errors_of_the_command_are_one_line_each(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "half.json").write_text("{")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "bare.yaml").write_text("model: a.B\nsites:\n  - {at: rope.forward, kind: rope}\n")
    for arguments, said in (
        (["diffusers/wam"], "did you mean `diffusers/wan`?"),
        ([str(tmp_path / "none.yaml")], "none.yaml"),
        ([str(tmp_path / "bare.yaml")], "without a `mini`"),
        (["diffusers/wan", "--config", str(tmp_path / "none.json")], "--config: "),
        (["diffusers/wan", "--config", str(tmp_path / "half.json")], "is not JSON"),
        (["diffusers/wan", "--config", str(tmp_path / "list.json")], "expected a model's config.json"),
        (["diffusers/wan", "--model", str(tmp_path)], "has no config.json"),
        (["diffusers/wan", "--model", str(tmp_path / "broken")], "is not JSON"),
        (["diffusers/wan", "--dtype", "bfloat17"], "`bfloat17` is no dtype"),
        (["diffusers/wan", "--dtype", "vae=float32"], "`vae=float32` is no dtype"),
        (["diffusers/wan", "--device", "cpuu"], "`cpuu` is no device"),
    ):
        assert cli.main(["check", *arguments]) == 1
        err = capsys.readouterr().err
        assert said in err and "Traceback" not in err, (arguments, err)


def test_a_configuration_keeps_its_modes_and_takes_the_minis_sizes(tmp_path, capsys):
    spec = Registry(plugins=False).get("diffusers/wan")
    given = {
        "_class_name": "WanTransformer3DModel",
        "num_layers": 40,
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 36,
        "out_channels": 16,
        "text_dim": 4096,
        "ffn_dim": 13824,
        "image_dim": 1280,
        "added_kv_proj_dim": 5120,
        "cross_attn_norm": False,
        "eps": 1e-5,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(given))
    subject = cases.from_config(spec, file)
    config = subject.case.config
    assert "mini i2v" in subject.name
    assert (config["num_layers"], config["image_dim"], config["cross_attn_norm"], config["eps"]) == (2, 20, False, 1e-5)
    assert cli.main(["check", "diffusers/wan", "--config", str(file)]) == 0
    assert "condition_embedder.image_embedder.forward" in capsys.readouterr().out


def test_given_weights_are_loaded_and_checked(tmp_path, capsys):
    spec = Registry(plugins=False).get("diffusers/wan")
    model = mini.build(spec, spec.mini.case(), seed=3)
    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    status = cli.main(["check", "diffusers/wan", "--model", str(tmp_path / "pipeline"), "--device", "cpu"])
    out = capsys.readouterr().out
    assert status == 0 and "with inputs like mini" in out and "bfloat16" in out
    subject = cases.from_weights(spec, tmp_path / "pipeline", torch.float32)
    loaded = subject.build(spec, torch.float32, "cpu")
    assert torch.equal(loaded.proj_out.weight, model.proj_out.weight)


def test_a_shell_meets_the_same_and_its_status(tmp_path):
    spec = yaml.safe_load(WAN.read_text())
    spec["sites"] = [{"at": "ropes.forward", "kind": "rope"}]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(spec))
    done = subprocess.run([sys.executable, "-m", "dit_patch", "check", str(path)], capture_output=True, text=True)
    assert done.returncode == 1 and "did you mean `rope`?" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "returned, taken, fitting",
    [
        ("h", "h e", [2, 3]),
        ("h e", "h e", [0]),
        ("e h", "h e", [1]),
        ("h e", "h", [4]),
        ("e h", "h", [5]),
        ("h e x", "h e", []),
    ],
)
def test_the_pattern_of_blocks_is_seen_in_what_they_take_and_return(returned, taken, fitting):
    def tensors(step):
        return {name: torch.full((2, 3), float(step)) for name in "hex"}

    calls = []
    given = tensors(0)
    for step in range(2):
        made = tensors(step + 1)
        result = tuple(made[name] for name in returned.split())
        calls.append(
            blocks.BlockCall(tuple(given[name] for name in taken.split()), {}, result if len(result) > 1 else result[0])
        )
        given = made
    assert blocks.fitting_patterns(calls)[0] == fitting


def test_a_key_is_judged_by_the_calls_that_were_seen():
    def call(number, result, **parts):
        return probe.Call(
            number,
            (0, number),
            0,
            {
                name: {"shape": 1, "dtype": 1, "device": 1, "identity": value, "values": value}
                for name, value in parts.items()
            },
            result,
        )

    calls = [call(0, "a", x=1, y=1), call(1, "b", x=2, y=1), call(2, "a", x=3, y=1)]
    one, other, finer = probe.too_coarse(calls, {"y": ("identity",)})
    assert (one.forward, other.forward, finer) == (0, 1, "x: [identity]")
    assert probe.too_coarse(calls, {"x": ("identity",)}) is None
    same = [call(number, "a", x=number) for number in range(3)]
    assert probe.too_fine(same, {"x": ("identity",)}) == "x: [shape]"
    assert probe.too_fine(same, {"x": ("shape",)}) is None
    assert probe.too_fine([call(number, str(number), x=number) for number in range(3)], {"x": ("identity",)}) is None


def test_every_bundled_spec_is_a_file_that_check_reads_under_its_name():
    registry = Registry(plugins=False)
    for path in Path(BUNDLED).rglob("*.yaml"):
        assert registry.read(path).name == path.relative_to(BUNDLED).with_suffix("").as_posix()
