"""What a YAML file may say, what it is told where it may not, and that no text makes the reader raise anything else."""

import json
import pickle
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dit_patch.errors import SpecError
from dit_patch.spec import yaml_reader
from dit_patch.spec.address import SpanAddress
from dit_patch.spec.json_schema import json_schema
from dit_patch.spec.loading import load, loads
from dit_patch.spec.model import Site, Spec, extend
from dit_patch.spec.recipe import Input, Mini

FULL = """\
model: diffusers.models.transformers.transformer_wan.WanTransformer3DModel
extends: diffusers/wan
requires: [diffusers>=0.35, "torch>=2.4,<4"]
blocks:
  - {at: blocks, pattern: 3}
step_cache: {min_steps: 12}
sites:
  - at: rope.forward
    kind: rope
    key: {hidden_states: [shape, device]}
  - at: condition_embedder.timesteps_proj.forward
    kind: timestep
    key: {timesteps: [shape, dtype, device], model.timestep: [identity]}
    use: dit_patch.functions.sinusoid:timesteps
    source: 3f2a9c0d1e4b
    reads: [condition_embedder.time_embedder]
    device: model
    dtype: float32
    clears: [_freqs_cos]
    optional: true
    bind: {num_frame_per_block: model.num_frame_per_block}
  - at: get_rope
    kind: rope
    unused: true
    device: model
  - at: patch_embedding..condition_embedder
    kind: mask
    key: {model.encoder_attention_mask: [identity]}
mini:
  config: {num_layers: 2, patch_size: [1, 2, 2]}
  sizes: [{f: 3, h: 8, w: 8}, {f: 2, h: 8, w: 12}]
  inputs:
    hidden_states: {shape: [1, 4, f, h, w], new: step}
    timestep: {shape: [1], fill: timestep, new: step, dtype: int64}
    guidance: {shape: [], fill: 6000.0}
    fps: {value: [1]}
  variants:
    image:
      config: {image_dim: 20}
      inputs: {guidance: null, image: {shape: [1, 257, n]}}
      sizes: [{f: 1, h: 4, w: 4, n: 20}]
bench:
  720p: {config: {num_layers: 30}, sizes: [{f: 21, h: 90, w: 160}]}
"""
HEAD = "model: a.b.C\n"


def with_site(**keys):
    """A spec with one site of these keys, as YAML text; None leaves a key out."""
    site = {"at": "rope.forward", "kind": "rope"} | keys
    return HEAD + "sites:\n  - " + json.dumps({name: value for name, value in site.items() if value is not None})


def with_mini(**keys):
    mini = {"config": {}, "sizes": [{"f": 2}], "inputs": {"x": {"shape": [1, "f"]}}} | keys
    return HEAD + "blocks: [{at: blocks, pattern: 0}]\nmini: " + json.dumps(mini)


def complaint(text, **options):
    with pytest.raises(SpecError) as caught:
        loads(text, file="my.yaml", **options)
    return str(caught.value)


