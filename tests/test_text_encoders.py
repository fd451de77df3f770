"""Text encoders: off until they are named, found inside what pipelines hold, and exact where their positions, their
frequencies or the way they were built are not the usual ones."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib import metadata

import pytest
import torch
import toys
from conftest import asked_for, skip_unless_installed

import dit_patch
from dit_patch import UnsupportedModelError, cli
from dit_patch.contribute import verify
from dit_patch.errors import SpecError
from dit_patch.sites.layers import Wrapped
from dit_patch.spec import mini
from dit_patch.spec.loading import loads
from dit_patch.spec.registry import Registry

transformers = pytest.importorskip("transformers")

QWEN3, QWEN_VL = NAMES = "transformers/qwen3", "transformers/qwen2_5_vl"
SITE = "rotary_emb.forward"
NEW = int(metadata.version("transformers").partition(".")[0]) >= 5
KINDS_OF_ROPE = {
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 8},
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [3.0, 4.0, 5.0, 6.0],
        "original_max_position_embeddings": 16,
    },
}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def spec_of(name):
    spec = Registry(plugins=False).get(name)
    skip_unless_installed(spec)
    return spec


def build(name, dtype=torch.float32, **config):
    """The spec's mini model, with these changes to its configuration."""
    spec = spec_of(name)
    case = spec.mini.case()
    return mini.build(spec, case.model_copy(update={"config": {**case.config, **config}}), dtype=dtype)


def inside_its_wrapper(name):
    """The class that pipelines hold, with the spec's class inside."""
    spec_of(name)
    config = dict(Registry(plugins=False).get(name).mini.config)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if name == QWEN3:
            return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config)).eval()
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
        special = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
        whole = transformers.Qwen2_5_VLConfig(text_config=config, vision_config=vision, **special)
        return transformers.Qwen2_5_VLForConditionalGeneration(whole).eval()


def pipeline_of(**components):
    return types.SimpleNamespace(components=components)


