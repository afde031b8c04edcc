"""Whole runs of the stage pretrain on a tiny model, also with later stages and in another order."""

import json
import signal

import pytest
import yaml

from eaftdrope.errors import UserError
from eaftdrope.models import load_config, load_tokenizer
from eaftdrope.recipe import load_recipe
from eaftdrope.run.new_model import changed_config, draw_weights, new_model
from tests.tiny_run import hashes, make_staged_project, metrics, train

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Model, text, rows; full.yaml has every stage, two steps each; the models of this module have a cache of their own."""
    folder = tmp_path_factory.mktemp("project")
    staged = yaml.safe_load(make_staged_project(folder).read_text())
    text = {"train": "text.jsonl", "held_out": "held_out_text.jsonl", "max_length": 64}
    steps = {**staged["recalibrate"]["train"], "steps": 2, "save_every": 1}
    measured = {"target": [], "general": [{"long_loss": {"files": ["text.txt"], "length": 64, "passages": 2}}]}
    staged["pretrain"] = {"config": SMALL, "vocabulary": 300, "data": text, "train": steps, "probes": measured}
    staged["recalibrate"] |= {"train": steps}
    del staged["recalibrate"]["tokens"], staged["lora"]
    staged["train"] |= {"steps": 2}
    staged["ttt"] = {
        **{"window": 32, "sink": 2, "chunk": 16, "fast_blocks": 1},
        "data": {"train": "text.jsonl", "max_length": 96},
        "train": {**steps, "batch_size": 2},
        "probes": {"target": [], "general": []},
    }
    staged["stages"] = ["pretrain", "drope", "recalibrate", "eaft", "ttt"]
    (folder / "text.txt").write_text("The rain fell on the town, and nobody minded. " * 40)
    (folder / "full.yaml").write_text(yaml.safe_dump(staged, sort_keys=False))
    return folder


@pytest.fixture
def section(project):
    """section(**changes): the section pretrain of full.yaml, and the recipe's model."""

    def make(**changes):
        data = yaml.safe_load((project / "full.yaml").read_text())
        data["pretrain"] |= changes
        file = project / "only.yaml"
        file.write_text(
            yaml.safe_dump({key: data[key] for key in ("model", "pretrain", "output")} | {"stages": ["pretrain"]})
        )
        recipe = load_recipe(file)
        return recipe.model, recipe.pretrain

    return make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EAFTDROPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- the model before its training ----


def test_the_configuration_and_the_tokenizer_are_as_the_recipe_has_them(section, cache):
    folder = new_model(*section())
    config, tokenizer = load_config(str(folder)), load_tokenizer(str(folder))
    assert {key: getattr(config, key) for key in SMALL} == SMALL
    # of the tiny model
    assert (config.intermediate_size, config.head_dim) == (64, 8)
    # as long as a block
    assert config.max_position_embeddings == 64
    assert config.vocab_size == len(tokenizer) == 300
    assert config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    # merges of its text, which has 15 words
    assert len(tokenizer(" nobody minded").input_ids) < len(" nobody minded") // 2
    assert tokenizer.chat_template == load_tokenizer(section()[0].reference).chat_template
    assert not (folder / "model.safetensors").exists()