class TestReading:
    def test_every_key_of_the_vocabulary_is_read(self):
        spec = loads(FULL, file="specs/wan.yaml", name="wan")
        assert spec.classes == ("diffusers.models.transformers.transformer_wan.WanTransformer3DModel",)
        assert spec.requires == ("diffusers>=0.35", "torch>=2.4,<4")
        assert (spec.blocks[0].at, spec.blocks[0].pattern) == ("blocks", 3)
        assert spec.step_cache.min_steps == 12 and spec.step_cache.supported
        sinusoid = spec.sites[1]
        assert sinusoid.key == {"timesteps": ("shape", "dtype", "device"), "model.timestep": ("identity",)}
        assert sinusoid.source == ("3f2a9c0d1e4b",)
        assert sinusoid.bind == {"num_frame_per_block": "model.num_frame_per_block"}
        assert (sinusoid.device, sinusoid.dtype, sinusoid.optional) == ("model", "float32", True)
        assert spec.mini.inputs["guidance"].shape == () and spec.mini.inputs["guidance"].fill == 6000.0
        assert spec.mini.config["patch_size"] == [1, 2, 2]

    def test_a_site_knows_the_line_that_declares_it(self):
        spec = loads(FULL, file="specs/wan.yaml", name="wan")
        assert [spec.origin.sites[site.at] for site in spec.sites[:2]] == ["specs/wan.yaml:8", "specs/wan.yaml:11"]
        assert spec.position("extends") == "specs/wan.yaml:2:10"

    def test_a_span_has_a_start_and_an_end_and_a_call_has_neither(self):
        call, *_, span = loads(FULL).sites
        assert span.address == SpanAddress("patch_embedding", "condition_embedder")
        assert not isinstance(call.address, SpanAddress)

    def test_a_file_is_called_by_its_path_from_here(self, tmp_path, monkeypatch):
        (tmp_path / "specs").mkdir()
        path = tmp_path / "specs" / "toy.yaml"
        path.write_text("modle: a.b.C\n")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SpecError, match=r"^specs/toy\.yaml:1:1: modle: unknown key; did you mean `model`\?"):
            load(path)
        monkeypatch.chdir(tmp_path / "specs")
        with pytest.raises(SpecError, match=r"^toy\.yaml:1:1:"):
            load(path)

    def test_a_loaded_file_is_named_after_itself_and_knows_its_path(self, tmp_path):
        path = tmp_path / "toy.yaml"
        path.write_text("\ufeff" + FULL, encoding="utf-8")
        assert (load(path).name, load(path).path) == ("toy", path)
        assert load(path, name="my/toy", trusted=True).name == "my/toy"

    def test_a_spec_is_frozen_and_can_be_pickled(self):
        spec = loads(FULL, name="wan")
        with pytest.raises(ValidationError):
            spec.sites[0].kind = "mask"
        copy = pickle.loads(pickle.dumps(spec))
        assert copy == spec and copy.name == "wan" and copy.origin == spec.origin

    def test_words_that_yaml_1_1_takes_for_booleans_stay_words(self):
        spec = loads(with_mini(inputs={"on": {"shape": ["no"]}}, sizes=[{"no": 2}]).replace('"', ""))
        assert spec.mini.inputs["on"].shape == ("no",)

    def test_numbers_are_read_as_json_reads_them(self):
        text = (
            HEAD + "blocks: [{at: b, pattern: 0}]\nmini:\n  config: {a: 1e5, b: 010, c: 1_0, d: -2.5, e: 1:30, f: ~}\n"
        )
        config = loads(text + "  sizes: [{}]\n  inputs: {x: {shape: [1]}}").mini.config
        assert config == {"a": 1e5, "b": "010", "c": "1_0", "d": -2.5, "e": "1:30", "f": None}

    def test_reading_a_spec_imports_no_torch(self):
        code = (
            "import sys\n"
            "import dit_patch.spec.registry as r, dit_patch.spec.json_schema as s\n"
            "s.json_schema(), r.Registry().names()\n"
            "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestComplaints:
    def test_an_unknown_key_is_answered_with_the_nearest_one(self):
        text = HEAD + "sites:\n  - at: rope.forward\n    kind: rope\n    keys: {x: [shape]}\n"
        assert complaint(text) == "my.yaml:5:5: sites.0.keys: unknown key; did you mean `key`?"

    def test_an_unknown_key_that_is_near_to_nothing_is_answered_without_a_guess(self):
        assert complaint(HEAD + "blocks: []\nxyzzy: 1") == "my.yaml:3:1: xyzzy: unknown key"

    @pytest.mark.parametrize(
        "text, key, nearest",
        [
            (with_mini(variants={"inputs": {"confg": {}}}), "mini.variants.inputs.confg", "config"),
            (with_mini(inputs={"shape": {"shap": [1]}}), "mini.inputs.shape.shap", "shape"),
            (HEAD + "step_cache: {min_step: 1}", "step_cache.min_step", "min_steps"),
            (HEAD + "blocks: [{at: b, patern: 1}]", "blocks.0.patern", "pattern"),
            (HEAD + "bench: {mini: {size: []}}", "bench.mini.size", "sizes"),
        ],
    )
    def test_the_nearest_key_is_one_of_the_same_part(self, text, key, nearest):
        assert f" {key}: unknown key; did you mean `{nearest}`?" in complaint(text)

    def test_everything_wrong_is_said_at_once_in_the_order_of_the_file(self):
        text = (
            "modle: a.b.C\n"
            "requires: [diffusers>>1]\n"
            "blocks:\n  - {at: blocks, pattern: 9}\n  - {at: blocks}\n"
            "sites:\n  - at: rope.forward\n    kind: rop\n    key: {x: [shap]}\n    key: {}\n"
            "    use: os:system\n"
        )
        places = [line.split(": ")[0] for line in complaint(text).splitlines()]
        assert places == [f"my.yaml:{at}" for at in ("1:1", "2:12", "4:27", "5:5", "8:11", "9:15", "10:5", "11:10")]

    def test_what_is_missing_from_a_block_is_told_where_the_block_is_named(self):
        text = HEAD + "extends: x\nmini:\n\n  sizes: [{}]\n  inputs:\n    x: {shape: [1]}\n"
        assert complaint(text) == "my.yaml:3:1: mini: `config` is missing"

    def test_a_requirement_too_deep_for_its_parser_is_refused(self):
        assert "is too long for a requirement" in complaint(HEAD + f"extends: x\nrequires: ['a; {'(' * 50_000}']")

    def test_a_flood_of_complaints_is_cut_and_counted(self):
        lines = complaint(HEAD + "".join(f"x{number}: 1\n" for number in range(60))).splitlines()
        assert len(lines) == 51 and lines[-1] == "my.yaml: and 10 more"

    @pytest.mark.parametrize(
        "change, words",
        [
            (
                {"kind": "ropee"},
                "kind: expected one of rope, timestep, mask, context, rotary, kv_cache, not `ropee`; "
                "did you mean `rope`?",
            ),
            ({"key": {"x": ["shap"]}}, "not `shap`; did you mean `shape`?"),
            ({"key": {"x": []}}, "key.x: must not be empty"),
            ({"key": {"x": ["shape", "shape"]}}, "key.x: `shape` is listed twice"),
            ({"key": {"x": "shape"}}, "key.x: expected a list (`[a, b]`), not `shape`"),
            ({"key": {"x y": ["shape"]}}, "`x y` is not an argument's name"),
            ({"key": {"other.x": ["shape"]}}, "`other.x` is not an argument's name"),
            ({"key": ["x"]}, "key: expected a mapping (`name: value`), not a list"),
            ({"device": "cuda"}, "device: expected `model`, not `cuda`"),
            ({"dtype": "flaot32"}, "did you mean `float32`?"),
            ({"at": True}, "at: expected text, and `true` is read as true or false; put it in quotes"),
            ({"at": None}, "sites.0: `at` is missing"),
            ({"optional": "yes"}, "optional: expected true or false, not `yes`"),
            ({"clears": ["a."]}, "clears.0: `a.` is not the path of an attribute"),
            ({"bind": {"n": "n"}}, "bind.n: `n` is not an argument of the model's forward, `model.name`"),
            ({"reads": ["blocks."]}, "reads.0: `blocks.` is not the path of a submodule"),
            ({"reads": ["a.b:c.d"]}, "reads.0: `a.b:c.d` is not the path of a submodule"),
            ({"unused_with": ["x"]}, "unused_with.0: `x` is not an argument of the model's forward, `model.name`"),
            ({"then": "dit_patch.functions.f"}, "then: `dit_patch.functions.f` is not a function"),
            ({"at": "pipeline:f"}, "at: a method of the pipeline needs `then`"),
            (
                {"then": "dit_patch.functions.f:g", "key": {"x": ["shape"]}},
                "key: does not go with `then`, which takes only at, kind and optional",
            ),
            ({"use": "dit_patch.functions.masks:dense"}, "use: needs `source`"),
            ({"use": "dit_patch.functions.masks.dense", "source": "0" * 11 + "a"}, "is not a function"),
            ({"source": "00000000000a"}, "source: goes only with `use`"),
            (
                {"source": 123456789012},
                "source: expected text, and `123456789012` is read as a number; put it in quotes",
            ),
            ({"source": ["3F2A9C0D1E4B"]}, "is not a source fingerprint"),
        ],
    )
    def test_a_broken_site_is_told_what_to_write(self, change, words):
        assert words in complaint(with_site(**change))

    @pytest.mark.parametrize("name", ["key", "use", "source", "reads", "bind", "then", "unused_with"])
    def test_an_unused_result_has_nothing_that_says_how_to_make_it(self, name):
        given = {
            "key": {"x": ["shape"]},
            "use": "dit_patch.functions.masks:dense",
            "source": "00000000000a",
            "reads": ["a"],
            "bind": {"n": "model.n"},
            "then": "dit_patch.functions.kv_cache:integer_indices",
            "unused_with": ["model.kv_cache"],
        }[name]
        assert f"sites.0.{name}: says nothing next to `unused: true`" in complaint(
            with_site(unused=True, **{name: given})
        )

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"key": {"x": ["identity"]}}, "key.x: a span has no arguments; did you mean `model.x`?"),
            ({"key": {"model.x": ["shape"]}}, "key.model.x: a span may know an argument only by `[identity]`"),
            ({"device": "model"}, "device: does not go with a span"),
            ({"unused": True}, "unused: does not go with a span"),
            ({"at": "a..a"}, "two different submodules"),
            ({"at": "a..b.*"}, "both ends of a span have the same `*`"),
            ({"at": "..b.*.c"}, "both ends of a span have the same `*`"),
        ],
    )
    def test_a_span_takes_only_what_has_a_meaning_for_it(self, change, words):
        assert words in complaint(with_site(**({"at": "a..b"} | change)))

    @pytest.mark.parametrize(
        "text, words",
        [
            ("blocks: [{at: b, pattern: 0}]", "my.yaml:1:1: `model` is missing"),
            (HEAD + "models: [a.b.D]\nextends: x", "my.yaml:2:9: models: a spec has a `model` or `models`, not both"),
            ("models: [a.B, a.B]\nextends: x", "models: `a.B` is listed twice"),
            ("models: []\nextends: x", "models: must not be empty"),
            ("model: Wan\nextends: x", "model: `Wan` is not the dotted name of a class"),
            (HEAD, "needs at least one of `sites`, `blocks` and `extends`"),
            (HEAD + "extends:", "extends: is empty; give it a value or leave the key out"),
            (
                HEAD + "extends: x\nrequires: [not a requirement]",
                "requires.0: `not a requirement` is not a requirement",
            ),
            (HEAD + "extends: x\nrequires: [1.0]", "`1.0` is read as a number; put it in quotes"),
            (HEAD + "extends: x\nstep_cache: {supported: false}", "supported: false needs a `reason`"),
            (HEAD + "extends: x\nstep_cache: {reason: so}", "reason: goes only with `supported: false`"),
            (HEAD + "extends: x\nstep_cache: {supported: false, reason: so, min_steps: 3}", "min_steps: says nothing"),
            (HEAD + "extends: x\nbench: {big: {}}", "bench: needs `mini`"),
            (HEAD + "blocks: [{at: b, pattern: 0}, {at: b, pattern: 1}]", "blocks.1.at: `b` is listed twice"),
            (HEAD + "blocks: [{at: b, pattern: true}]", "pattern: expected a whole number, not `true`"),
            (HEAD + "sites: rope", "sites: expected a list (`[a, b]`), not `rope`"),
        ],
    )
    def test_a_broken_spec_is_told_what_to_write(self, text, words):
        assert words in complaint(text)

    def test_a_shape_may_use_whole_numbers_of_the_config_by_name(self):
        inputs = {"x": {"shape": ["channels", "f"]}}
        mini = loads(with_mini(config={"channels": 3}, sizes=[{"f": 2}], inputs=inputs)).mini
        assert mini.case().names({"f": 2}) == {"channels": 3, "f": 2}
        words = "uses `channels`, which sizes.0 does not bind, nor `config`"
        for value in (None, 0, 1.5, True, "3"):
            assert words in complaint(with_mini(config={"channels": value}, sizes=[{"f": 2}], inputs=inputs))

    def test_two_sites_cannot_have_one_address(self):
        text = HEAD + "sites:\n  - {at: a.f, kind: rope}\n  - {at: b.f, kind: rope}\n  - {at: a.f, kind: mask}\n"
        assert complaint(text) == "my.yaml:5:10: sites.2.at: `a.f` is listed twice, first as sites.0"

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"sizes": []}, "sizes: must not be empty"),
            ({"sizes": [{"f": 0}]}, "sizes.0.f: must be above 0, not `0`"),
            ({"sizes": [{"f": 1}, {"g": 1}]}, "shape.1: the shape of `x` uses `f`, which sizes.1 does not bind"),
            ({"variants": {"v": {"sizes": [{"g": 1}]}}}, "variants.v.sizes.0: the shape of `x` uses `f`"),
            (
                {"variants": {"v": {"inputs": {"y": {"shape": ["h"]}}}}},
                "variants.v.inputs.y.shape.0: the shape of `y` uses `h`",
            ),
            (
                {"variants": {"v": {"inputs": {"z": None}}}},
                "variants.v.inputs.z: leaves out an input that `mini` does not have",
            ),
            ({"inputs": {}}, "mini: needs `inputs` (or a `rollout`)"),
            ({"rollout": "dit_patch.hosts.fastvideo:causal_wan"}, "rollout: makes the arguments itself"),
            ({"inputs": {"x": {"items": []}}}, "inputs.x.items: must not be empty"),
            ({"inputs": {"x": {"items": [{"shape": ["g"]}]}}}, "inputs.x.items.0.shape.0: the shape of `x` uses `g`"),
            ({"inputs": {"x": {"items": [{"shape": [1], "new": "step"}]}}}, "items.0.new: goes with the whole list"),
            ({"inputs": {"x": {"items": [{"shape": [1]}], "fill": "ones"}}}, "each item has its own"),
            ({"inputs": {"x": None}}, "inputs.x: expected a mapping (`name: value`), not nothing"),
            (
                {"inputs": {"x": {}}},
                "inputs.x: an input needs a `shape` (a tensor), `items` (a list of them) or a `value`",
            ),
            ({"inputs": {"x": {"shape": [1], "value": None}}}, "an input has a `shape` or a `value`, not both"),
            ({"inputs": {"x": {"value": 1, "fill": "ones"}}}, "fill: goes only with `shape`"),
            ({"inputs": {"x": {"shape": [1], "fill": "rand"}}}, "expected a number or one of randn, timestep, mask"),
            ({"inputs": {"x": {"shape": [1], "fill": True}}}, "not `true`"),
            ({"inputs": {"x": {"shape": [-1]}}}, "shape.0: `-1` is not a size"),
            ({"inputs": {"x": {"shape": ["f//2"]}}}, "shape.0: `f//2` is not a size"),
            ({"inputs": {"x": {"shape": [1], "new": "stp"}}}, "did you mean `step`?"),
        ],
    )
    def test_a_mini_model_that_cannot_be_called_is_refused(self, change, words):
        assert words in complaint(with_mini(**change))

    def test_a_bench_case_must_bind_what_the_shapes_of_mini_use(self):
        assert "bench.big.sizes.0: the shape of `x` uses `f`" in complaint(
            with_mini() + "\nbench: {big: {sizes: [{g: 1}]}}"
        )


