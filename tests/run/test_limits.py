"""Limits that are found before weights are loaded: the vocabulary, the positions, the room on the disk."""

import shutil

import pytest
from rich.console import Console
from transformers import GPT2Config, LlamaConfig, OPTConfig

from eaftdrope.cli.preview import stage_previews
from eaftdrope.errors import DataError, UserError
from eaftdrope.inspection.run import prepare_inspection
from eaftdrope.recipe import load_recipe, make_recipe
from eaftdrope.run import limits
from eaftdrope.run.machine import Device
from eaftdrope.run.plan import make_plan
from eaftdrope.run.settings import eaft_settings
from eaftdrope.run.train import show_plan
from tests.tiny_models import TEMPLATE, byte_tokenizer
from tests.tiny_run import make_project

CPU = Device("cpu", "a processor", None)
SIZES = dict(vocab_size=64, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=32)


@pytest.fixture
def project(tmp_path):
    """Its tokenizer has a token more than the embedding has rows."""
    recipe = make_project(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "model")
    return load_recipe(recipe)


def test_a_vocabulary_larger_than_the_embedding_is_refused_without_weights(project, tmp_path):
    show_plan(project, Console(quiet=True))  # as long as no row has that token
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(TEMPLATE.replace("<|im_start|>", "<|new|>"))
    (tmp_path / "model" / "model.safetensors").unlink()
    text = r"rows\.jsonl:1 holds token 260 \('<\|new\|>'\), and the model's embedding has 260 rows"
    with pytest.raises(DataError, match=text):
        show_plan(project, Console(quiet=True))
    with pytest.raises(DataError, match=text):
        prepare_inspection(project, rows=None, on_policy=0)
    with pytest.raises(DataError, match=text):
        [*stage_previews(project, tmp_path / "recipe.yaml", rows=1, scan=None)]


def test_a_held_out_row_counts_too(project, tmp_path):
    file = tmp_path / "held_out.jsonl"
    rows = file.read_text().splitlines()
    rows[2] = rows[2].replace("What is", "<|new|>")
    file.write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"held_out\.jsonl:3 holds token 260"):
        show_plan(project, Console(quiet=True))


def recipe(folder="runs/tiny", **data):
    return make_recipe(
        {
            "model": "tiny/model",
            "data": {"train": "tiny/data", "max_length": 64, **data},
            "lora": {},
            "output": {"dir": str(folder), "merge": True},
        }
    )


def notes(config, longest=0, **data):
    return make_plan(eaft_settings(recipe(**data)), config, autocast=False, device=CPU, longest=longest).notes


def test_a_length_beyond_the_models_positions():
    config = LlamaConfig(**SIZES)
    beyond = "data.max_length 64 is beyond the model's context of 32 tokens."
    assert notes(config) == (beyond,)
    assert notes(config, 33) == (f"{beyond} The longest row has 33.",)
    assert notes(config, 32) == (f"{beyond} No row is: the longest has 32.",)
    assert notes(config, 32, max_length=32) == ()


def test_a_converted_model_has_no_positions_that_end():
    config = LlamaConfig(**SIZES, drope={"layers": "all"})
    assert notes(config, 40) == (
        "data.max_length 64 is beyond the 32 tokens that the converted model announces. It has no rotary positions that end "
        "there, but engines that serve it do. The longest row has 40.",
    )


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32),
        OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=16),
    ],
    ids=["gpt2", "opt"],
)
def test_rows_beyond_a_table_of_positions_are_refused(config):
    with pytest.raises(UserError) as caught:
        limits.check_positions(model_of(config), config, 33)
    assert str(caught.value) == (
        "the longest row has 33 tokens, and the model has a table of 32 positions: set data.max_length to at most 32."
    )
    limits.check_positions(model_of(config), config, 32)
    rotary = LlamaConfig(**SIZES)
    limits.check_positions(model_of(rotary), rotary, 33)


def model_of(config):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_too_little_room_for_the_merged_model_is_in_the_plan(tmp_path, monkeypatch):
    config = LlamaConfig(**SIZES, intermediate_size=32, dtype="bfloat16")
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000)
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda path: usage if path == tmp_path else None)
    folder = tmp_path / "not" / "there"
    (note,) = make_plan(eaft_settings(recipe(folder, max_length=32)), config, autocast=False, device=CPU).notes
    assert note == (
        f"output.merge will need 68 MB in {folder}, whose disk has 5 MB free: make room before the training ends, or leave "
        "it out and merge elsewhere."
    )


def test_dropout_on_experts_is_refused_in_the_plan():
    """peft puts all-linear adapters on the experts' tensors too, where it has no dropout."""
    from transformers import Qwen3MoeConfig

    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, num_key_value_heads=2, head_dim=8)
    planned = recipe(max_length=32)
    planned = planned.model_copy(update={"lora": planned.lora.model_copy(update={"dropout": 0.1})})
    with pytest.raises(
        UserError, match=r"^lora\.dropout: .*lora_dropout != 0\. Set it to 0, or set lora\.target_modules"
    ):
        make_plan(eaft_settings(planned), Qwen3MoeConfig(**SIZES, **experts), autocast=False, device=CPU)
