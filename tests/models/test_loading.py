"""Damaged and incomplete model files: each is refused in one sentence that names the file, and no tensor is random."""

import json
import pickle
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eaftdrope import models
from eaftdrope.errors import UserError
from eaftdrope.models.weights import load_complete
from tests.tiny_models import save_model

AGAIN = "Download or copy it again."
SAVED_WITH = "Restore the config.json that was saved with the weights."
RANDOM = "The model would compute with random numbers there. Restore the complete checkpoint."


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("untied") / "model", tied=False)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def refused(folder, load=models.load_model):
    with pytest.raises(UserError) as caught:
        load(str(folder))
    return str(caught.value)


# ---- missing, superfluous and misshapen tensors ----


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_refused_by_name(folder, name):
    change(folder, lambda tensors: tensors.pop(name))
    assert refused(folder) == f"the weights of '{folder}' lack 1 tensor of LlamaForCausalLM: {name}. {RANDOM}"


def test_many_missing_tensors_are_counted(folder):
    edit(folder, num_hidden_layers=3)
    text = refused(folder)
    assert text.startswith(
        f"the weights of '{folder}' lack 9 tensors of LlamaForCausalLM: model.layers.2.input_layernorm"
    )
    assert text.endswith(f"model.layers.2.post_attention_layernorm.weight and 4 more. {RANDOM}")


def test_a_head_of_its_own_must_be_there(untied, tmp_path):
    folder = shutil.copytree(untied, tmp_path / "model")
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert refused(folder) == (
        f"the weights of '{folder}' lack 1 tensor of LlamaForCausalLM: lm_head.weight. {RANDOM} If the head is the input "
        "embeddings, set tie_word_embeddings to true in its config.json."
    )


def test_a_tied_head_is_found_wherever_it_is_stored(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = models.load_model(str(folder)).get_output_embeddings().weight
        # the other of the two names, and what old checkpoints hold beside the weights
        change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
        change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
        model = models.load_model(str(folder))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, expected)


def test_a_tensor_of_another_shape_is_refused_by_name(folder):
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    assert refused(folder) == (
        f"the weights of '{folder}' do not fit its config.json: model.norm.weight is [31] in the checkpoint, and [32] by "
        f"the configuration of LlamaForCausalLM. {SAVED_WITH}"
    )


def test_a_tensor_without_a_place_is_named_in_a_warning_and_no_table_is_printed(folder, caplog):
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    with pytest.warns(UserWarning) as caught:
        load_complete(folder, name="mine")
    assert [str(warning.message) for warning in caught] == [
        "the weights of 'mine' hold 1 tensor that LlamaForCausalLM has no place for, and that are not used: "
        "model.layers.0.self_attn.q_proj.bias. If they belong to the model, its config.json is not the one it was saved with."
    ]
    assert "LOAD REPORT" not in caplog.text


# ---- damaged files ----


def unreadable(folder, name, why, part="model"):
    return f"the {part} of '{folder}' cannot be loaded: {folder / name} {why}"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (
            lambda data: data[:-1000],
            "is damaged (Error while deserializing header: incomplete metadata, file not fully",
        ),
        (lambda data: b"", "is damaged (it is empty)"),
        (
            lambda data: struct.pack("<Q", 1 << 40) + data[8:],
            "is damaged (Error while deserializing header: header too l",
        ),
        (lambda data: bytes(len(data)), "is damaged (Error while deserializing header: invalid JSON in header"),
    ],
)
def test_damaged_safetensors_are_named(folder, damage, why):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    text = refused(folder)
    assert text.startswith(unreadable(folder, file.name, why)) and text.endswith(AGAIN)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4:UserWarning")
def test_pickled_code_is_not_run(folder, tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    (folder / "model.safetensors").unlink()
    torch.save({"a": Code(), "b": torch.ones(10_000)}, folder / "pytorch_model.bin")
    assert refused(folder) == unreadable(
        folder,
        "pytorch_model.bin",
        "holds Python objects other than tensors; they could run code, so they are not loaded. Use the model's "
        "safetensors files, or ask its author for them.",
    )
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Code()) + bytes(10_000))
    assert "holds Python objects other than tensors" in refused(folder)
    assert not (tmp_path / "run").exists()