@pytest.mark.parametrize(
    "at",
    [
        "forward",
        "rope.forward",
        "_prepare_mask",
        "blocks.*.attn.f",
        "*.f",
        "blocks.0.f",
        "forward:f",
        "a.b:f",
        "m:f",
        "a..b",
        "a.0..b.c",
    ],
)
def test_each_form_of_an_address_is_understood(at):
    assert Site(at=at, kind="rope").at == at


@pytest.mark.parametrize(
    "at",
    [
        "",
        "a.",
        ".a",
        "a.*",
        "*",
        "blocks.0",
        "a b",
        "f()",
        "a[0].f",
        "a:b:c",
        ":f",
        "a:",
        "*:f",
        "a..",
        "a...b",
        "a..b..c",
        "a.f\n",
        "é.f",
    ],
)
def test_what_is_no_address_is_answered_with_the_forms_there_are(at):
    message = complaint(with_site(at=at))
    assert "is not an address" in message
    assert all(form in message for form in ("`path.to.attribute`", "`forward:name`", "`package.module:name`", "`a..b`"))
    assert "\n" not in message


class TestTheYaml:
    @pytest.mark.parametrize(
        "text, words",
        [
            ("", "1:1: the file is empty"),
            ("# nothing\n", "1:1: the file is empty"),
            ("- a\n", "1:1: a spec is a mapping that begins with `model:`"),
            ("~", "1:1: a spec is a mapping"),
            ("model: a.b\n---\nmodel: a.c\n", "2:1: a second document begins"),
            ("model: a.b\nmodel: a.c\nextends: x", "2:1: `model` is given twice; first in line 1"),
            ("model: &x a.b\n", "1:8: an anchor, `&x`"),
            ("model: *x\n", "1:8: an alias, `*x`"),
            (
                "model: !!python/object/apply:os.system [ls]\n",
                "1:8: a tag, `tag:yaml.org,2002:python/object/apply:os.system`",
            ),
            ("model: !!str a.b\n", "1:8: a tag"),
            ("? [a]\n: b\n", "1:3: a key must be a word"),
            ("sites:\n\t- at: x\n", "2:1: a tab; YAML is indented with spaces"),
            ("model: a: b\n", "1:9: mapping values are not allowed"),
            ("model: {a\n", ":"),
            ("model: a\x00b\n", r"1:9: the character `\x00` is not allowed in YAML"),
            ("model: \ud800\n", "1:8: the character"),
            ("x: [" * 40, "nested more than 32 deep"),
            ("[" * 100_000, "nested more than 32 deep"),
            ("x: [" + "1," * 20_000 + "]", "more than 10000 entries"),
            ("#" * 300_000, "larger than 256 KiB"),
        ],
    )
    def test_what_is_no_plain_yaml_is_refused_at_its_place(self, text, words):
        start = time.monotonic()
        message = complaint(text)
        assert message.startswith("my.yaml:") and words in message
        assert time.monotonic() - start < 5

    def test_both_parsers_of_pyyaml_name_the_same_places(self, monkeypatch):
        import yaml

        texts = [FULL, FULL.replace("kind", "knid"), FULL.replace("shape:", "shape"), "a: &x 1", "a: 1\n---\nb: 1"]
        for text in texts:
            answers = []
            for parser in (yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
                monkeypatch.setattr(yaml_reader, "_LOADER", parser)
                try:
                    document = yaml_reader.parse(text, "f")
                    answers.append((document.data, document.places))
                except SpecError as error:
                    answers.append(str(error).split(": ")[0])
            assert answers[0] == answers[1]

    @pytest.mark.parametrize(
        "raw, words", [(b"model: \xff\n", ":1:8: not UTF-8"), (b"#" * 300_000, "larger than 256 KiB")]
    )
    def test_a_file_that_is_no_small_text_is_refused(self, tmp_path, raw, words):
        (tmp_path / "bad.yaml").write_bytes(raw)
        with pytest.raises(SpecError, match=words):
            load(tmp_path / "bad.yaml")

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path):
        for path in (tmp_path, tmp_path / "missing.yaml"):
            with pytest.raises(SpecError, match=f"{path.name}: cannot be read: "):
                load(path)

    def test_what_the_user_wrote_is_quoted_on_one_short_line(self):
        message = complaint(with_site(kind="a\n\x1b[31m" + "b" * 5000))
        assert len(message) < 400 and "\n" not in message and "\x1b" not in message

    @settings(max_examples=150, deadline=None)
    @given(st.text() | st.text(alphabet=" \n\t:-[]{},&*!|>'\"#%?@a1~.").map(lambda text: HEAD + text))
    def test_no_text_raises_anything_else(self, text):
        self.read(text)

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_no_damaged_spec_raises_anything_else(self, data):
        start = data.draw(st.integers(0, len(FULL)))
        end = data.draw(st.integers(start, min(len(FULL), start + 30)))
        middle = data.draw(
            st.text(max_size=8) | st.sampled_from(["[", "{", "null", "true", "1", ": ", "\n  - ", FULL[end : end + 40]])
        )
        self.read(FULL[:start] + middle + FULL[end:])

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_no_value_in_the_wrong_place_raises_anything_else(self, data):
        anything = st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=3)
            ),
            max_leaves=6,
        )
        tree = yaml_reader.parse(FULL, "full").data
        *path, last = data.draw(st.sampled_from(PLACES))
        branch = tree
        for step in path:
            branch = branch[step]
        branch[last] = data.draw(anything)
        self.read(json.dumps(tree))

    def read(self, text):
        try:
            spec = loads(text, file="my.yaml")
        except SpecError as error:
            assert all(line.startswith("my.yaml:") for line in str(error).split("\n"))
            str(error).encode()
        else:
            assert isinstance(spec, Spec)
            if spec.mini:
                for variant in (None, *spec.mini.variants):
                    assert None not in spec.mini.case(variant).inputs.values()