def test_the_same_recipe_has_the_same_model_and_another_has_another(section, cache, project):
    import torch
    from safetensors.torch import load_file

    first = new_model(*section())
    assert new_model(*section()) == first
    _, other = section()
    other = other.model_copy(update={"train": other.train.model_copy(update={"seed": 7})})
    changed = [new_model(*section(vocabulary=None)), new_model(*section(config={})), new_model(section()[0], other)]
    assert len({first, *changed}) == 4
    for folder, seed in ((first, 42), (changed[-1], 7)):
        draw_weights(folder, seed)
    weights = [load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in (first, changed[-1])]
    assert 0.18 < weights[0].std() < 0.22 and not torch.equal(*weights)
    before = (first / "model.safetensors").stat().st_mtime_ns
    draw_weights(first, 42)
    assert (first / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"hidden_sise": 8}, "pretrain.config: LlamaConfig has no 'hidden_sise'. Did you mean `hidden_size`?"),
        ({"vocab_size": 8}, "pretrain.config.vocab_size: the tokenizer decides it"),
        ({"num_key_value_heads": 3}, "pretrain.config: no model can be built with it"),
        ({"hidden_size": "wide"}, "pretrain.config"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(section, cache, config, problem):
    with pytest.raises(UserError) as caught:
        new_model(*section(config={**SMALL, **config}))
    assert problem in str(caught.value)


def test_rope_theta_is_a_key_in_every_version_of_transformers(section):
    base = load_config(section()[0].reference)
    changed = changed_config(base, {"rope_theta": 40.0}).to_dict()
    assert changed.get("rope_theta", changed.get("rope_parameters", {}).get("rope_theta")) == 40.0


# ---- whole runs ----


def test_every_stage_in_one_run_and_a_kill_in_the_first(project, tmp_path):
    killed = train(project / "full.yaml", f"output.dir={tmp_path / 'run'}", moment="in step 2, before a checkpoint")
    assert killed.code == -signal.SIGKILL
    ended = train(project / "full.yaml", f"output.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.out
    assert "resuming from checkpoint-1 of 2" in ended.out
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {"pretrain", "drope", "recalibrate", "eaft", "ttt", "report.html"}
    for stage in ("pretrain", "drope", "recalibrate", "eaft", "ttt"):
        config = json.loads((run / stage / "config.json").read_text())
        assert (config["hidden_size"], config["vocab_size"]) == (16, 300)
    # the converted model has no records of the training before it: what is measured after it is not what was before
    records = {"README.md", "recipe.yaml", "run.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    names = {path.name for path in (run / "drope").iterdir()}
    assert names == records | tokenizer | {"config.json", "model.safetensors", "drope_original"}
    # it is compared with what was pretrained
    assert f"measuring the original model, {run / 'pretrain'}" in ended.out
    scores = json.loads((run / "pretrain" / "probes_after.json").read_text())
    metric = [score["metric"] for score in scores]
    assert metric == [f"nats per token at {multiple} x 64 tokens" for multiple in (1, 2, 4)]
    assert "from scratch" in (run / "pretrain" / "README.md").read_text()
    # the seed alone decides: not what ran before, and not the kill
    data = yaml.safe_load((project / "full.yaml").read_text())
    (project / "alone.yaml").write_text(
        yaml.safe_dump({key: data[key] for key in ("model", "pretrain", "output")} | {"stages": ["pretrain"]})
    )
    assert train(project / "alone.yaml", f"output.dir={tmp_path / 'alone'}").code == 0
    name = "pretrain/model.safetensors"
    assert hashes(tmp_path / "alone")[name] == hashes(run)[name]


@pytest.mark.end_to_end
def test_other_orders(project, tmp_path):
    """Eaft before drope; and ttt before eaft, which then trains the model as it reads."""
    run = tmp_path / "run"
    first = train(
        project / "full.yaml",
        f"output.dir={run}",
        "stages=[eaft,drope,recalibrate]",
        "any_order=true",
        *without("pretrain", "ttt"),
    )
    assert first.code == 0, first.out
    assert f"measuring the original model, {run / 'eaft'}" in first.out
    assert "drope" in json.loads((run / "recalibrate" / "config.json").read_text())
    second = train(
        project / "full.yaml",
        f"output.dir={tmp_path / 'other'}",
        "stages=[ttt,eaft]",
        "any_order=true",
        "data.max_length=96",
        *without("pretrain", "drope", "recalibrate"),
    )
    assert second.code == 0, second.out
    files = hashes(tmp_path / "other" / "ttt"), hashes(tmp_path / "other" / "eaft")
    assert files[1]["ttt_config.json"] == files[0]["ttt_config.json"]
    # its fast MLPs were trained further
    assert files[1]["ttt.safetensors"] != files[0]["ttt.safetensors"]
    assert any(key.startswith("position/") for row in metrics(tmp_path / "other" / "eaft") for key in row)


def without(*sections):
    return [f"{name}=null" for name in sections]
