"""Baselines made of a live model equal the model loaded with that rotary embedding; a conversion's record is used."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from eaftdrope.drope import convert
from eaftdrope.drope.config import trained_length
from eaftdrope.drope.rope import with_rope
from eaftdrope.errors import UserError
from eaftdrope.evaluate.long_context import as_variant
from eaftdrope.evaluate.long_context.lengths import multiple, parse_lengths
from eaftdrope.evaluate.long_context.variants import BASELINES, original_config, variants_of
from eaftdrope.models import load_config, load_model
from tests.tiny_models import save_model

IDS = torch.randint(4, 260, (1, 90), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Llama of 512 positions, and its conversion that announces 2048."""
    folder = tmp_path_factory.mktemp("arms")
    save_model(folder / "plain")
    convert(folder / "plain", folder / "converted", max_length=2048)
    return folder / "plain", folder / "converted"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def loaded(folder, config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="float32").eval()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_the_model_loaded_with_that_rope(folders, which, name):
    plain, _ = folders
    model = load_model(str(folders[which])).eval()
    own = logits(model)
    config = load_config(str(plain))
    method = "rope" if name == "crop" else name
    factor = 4.0 if name in ("pi", "ntk", "yarn") else 1.0
    expected = logits(loaded(plain, with_rope(config, method, factor, 512)))
    with as_variant(model, name, 2048, 512) as crop:
        assert crop == (512 if name == "crop" else None)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), own)
    if which == 1:
        assert (own - expected).abs().max() > 0.01


def test_the_original_comes_without_the_temperature_that_was_folded_in(folders, tmp_path):
    plain, _ = folders
    shutil.copytree(plain, tmp_path / "yarn")
    config = json.loads((plain / "config.json").read_text())
    theta = config["rope_parameters"]["rope_theta"]
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": theta}
    (tmp_path / "yarn" / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    wanted = logits(load_model(str(tmp_path / "yarn")).eval())
    assert convert(tmp_path / "yarn", tmp_path / "new").temperature > 1.29
    model = load_model(str(tmp_path / "new")).eval()
    with as_variant(model, "rope", 90, 128):
        assert (logits(model) - wanted).abs().max() < 1e-5
    assert (logits(model) - wanted).abs().max() > 1e-4
    original = load_config(str(tmp_path / "yarn"))
    original.rope_parameters["mscale_all_dim"] = 1.0
    original.drope = {"trained_length": 128, "original": {"rope_parameters": original.rope_parameters}}
    with pytest.raises(UserError, match=r"mscale_all_dim.*Pass the original model as another MODEL"):
        original_config(original)


def test_trained_lengths_of_each_attention_type():
    from transformers import Olmo3Config

    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    ropes = {"full_attention": yarn, "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}
    assert trained_length(Olmo3Config(rope_parameters=ropes, max_position_embeddings=65536)) == 8192


def test_as_it_is_changes_nothing(folders):
    model = load_model(str(folders[1])).eval()
    own = logits(model)
    with as_variant(model, "as is", 2048, 512) as crop:
        assert crop is None and torch.equal(logits(model), own)


def test_no_stretch_within_the_trained_length(folders):
    model = load_model(str(folders[0])).eval()
    own = logits(model)
    with as_variant(model, "yarn", 256, 512):
        assert torch.equal(logits(model), own)


def test_arms(folders):
    plain, converted = (load_config(str(folder)) for folder in folders)
    assert variants_of(plain, ()) == variants_of(converted, ()) == ["as is"]
    # on a plain model `rope` is what it is
    assert variants_of(plain, BASELINES) == ["as is", "pi", "ntk", "yarn", "crop"]
    assert variants_of(converted, BASELINES) == ["as is", "rope", "pi", "ntk", "yarn", "crop"]
    assert original_config(plain) is plain
    assert original_config(converted).rope_parameters == plain.rope_parameters
    assert original_config(converted).max_position_embeddings == 512


def without_record(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    del config["drope"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_no_baselines_without_a_record(folders, tmp_path):
    config = load_config(str(without_record(folders[1], tmp_path / "model")))
    with pytest.raises(
        UserError, match=r"it has no rotary embedding, and its config.json does not record the one it had"
    ):
        variants_of(config, ("crop",))
    assert variants_of(config, ()) == ["as is"]


def test_no_baselines_of_layers_that_were_switched_off():
    from transformers import SmolLM3Config

    config = SmolLM3Config(num_hidden_layers=4, no_rope_layers=[0, 0, 1, 0])
    rope = config.rope_parameters
    config.drope = {
        "trained_length": 512,
        "original": {"rope_parameters": rope, "no_rope_layers": [1, 1, 1, 0], "max_position_embeddings": 512},
    }
    with pytest.raises(UserError, match="dropped in some layers only"):
        variants_of(config, ("rope",))


def test_a_stretched_rope_is_not_stretched_again(folders):
    config = with_rope(load_config(str(folders[0])), "yarn", 2.0)
    with pytest.raises(UserError, match="already of type 'yarn'"):
        variants_of(config, ("pi",))


def test_trained_lengths(folders):
    plain, converted = (load_config(str(folder)) for folder in folders)
    assert (plain.max_position_embeddings, converted.max_position_embeddings) == (512, 2048)
    assert trained_length(plain) == trained_length(converted) == 512
    assert trained_length(with_rope(plain, "yarn", 4.0)) == 512
    nothing = SimpleNamespace(model_type="odd", get_text_config=lambda: SimpleNamespace(model_type="odd"))
    with pytest.raises(UserError, match=r"the configuration \(odd\) does not have the length that .*--trained-length"):
        trained_length(nothing)


def test_lengths():
    assert parse_lengths("1x,2x, 4x", 512) == [512, 1024, 2048]
    assert parse_lengths("4096,2048,1.5x,2x", 1024) == [1536, 2048, 4096]
    assert [multiple(n, 1024) for n in (512, 1024, 1536, 8192)] == ["0.5x", "1x", "1.5x", "8x"]
    for wrong in ("2k", "x2", "-3", "2x4", "a"):
        with pytest.raises(UserError, match=f"'{wrong}' is not a length"):
            parse_lengths(f"128,{wrong}", 512)
    for none in ("", ",", "1", "0x"):
        with pytest.raises(UserError, match="a length is at least 2 tokens"):
            parse_lengths(none, 512)