PLACES = [loc for loc in yaml_reader.parse(FULL, "full").places if loc]
WORDS = sorted({step for loc in PLACES for step in loc if isinstance(step, str)})


class TestTrust:
    def test_a_foreign_spec_may_name_only_functions_of_dit_patch(self):
        text = with_site(use="os:system", source="00000000000a")
        message = complaint(text)
        assert message.startswith("my.yaml:3:")
        assert "sites.0.use: `os:system` is code outside `dit_patch.functions`" in message
        assert "trust=True" in message and "--trust-specs" in message
        assert loads(text, trusted=True).trusted

    @pytest.mark.parametrize("module", ["dit_patch.functions", "dit_patch.functions.masks"])
    def test_a_foreign_spec_may_name_those(self, module):
        assert not loads(with_site(use=f"{module}:f", source="00000000000a")).trusted

    @pytest.mark.parametrize(
        "module", ["dit_patch", "dit_patch.functionsx", "dit_patch.handle", "x.dit_patch.functions.masks"]
    )
    def test_what_only_looks_like_them_is_refused(self, module):
        assert "is code outside" in complaint(with_site(use=f"{module}:f", source="00000000000a"))


class TestCases:
    def test_a_variant_is_merged_over_mini(self):
        case = loads(FULL).mini.case("image")
        assert case.config == {"num_layers": 2, "patch_size": [1, 2, 2], "image_dim": 20}
        assert set(case.inputs) == {"hidden_states", "timestep", "fps", "image"}
        assert case.sizes == ({"f": 1, "h": 4, "w": 4, "n": 20},)

    def test_without_a_variant_it_is_mini_itself(self):
        mini = loads(FULL).mini
        case = mini.case()
        assert not isinstance(case, Mini)
        assert (case.config, case.sizes, case.inputs) == (mini.config, mini.sizes, mini.inputs)

    def test_a_case_may_be_handed_to_a_model_that_writes_into_it(self):
        mini = loads(FULL).mini
        case = mini.case("image")
        case.config["patch_size"].append(9)
        case.inputs["fps"].value.append(9)
        assert mini.config["patch_size"] == [1, 2, 2] and mini.inputs["fps"].value == [1]

    def test_a_bench_case_is_merged_over_mini(self):
        case = loads(FULL).bench_case("720p")
        assert case.config["num_layers"] == 30 and case.sizes == ({"f": 21, "h": 90, "w": 160},)
        assert set(case.inputs) == {"hidden_states", "timestep", "guidance", "fps"}

    def test_an_unknown_case_is_answered_with_the_nearest_and_all(self):
        spec = loads(FULL, name="wan")
        with pytest.raises(SpecError, match=r"no variant `imgae`; did you mean `image`\? Known: image"):
            spec.mini.case("imgae")
        with pytest.raises(SpecError, match=r"wan has no bench `4k`. Known: 720p"):
            spec.bench_case("4k")

    def test_none_is_a_value_like_any_other(self):
        assert Input(value=None).is_value and not Input(shape=[1]).is_value


