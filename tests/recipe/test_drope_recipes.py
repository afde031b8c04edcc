"""The shipped recipes in stages: at full size by their plans, and whole on tiny models of the same architectures."""

import json

import pytest
import yaml

from eaftdrope.cli.recipes import shipped_recipes
from eaftdrope.drope.config import trained_length
from eaftdrope.recipe import load_recipe
from eaftdrope.run.machine import Device
from eaftdrope.run.plan import make_plan
from eaftdrope.run.stages.chain import open_stages
from tests.tiny_models import byte_tokenizer
from tests.tiny_run import save_rows, save_text, train

SHIPPED = shipped_recipes()
GIB = 2**30
LLAMA = {"bos_token_id": 1, "eos_token_id": 2}


def llama(**shape):
    from transformers import LlamaConfig

    return LlamaConfig(architectures=["LlamaForCausalLM"], **LLAMA, **shape)


def qwen3(**shape):
    from transformers import Qwen3Config

    return Qwen3Config(architectures=["Qwen3ForCausalLM"], head_dim=128, **LLAMA, **shape)


def shape(hidden, inner, layers, heads, key_heads, vocabulary, length, tied=True):
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "tie_word_embeddings": tied,
    }


QWEN = shape(2560, 9728, 36, 32, 8, 151936, 32768)
# name -> (configuration as published, its parameters, GB of a device, steps of the recalibration on 8 of them)
FULL_SIZE = {
    "drope/smollm2_360m": (lambda: llama(**shape(960, 2560, 32, 15, 5, 49152, 8192)), 361_821_120, 24, 4769),
    "drope/smollm2_1.7b": (lambda: llama(**shape(2048, 8192, 24, 32, 32, 49152, 8192)), 1_711_376_384, 40, 10491),
    "drope/qwen3_4b": (lambda: qwen3(**QWEN), 4_022_468_096, 80, 9537),
    "drope/llama3.1_8b": (
        lambda: llama(**shape(4096, 14336, 32, 32, 8, 128256, 131072, tied=False)),
        8_030_261_248,
        141,
        4769,
    ),
    "pipelines/drope_then_eaft": (lambda: qwen3(**QWEN), 4_022_468_096, 80, 1908),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_fits_the_hardware_it_names(name, monkeypatch):
    """Parameters are those of the published model, a step has the tokens that the recipe says, and the memory is there."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    make, parameters, memory, steps = FULL_SIZE[name]
    recipe = load_recipe(SHIPPED[name], ["output.dir=unused"])
    assert f"with {memory} GB" in SHIPPED[name].read_text(encoding="utf-8")
    config, device = make(), Device("cuda", "a GPU", int(memory * 1e9))
    assert trained_length(config) == config.max_position_embeddings
    for stage in open_stages(recipe)[1:]:
        settings = stage.settings(config)
        plan = make_plan(settings, config, autocast=True, device=device)
        assert plan.parameters == parameters
        assert plan.fits, (stage.name, plan.memory, device)
        if stage.name == "recalibrate":
            assert plan.steps == steps
            assert plan.trained_parameters == parameters
            blocks = 8 * settings.train.batch_size * settings.train.accumulation
            assert plan.tokens_per_step == blocks * settings.max_length


def test_the_hyper_parameters_of_the_paper():
    """Table 4, for the size that it has: SmolLM-360M."""
    recipe = load_recipe(SHIPPED["drope/smollm2_360m"])
    train, data = recipe.recalibrate.train, recipe.recalibrate.data
    assert (train.learning_rate, train.warmup_steps, train.scheduler) == (1e-3, 490, "cosine")
    assert (train.adam_beta1, train.adam_beta2, train.weight_decay) == (0.9, 0.95, 0.1)
    assert (8 * train.batch_size * train.accumulation, data.max_length) == (512, 2048)
    assert (recipe.drope.qk_norm, recipe.recalibrate.loss.gate) == (True, "none")


# ---- whole, on tiny models ----

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Tiny models of both architectures, text and rows."""
    import torch
    from transformers import LlamaForCausalLM, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("project")
    for make, model in {llama: LlamaForCausalLM, qwen3: Qwen3ForCausalLM}.items():
        torch.manual_seed(0)
        config = make(**{**TINY, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True})
        config.head_dim = 8
        model(config).save_pretrained(folder / config.model_type)
        byte_tokenizer().save_pretrained(folder / config.model_type)
    save_text(folder / "text.jsonl")
    save_rows(folder / "rows.jsonl")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "drope/smollm2_360m",
        "pipelines/drope_then_eaft",
        pytest.param("drope/smollm2_135m", marks=pytest.mark.slow),
        pytest.param("drope/smollm2_1.7b", marks=pytest.mark.slow),
        pytest.param("drope/qwen3_4b", marks=pytest.mark.slow),
        pytest.param("drope/llama3.1_8b", marks=pytest.mark.slow),
    ],
)
def test_a_recipe_runs_on_a_tiny_model_of_its_architecture(name, project, tmp_path):
    """Model, data and sizes replaced; everything else (schedule, checkpointing, QK-norm, loss, stages) as it is."""
    data = yaml.safe_load(SHIPPED[name].read_text(encoding="utf-8"))
    is_qwen = "Qwen" in str(data["model"])
    data["model"] = str(project / ("qwen3" if is_qwen else "llama"))
    section = data["recalibrate"]
    for key in ("share", "pretraining_tokens", "tokens"):
        section.pop(key, None)
    section["tokens"] = 3 * 2 * 64
    mixed = isinstance(section["data"]["train"], list)
    texts = [str(project / file) for file in (("text.jsonl", "rows.jsonl") if mixed else ("text.jsonl",))]
    section["data"] |= {"train": texts, "held_out": 0.25, "max_length": 64}
    section["train"] |= {"batch_size": 2, "accumulation": 1, "precision": "float32"}
    if "warmup_steps" in section["train"]:
        section["train"]["warmup_steps"] = 1
    section["recovery"] |= {"every": 1, "max_tokens": 256, "stop_at": None}
    section["probes"] = {"target": ["held_out_loss"], "general": []}
    if "data" in data:
        data["data"] |= {"train": str(project / "rows.jsonl"), "held_out": 0.25, "max_length": 128}
        data["train"] |= {"epochs": 0.5, "precision": "float32"}
        data["probes"] = {"target": ["held_out_loss"], "general": []}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    ended = train(path, f"output.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.out
    run = tmp_path / "run"
    assert [json.loads((run / stage / "run.json").read_text())["status"] for stage in data["stages"]] == [
        "finished" for _ in data["stages"]
    ]
    points = json.loads((run / "recalibrate" / "recovery.json").read_text())["points"]
    assert [(point["step"], point["tokens"]) for point in points] == [(0, 0), (1, 128), (2, 256), (3, 384)]
    config = json.loads((run / "recalibrate" / "config.json").read_text())
    is_qwen = is_qwen or data["drope"]["qk_norm"]
    assert config["architectures"] == ["Qwen3ForCausalLM" if is_qwen else "LlamaForCausalLM"]
    assert config["max_position_embeddings"] == data["drope"]["max_length"]
    assert config["rope_parameters"]["factor"] == 1e30