def prompt(tokens, batch=1, seed=0):
    ids = torch.randint(0, 60, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def padded_left(arguments, by):
    """The prompt behind padding, with positions that begin where it does."""
    mask = arguments["attention_mask"].clone()
    mask[:, :by] = 0
    return {**arguments, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def encode(model, *prompts):
    return verify.run(model, prompts)


def rows(handle):
    [row] = handle.stats()
    return row


class TestExact:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_over_lengths_and_batches_with_a_table_for_each(self, name, dtype):
        model = build(name, dtype)
        prompts = [prompt(tokens, batch, seed) for tokens, batch in ((5, 1), (9, 1), (9, 2), (1, 1)) for seed in (1, 2)]
        plain = encode(model, *prompts)
        with dit_patch.apply(model, only=name) as handle:
            assert verify.first_difference(plain, encode(model, *prompts)) is None
            hits, tables = rows(handle).hits, rows(handle).misses
        # A table of Qwen3's is every prompt's of a batch; Qwen2.5-VL repeats its own for each.
        assert (hits, tables) == ((5, 3) if name == QWEN3 else (4, 4))

    def test_behind_padding_of_any_width(self, name):
        model = build(name)
        prompts = [padded_left(prompt(8), by) for by in (0, 3, 5, 3)] + [prompt(8)]
        plain = encode(model, *prompts, *prompts)
        with dit_patch.apply(model, only=name) as handle:
            assert verify.first_difference(plain, encode(model, *prompts, *prompts)) is None
            assert (rows(handle).hits, rows(handle).misses) == (5, 5)

    def test_with_positions_that_were_written_into(self, name):
        given = padded_left(prompt(8), 3)
        model, positions = build(name), given["position_ids"]
        plain = encode(model, given, {**given, "position_ids": positions + 4})
        with dit_patch.apply(model, only=name):
            ours = encode(model, given)
            positions.add_(4)
            assert verify.first_difference(plain, ours + encode(model, given)) is None

    def test_with_places_in_a_cache_that_older_releases_make_the_positions_of(self, name):
        model = build(name)
        prompts = [{**prompt(5), "cache_position": torch.arange(5) * step} for step in (1, 2, 3)]
        plain = encode(model, *prompts)
        with dit_patch.apply(model, only=name):
            assert verify.first_difference(plain, encode(model, *prompts)) is None

    def test_with_positions_for_time_height_and_width(self):
        model = build(QWEN_VL)
        of_time, of_text = torch.arange(6) // torch.tensor([[[3]], [[2]], [[1]]]), torch.arange(6).expand(3, 1, 6)
        prompts = [{**prompt(6), "position_ids": grid} for grid in (of_time, of_text)]
        plain = encode(model, *prompts)
        assert verify.first_difference(plain[:1], plain[1:]) == 0
        with dit_patch.apply(model, only=QWEN_VL):
            assert verify.first_difference(plain, encode(model, *prompts)) is None

    def test_beyond_the_positions_that_the_model_was_made_for(self, name):
        model = build(name, max_position_embeddings=16)
        far = {**prompt(3), "position_ids": torch.arange(3)[None] + 10**6}
        prompts = [prompt(40), prompt(16), prompt(40, seed=1), far]
        plain = encode(model, *prompts)
        with dit_patch.apply(model, only=name) as handle:
            assert verify.first_difference(plain, encode(model, *prompts)) is None
            assert rows(handle).hits == 1

    def test_with_text_that_goes_on_after_what_a_cache_holds_which_is_passed_through(self, name):
        model, ids = build(name), prompt(6)["input_ids"]

        def go_on():
            with torch.no_grad():
                begun = model(input_ids=ids, use_cache=True).past_key_values
                return model(input_ids=ids[:, :1], past_key_values=begun, use_cache=True).last_hidden_state

        plain = go_on()
        with dit_patch.apply(model, only=name) as handle:
            assert torch.equal(plain, go_on())
            assert rows(handle).bypassed == {"`past_key_values` is a DynamicCache, which cannot be part of a key": 1}

    @pytest.mark.parametrize("kind", KINDS_OF_ROPE)
    def test_where_the_frequencies_are_scaled_or_change_with_the_length(self, name, kind):
        scaling = {"rope_type": kind, "rope_theta": 10000.0, **KINDS_OF_ROPE[kind]}
        if name == QWEN_VL:
            scaling["mrope_section"] = [2, 1, 1]
        ours, plain = (build(name, max_position_embeddings=16, rope_scaling=scaling) for _ in range(2))
        assert ours.rotary_emb.rope_type == kind
        lengths = (8, 8, 8, 24, 24, 40, 24, 8, 8, 40, 8)
        prompts = [prompt(tokens, seed=seed) for seed, tokens in enumerate(lengths)]
        fixed = encode(build(name), *prompts)
        with dit_patch.apply(ours, only=name):
            made = encode(ours, *prompts)
        assert verify.first_difference(encode(plain, *prompts), made) is None
        assert any(verify.first_difference([one], [other]) == 0 for one, other in zip(fixed, made))


class TestHoweverItWasBuilt:
    def test_on_the_meta_device_and_filled_later(self, name):
        plain = build(name)
        with torch.device("meta"):
            model = build(name)
        with dit_patch.apply(model, only=name) as handle:
            model.to_empty(device="cpu").load_state_dict(plain.state_dict())
            for ours, theirs in zip(model.buffers(), plain.buffers()):  # which no checkpoint has
                ours.copy_(theirs)
            prompts = [prompt(5, seed=seed) for seed in range(3)]
            assert verify.first_difference(encode(plain, *prompts), encode(model, *prompts)) is None
            assert rows(handle).hits == 2

    @pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"torch_dtype": torch.bfloat16}], ids=str)
    def test_saved_while_patched_and_loaded(self, name, options, tmp_path):
        model = build(name)
        with dit_patch.apply(model, only=name):
            encode(model, prompt(5))
            model.save_pretrained(tmp_path / "patched")
        model.save_pretrained(tmp_path / "plain")
        files = [sorted(each.name for each in (tmp_path / which).iterdir()) for which in ("patched", "plain")]
        assert files[0] == files[1]
        loaded, plain = (type(model).from_pretrained(tmp_path / "patched", **options).eval() for _ in range(2))
        prompts = [prompt(tokens) for tokens in (5, 7, 5)]
        with dit_patch.apply(loaded, only=name) as handle:
            assert verify.first_difference(encode(plain, *prompts), encode(loaded, *prompts)) is None
            assert rows(handle).hits == 1