class TestExtending:
    BASE = (
        "model: a.b.Base\nrequires: [x>=1]\nstep_cache: {min_steps: 12}\nblocks: [{at: blocks, pattern: 0}]\n"
        "sites: [{at: a.f, kind: rope}, {at: b.f, kind: rope}]\n"
        "mini: {config: {}, sizes: [{}], inputs: {x: {shape: [1]}}}\nbench: {big: {}}\n"
    )

    def extended(self, text):
        return extend(loads(self.BASE, name="base", file="base.yaml"), loads(HEAD + text, name="own", file="own.yaml"))

    def test_own_sites_come_last_or_in_the_place_of_the_same_address(self):
        spec = self.extended("sites: [{at: c.f, kind: mask}, {at: a.f, kind: mask}]\nblocks: [{at: more, pattern: 1}]")
        assert [(site.at, site.kind) for site in spec.sites] == [("a.f", "mask"), ("b.f", "rope"), ("c.f", "mask")]
        assert [blocks.at for blocks in spec.blocks] == ["blocks", "more"]
        assert [spec.origin.sites[site.at] for site in spec.sites] == ["own.yaml:2", "base.yaml:5", "own.yaml:2"]

    def test_requirements_add_up_and_the_model_and_mini_are_its_own(self):
        spec = self.extended("extends: base\nrequires: [y>=2, x>=1]")
        assert spec.requires == ("x>=1", "y>=2")
        assert spec.classes == ("a.b.C",) and spec.name == "own"
        assert spec.mini is None and not spec.bench

    def test_a_step_cache_rule_is_inherited_unless_there_is_an_own_one(self):
        assert self.extended("extends: base").step_cache.min_steps == 12
        assert self.extended("extends: base\nstep_cache: {min_steps: 4}").step_cache.min_steps == 4


