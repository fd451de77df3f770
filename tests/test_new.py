"""`dit-patch new`: the beginning of a spec for real classes, which `dit-patch check` then finds nothing wrong with."""

from functools import cache

import pytest
import torch
import yaml

from dit_patch import cli
from dit_patch.contribute.new import guess
from dit_patch.contribute.new.draft import draft, model_class
from dit_patch.contribute.new.write import spec_text
from dit_patch.errors import DitPatchError
from dit_patch.spec import mini
from dit_patch.spec.loading import loads
from dit_patch.spec.registry import Registry

pytest.importorskip("diffusers")
PLACE = "diffusers.models.transformers.transformer_{}"
WAN = PLACE.format("wan.WanTransformer3DModel")


@cache
def drafted(name):
    return draft(PLACE.format(name))


def new(*arguments, capsys):
    status = cli.main(["new", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_beginning_for_wan_has_its_sites_blocks_and_mini_and_passes_check(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    status, out, err = new(WAN, "--out", file, capsys=capsys)
    assert status == 0 and "6 sites, 1 list of blocks" in out and "did not run" not in err
    begun, whole = Registry().read(file), Registry(plugins=False).get("diffusers/wan")
    ours, theirs = ({site.at: site for site in spec.sites} for spec in (begun, whole))
    assert set(ours) == {at for at in theirs if "image" not in at}
    assert all(ours[at].kind == theirs[at].kind for at in ours)
    assert [each.at for each in begun.blocks] == ["blocks"] and begun.blocks[0].pattern == 3
    assert begun.requires and begun.mini.config["num_layers"] == 2
    assert cli.main(["check", str(file)]) == 0
    assert "no problems found" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, sites, blocks",
    [
        (
            "skyreels_v2.SkyReelsV2Transformer3DModel",
            {"rope.forward": "rope", "condition_embedder.text_embedder.forward": "context"},
            {"blocks": 3},
        ),
        (
            "hunyuan_video.HunyuanVideoTransformer3DModel",
            {
                "rope.forward": "rope",
                "context_embedder.proj_in.forward": "context",
                "diffusers.models.embeddings:apply_rotary_emb": "rotary",
            },
            {"transformer_blocks": 0, "single_transformer_blocks": 0},
        ),
        (
            "flux.FluxTransformer2DModel",
            {
                "context_embedder.forward": "context",
                "pos_embed.forward": "rope",
                "diffusers.models.transformers.transformer_flux:apply_rotary_emb": "rotary",
            },
            {"transformer_blocks": 1},
        ),
    ],
    ids=lambda value: value.partition(".")[0] if isinstance(value, str) else "",
)
def test_what_repeats_in_other_models_is_proposed_and_equal(name, sites, blocks, tmp_path, capsys):
    begun = drafted(name)
    assert begun.problem is None
    spec = loads(spec_text(begun), file="mine.yaml", name="mine")
    proposed = {site.at: site.kind for site in spec.sites}
    assert sites.items() <= proposed.items()
    assert blocks.items() <= {each.at: each.pattern for each in spec.blocks}.items()
    assert not any("transformer_blocks.0" in at for at in proposed)
    file = tmp_path / "mine.yaml"
    file.write_text(spec_text(begun))
    assert cli.main(["check", str(file)]) == 0, capsys.readouterr().out


def test_keys_name_what_results_change_with_and_nothing_beside_it():
    flux = {each.at: each for each in drafted("flux.FluxTransformer2DModel").sites}
    sizes = ["shape", "dtype", "device"]
    # Prompts, too, are new in each generation.
    identity = {"model.img_ids": ["identity"], "model.txt_ids": ["identity"]}
    assert flux["pos_embed.forward"].key == {"ids": sizes} | identity
    refiner = "context_embedder.time_text_embed.text_embedder.forward"
    hunyuan = {each.at: each for each in drafted("hunyuan_video.HunyuanVideoTransformer3DModel").sites}
    prompt = {"model.encoder_hidden_states": ["identity"], "model.encoder_attention_mask": ["identity"]}
    assert hunyuan[refiner].key == {"caption": sizes} | prompt and not hunyuan[refiner].reads


def test_weights_that_an_argument_was_computed_with_are_proposed_to_be_read():
    proposed = {each.at: each for each in draft(WAN).sites}["condition_embedder.time_proj.forward"]
    assert proposed.key == {"input": ["shape", "dtype", "device"], "model.timestep": ["identity"]}
    assert proposed.reads == ("condition_embedder.time_embedder",)


def test_a_guess_that_does_not_run_says_why_and_goes_on_from_a_mended_mini(tmp_path, capsys):
    vace = PLACE.format("wan_vace.WanVACETransformer3DModel")
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    status, _, err = new(vace, "--out", first, capsys=capsys)
    assert status == 1 and "did not run" in err and "VACE layers" in err and f"--mini {first}" in err
    written = yaml.safe_load(first.read_text())
    assert written["sites"] == [] and "--mini THIS_FILE" in first.read_text()
    written["mini"] = yaml.safe_load((Registry(plugins=False).get("diffusers/wan_vace").path).read_text())["mini"]
    mended = tmp_path / "mended.yaml"
    mended.write_text(yaml.safe_dump(written))
    status, out, err = new(vace, "--out", second, "--mini", mended, capsys=capsys)
    assert status == 0 and "did not run" not in err
    assert {"rope.forward", "vace_patch_embedding.forward"} <= {site.at for site in Registry().read(second).sites}


def test_a_class_is_found_where_it_is_defined():
    assert model_class("diffusers.WanTransformer3DModel") is model_class(WAN)
    assert draft("diffusers.WanTransformer3DModel").name == WAN


@pytest.mark.parametrize(
    "name, said",
    [
        ("diffusers.WanTransformer3DModell", "did you mean `WanTransformer3DModel`?"),
        ("no_such_package.Model", "cannot import `no_such_package`"),
        ("Model", "expected the dotted name of a class"),
        ("torch.float32", "is a dtype, not a class of models"),
        ("collections.OrderedDict", "not a class of models"),
    ],
)
def test_what_is_no_class_of_models_is_said(name, said):
    with pytest.raises(DitPatchError) as caught:
        draft(name)
    assert said in str(caught.value) and f"`{name}`" in str(caught.value)


def test_a_file_that_is_there_is_not_overwritten_unasked(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    status, _, err = new(WAN, "--out", file, capsys=capsys)
    assert status == 1 and "exists; --force overwrites it" in err and file.read_text() == "mine"
    bare = tmp_path / "bare.yaml"
    bare.write_text("model: a.B\nsites:\n  - {at: rope.forward, kind: rope}\n")
    status, _, err = new(WAN, "--mini", bare, capsys=capsys)
    assert status == 1 and "has no `mini`" in err


class Shaped(torch.nn.Module):
    def __init__(self, num_layers=40, num_attention_heads=24, attention_head_dim=128, in_channels=64, width=3072):
        super().__init__()
        self.proj = torch.nn.Linear(in_channels, width)

    def forward(self, hidden_states, timestep, encoder_hidden_states=None, other=None, *, wanted):
        batch_size, num_frames, channels, height, width = hidden_states.shape
        return self.proj(hidden_states)


def test_guesses_go_by_names_and_by_how_the_forward_takes_the_latents_apart():
    defaults = mini.class_defaults(Shaped, None)
    config = guess.config(defaults)
    assert config == {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "width": 32,
    }
    inputs, unknown = guess.inputs(Shaped(**config), config, defaults)
    assert inputs["hidden_states"]["shape"] == [1, "f", "in_channels", "h", "w"]
    assert list(inputs) == ["hidden_states", "timestep", "encoder_hidden_states"] and unknown == ["wanted"]


def test_a_file_that_new_wrote_is_gone_on_from_and_what_check_would_refuse_is_left_out(tmp_path, capsys):
    lumina, file = PLACE.format("lumina2.Lumina2Transformer2DModel"), tmp_path / "lumina.yaml"
    status, _, err = new(lumina, "--out", file, capsys=capsys)
    assert status == 1 and f"--mini {file} --out {file} --force" in err
    written = yaml.safe_load(file.read_text())
    written["mini"]["config"] |= {"hidden_size": 48, "axes_dim_rope": [8, 8, 8]}
    written["mini"]["sizes"] = [{"h": 8, "w": 8}, {"h": 8, "w": 12}, {"h": 4, "w": 8}]
    written["mini"]["inputs"]["hidden_states"]["shape"] = [1, 16, "h", "w"]
    file.write_text(yaml.safe_dump(written))
    status, _, err = new(lumina, "--mini", file, "--out", file, "--force", capsys=capsys)
    assert status == 0, err
    assert "apply_rotary_emb: never hits: bypassed: a complex table" in file.read_text()
    assert not any("rotary" in site.at for site in Registry().read(file).sites)
    assert cli.main(["check", str(file)]) == 0, capsys.readouterr().out