class TestInAPipeline:
    def test_it_is_found_inside_what_the_pipeline_holds_and_hits_there(self, name):
        whole = inside_its_wrapper(name)
        pipeline = pipeline_of(text_encoder=whole, vae=torch.nn.Linear(2, 2))
        prompts = [prompt(7, seed=seed) for seed in range(3)]
        plain = encode(whole, *prompts)
        with dit_patch.apply(pipeline, only=name) as handle:
            path = "text_encoder.model" if name == QWEN3 else "text_encoder.model.language_model"
            assert handle.models == {path: whole.get_submodule(path.partition(".")[2])}
            assert verify.first_difference(plain, encode(whole, *prompts)) is None
            # Older releases make the positions of Qwen2.5-VL from the mask, anew for each prompt.
            assert rows(handle).hits == (2 if name == QWEN3 or NEW else 0)
        assert not any(isinstance(value, Wrapped) for module in whole.modules() for value in vars(module).values())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in whole.modules())

    def test_a_model_that_two_components_share_is_patched_once(self):
        whole = inside_its_wrapper(QWEN3)
        pipeline = pipeline_of(text_encoder=whole, rewriter=torch.nn.ModuleList([whole.model]))
        with dit_patch.apply(pipeline, only=QWEN3) as handle:
            assert list(handle.models) == ["text_encoder.model"]

    def test_a_text_encoder_that_is_compiled_around_it_is_warned_of(self):
        pipeline = pipeline_of(text_encoder=torch.compile(inside_its_wrapper(QWEN3)))
        with pytest.warns(UserWarning, match=r"text_encoder\.model \(Qwen3Model\) is compiled as a whole"):
            dit_patch.apply(pipeline, only=QWEN3).remove()

    def test_qwen_image_generates_the_same_with_both_its_models_patched(self):
        from dit_patch.pipelines.tiny_pipelines import llama3_tokenizer

        diffusers = pytest.importorskip("diffusers")
        tokenizer, encoder = llama3_tokenizer(), inside_its_wrapper(QWEN_VL)
        transformer = build("diffusers/qwen_image", joint_attention_dim=encoder.config.get_text_config().hidden_size)
        encoder.resize_token_embeddings(len(tokenizer))
        pipeline = diffusers.QwenImagePipeline(
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, encoder, tokenizer, transformer
        )
        pipeline.set_progress_bar_config(disable=True)

        def generate():
            options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
            generator = torch.Generator().manual_seed(0)
            return pipeline("a cat", negative_prompt="a dog", generator=generator, **options).images

        plain = generate()
        with dit_patch.apply(pipeline, only=["diffusers/qwen_image", QWEN_VL]) as handle:
            assert set(handle.models) == {"transformer", "text_encoder.model.language_model"}
            assert torch.equal(plain, generate())
            hit = {row.spec for row in handle.stats() if row.hits}
            assert hit == {"diffusers/qwen_image", QWEN_VL} if NEW else hit >= {"diffusers/qwen_image"}
        with dit_patch.apply(pipeline) as handle:
            assert set(handle.models) == {"transformer"}