@pytest.fixture
def validator():
    """What an editor makes of the JSON Schema."""
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


class TestJsonSchema:
    def test_it_accepts_what_the_reader_accepts(self, validator):
        for text in (FULL, TestExtending.BASE, with_mini(), with_site(source=["00000000000a"], use="a:b")):
            validator.validate(yaml_reader.parse(text, "f").data)

    @pytest.mark.parametrize(
        "text",
        [
            "extends: x",
            HEAD + "models: [a.B]",
            HEAD + "extends:",
            with_site(keys={}),
            with_site(kind="ropee"),
            with_site(at="a.*"),
            with_site(key={"x": ["shap"]}),
            with_site(key={"x": []}),
            with_site(key={"x y": ["shape"]}),
            with_site(source="3F2A9C0D1E4B", use="a:b"),
            with_site(use="a:b"),
            with_site(optional="yes"),
            with_mini(inputs={"x": {}}),
            with_mini(inputs={"x": None}),
            with_mini(inputs={"x": {"shape": [0]}}),
            with_mini(sizes=[]),
        ],
    )
    def test_it_refuses_what_an_editor_can_see_is_wrong(self, validator, text):
        assert complaint(text, trusted=True)
        assert not validator.is_valid(yaml_reader.parse(text, "f").data)

    def test_every_key_is_explained(self):
        schema = json_schema()
        parts = {"Spec": schema, **schema["$defs"]}
        assert set(parts) == {"Spec", "Blocks", "StepCacheRule", "Site", "Input", "Case", "Mini"}
        for part, declared in parts.items():
            for key, about in declared["properties"].items():
                assert about.get("description", "").endswith("."), f"{part}.{key}"

    def test_it_proposes_null_only_where_null_is_a_value(self):
        defaults = [
            (part, key)
            for part, declared in {"Spec": json_schema(), **json_schema()["$defs"]}.items()
            for key, about in declared["properties"].items()
            if about.get("default", ...) is None
        ]
        assert defaults == [("Input", "value")]

    def test_it_has_no_private_fields(self):
        assert not [
            word for word in ("_origin", "origin", "trusted", "_places") if f'"{word}"' in json.dumps(json_schema())
        ]