def test_plain_tensors_in_a_bin_file_load_and_damaged_ones_do_not(folder):
    expected, file = load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save(expected, file)
    assert torch.equal(models.load_model(str(folder)).model.norm.weight, expected["model.norm.weight"])
    file.write_bytes(file.read_bytes()[:-5000])
    text = refused(folder)
    assert text.startswith(unreadable(folder, file.name, "is damaged (")) and text.endswith(AGAIN)


def test_a_shard_that_is_not_there_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}))
    assert refused(folder) == unreadable(
        folder, index.name, f"lists model-00002-of-00002.safetensors, which does not exist. {AGAIN}"
    )
    index.write_text('{"weight_map": 3}')
    assert refused(folder) == unreadable(folder, index.name, f"has no weight_map with the file of each tensor. {AGAIN}")


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("config.json", models.load_model),
        ("tokenizer_config.json", models.load_tokenizer),
        ("tokenizer.json", models.load_tokenizer),
    ],
)
@pytest.mark.parametrize(
    ("content", "why"), [("[1]", "is not a JSON object (it holds a list)"), ("{", "is not valid JSON (")]
)
def test_json_that_is_none_is_named(folder, name, load, content, why):
    (folder / name).write_text(content)
    text = refused(folder, load)
    assert f"{folder / name} {why}" in text and text.endswith(AGAIN)


def test_a_generation_configuration_that_is_a_list_is_named(folder):
    (folder / "generation_config.json").write_text("[1]")
    assert refused(folder) == unreadable(
        folder, "generation_config.json", f"is not a JSON object (it holds a list). {AGAIN}"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("hidden_size", -5),
        ("hidden_size", "32"),
        ("hidden_size", True),
        ("vocab_size", 10**12),
        ("num_hidden_layers", 10**9),
    ],
)
def test_numbers_that_no_model_has_are_refused_before_anything_is_built(folder, key, value):
    edit(folder, **{key: value})
    most = "10,000" if key == "num_hidden_layers" else "2,147,483,648"
    text = (
        f"{folder}/config.json: {key} is {value!r}, and must be a whole number from 1 to {most}. Restore the file that was "
        "saved with the weights."
    )
    assert refused(folder) == refused(folder, models.load_config) == text
    edit(folder, **{key: 4}, text_config={key: value})
    assert refused(folder, models.load_config) == text


def test_a_vocabulary_that_the_weights_cannot_hold_is_refused_before_it_is_allocated(folder):
    edit(folder, vocab_size=10**9)
    size = (folder / "model.safetensors").stat().st_size
    assert refused(folder) == (
        f"{folder}/config.json: vocab_size 1,000,000,000 with hidden_size 32 is more than the weights beside it hold "
        f"({size:,} bytes). {SAVED_WITH}"
    )


def test_a_configuration_that_contradicts_itself_is_named(folder):
    edit(folder, num_attention_heads=5)
    text = refused(folder, models.load_config)
    assert "The hidden size (32) is not a multiple of the number of attention heads (5)" in text
    assert text.endswith(f". Correct {folder}/config.json, or restore it.")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<QQ", 0, 1 << 40) + bytes(200),
        struct.pack("<QQQ", 0, 1, 1 << 50) + b"abc" + bytes(100),
        struct.pack("<QQQ3sIIQ", 0, 1, 3, b"abc", 9, 4, 1 << 45) + bytes(100),
    ],
    ids=["count", "length of a string", "length of an array"],
)
def test_a_gguf_file_whose_numbers_lie_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setenv("EAFTDROPE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<I", 3) + content)
    for load in (models.load_config, models.load_tokenizer):
        assert refused(file, load).startswith(f"the GGUF file '{file}' cannot be read: ")