class TestOffByDefault:
    def test_a_model_alone_is_not_silently_left_as_it_is(self, name):
        model, reason = build(name), spec_of(name).off_by_default
        for kinds in (None, ["rope"]):
            with pytest.raises(UnsupportedModelError) as caught:
                dit_patch.apply(model, only=kinds)
            assert str(caught.value) == (
                f"model: {name} is off by default: {reason}\n"
                f'    Ask for it by name: only=["{name}"], or --patch-model {name}.'
            )
        assert not model._forward_hooks

    def test_a_pipeline_is_told_what_it_has_no_spec_for_and_what_is_off(self):
        pipeline = pipeline_of(unet=toys.Elsewhere(), text_encoder=inside_its_wrapper(QWEN3))
        with pytest.raises(UnsupportedModelError) as caught:
            dit_patch.apply(pipeline)
        first, _, last, _ = str(caught.value).splitlines()
        assert first == "no spec for Elsewhere (toys)."
        assert last.startswith(f"text_encoder.model: {QWEN3} is off by default: ")

    def test_the_transformer_is_patched_and_the_text_encoder_left(self, tiny):
        wan = tiny("diffusers/wan")
        pipeline = pipeline_of(text_encoder=inside_its_wrapper(QWEN3), transformer=wan.model)
        for only, expected in (
            (None, ["transformer"]),
            (["rope"], ["transformer"]),
            ([QWEN3], ["text_encoder.model"]),
            ([QWEN3, "diffusers/wan", "rope"], ["text_encoder.model", "transformer"]),
        ):
            with dit_patch.apply(pipeline, only=only) as handle:
                assert list(handle.models) == expected

    def test_from_the_command_line_it_is_named(self, name):
        model = build(name)
        with dit_patch.from_args(model, {"patch_model": f"{name},rope"}) as handle:
            assert list(handle.models) == ["model"]
        with pytest.raises(UnsupportedModelError, match="is off by default"):
            dit_patch.from_args(model, {"patch_model": True})

    def test_list_and_show_say_so_and_why(self, name, capsys):
        assert cli.main(["list"]) == cli.main(["show", name]) == 0
        out = capsys.readouterr().out
        assert [line for line in out.splitlines() if line.startswith(f"{name} ") and line.endswith("(off by default)")]
        assert f"  off       by default: {spec_of(name).off_by_default}\n" in out
        assert f"            only=['{name}'] asks for it\n" in out
        assert cli.main(["show", "diffusers/wan"]) == 0
        assert "off " not in capsys.readouterr().out

    def test_check_and_bench_try_it(self, name, capsys):
        assert cli.main(["check", name]) == 0
        assert "no problems found" in capsys.readouterr().out
        assert cli.main(["bench", name, "--only", "hits", "--only", "kernels", "--seconds", "0.01"]) == 0
        assert "rotary_emb.forward" in capsys.readouterr().out

    def test_another_person_s_program_has_it_patched_where_it_is_named(self, tmp_path):
        inside_its_wrapper(QWEN3).save_pretrained(tmp_path / "encoder")
        program = tmp_path / "encode.py"
        program.write_text(
            "import torch, transformers\n"
            f"model = transformers.Qwen3ForCausalLM.from_pretrained({str(tmp_path / 'encoder')!r}).eval()\n"
            "for _ in range(3):\n    model(input_ids=torch.arange(6)[None], use_cache=False)\n"
        )

        def report(*flags):
            main = [sys.executable, "-c", "from dit_patch.cli import main; raise SystemExit(main())"]
            command = [*main, "run", *flags, "--", sys.executable, program]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            return done.stderr

        named = report("--patch-model", QWEN3)
        [row] = [line.split() for line in named.splitlines() if SITE in line]
        assert row[:4] == ["rope", SITE, "2", "1"]
        assert SITE not in report()

    def test_a_reason_is_text_and_is_not_inherited(self, tmp_path):
        text = "model: a.B\noff_by_default: {}\nsites:\n  - {{at: rope.forward, kind: rope}}\n"
        assert loads(text.format("slower, 3 of 4 times")).off_by_default == "slower, 3 of 4 times"
        with pytest.raises(SpecError, match="2:17: off_by_default: needs the reason, which is what the user will read"):
            loads(text.format("' '"))
        (tmp_path / "base.yaml").write_text(text.format("slower"))
        (tmp_path / "mine.yaml").write_text("model: a.Mine\nextends: base\n")
        registry = Registry(tmp_path, bundled=False, plugins=False)
        assert registry.get("base").off_by_default and not registry.get("mine").off_by_default
        assert asked_for(registry.get("base"), "rope") == ("rope", "base") and asked_for(registry.get("mine")) is None
