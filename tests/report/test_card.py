"""The card's metadata and table, and its loading code, run where importing eaftdrope is impossible."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from eaftdrope.errors import UserError
from eaftdrope.evaluate import comparison_markdown
from eaftdrope.evaluate.scores import score_units
from eaftdrope.report.card import CardContent, write_model_card
from tests.tiny_models import character_tokenizer, tiny_llama

BEFORE = [
    score_units("held_out_loss", "target", "held-out loss", [(8.0, 10.0), (9.0, 10.0)], kind="mean", better="lower"),
    score_units("perplexity", "general", "perplexity", [(30.0, 10.0), (31.0, 10.0)], kind="exp", better="lower"),
]
AFTER = [
    score_units("held_out_loss", "target", "held-out loss", [(1.0, 10.0), (1.5, 10.0)], kind="mean", better="lower"),
    score_units("perplexity", "general", "perplexity", [(30.5, 10.0), (31.4, 10.0)], kind="exp", better="lower"),
]
OPTIONS = {
    "recipe_yaml": "model: package:smollm2-135m-instruct\nloss: {gate: eaft}\n",
    "base_model": "package:smollm2-135m-instruct",
    "method": "LoRA (r = 16), gate `eaft`: w = (H_top20 / ln 20)^alpha, alpha = 1.",
    "before": BEFORE,
    "after": AFTER,
    "versions": {"eaftdrope": "0.1.0", "torch": "2.13.0"},
    "hardware": "2 CPU cores",
    "command": "eaftdrope train recipes/quickstart.yaml",
    "licence": "apache-2.0",
    "datasets": ["package:bfcl", "org/data", "tool_calls.jsonl"],
    "is_adapter": False,
}


def _card(folder, **changes):
    return ModelCard.load(write_model_card(folder, CardContent(**{**OPTIONS, **changes})))


def test_metadata_and_table(tmp_path):
    card = _card(tmp_path)
    assert card.data.to_dict() == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "datasets": ["org/data"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["eaft", "eaftdrope"],
    }
    assert card.text.lstrip().startswith(f"# {tmp_path.name}\n")
    assert comparison_markdown(BEFORE, AFTER) in card.text
    assert "Command: `eaftdrope train recipes/quickstart.yaml`" in card.text
    assert "w = (H_top20 / ln 20)^alpha" in card.text
    assert "- torch 2.13.0" in card.text
    fold = re.search(r"<details>.*?```yaml\n(.*?)```.*?</details>", card.text, re.DOTALL)
    assert fold.group(1) == OPTIONS["recipe_yaml"]
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("reference", "lineage"),
    [
        ("org/model", "org/model"),
        ("./model", None),
        ("{tmp}/base", None),
        ("some/models/base", None),
        ("models/model.gguf", None),
        ("package:unknown", None),
    ],
)
def test_a_local_base_model_is_left_out_of_the_metadata(tmp_path, reference, lineage):
    card = _card(tmp_path, base_model=reference.format(tmp=tmp_path))
    assert card.data.to_dict().get("base_model") == lineage
    assert str(tmp_path) not in card.content  # nobody else's machine has this folder


def test_an_existing_folder_that_looks_like_a_hub_id_is_local(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in _card(tmp_path, base_model="org/model").data.to_dict()


def test_a_card_without_scores(tmp_path):
    assert "Nothing was measured: the recipe has no probes." in _card(tmp_path, before=[], after=[]).text


def test_refusals(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(UserError) as error:
        write_model_card(missing, CardContent(**OPTIONS))
    assert str(error.value) == f"no model card can be written: there is no folder {missing}. Save the model first."
    with pytest.raises(UserError) as error:
        write_model_card(tmp_path, CardContent(**{**OPTIONS, "is_adapter": True}))
    assert str(error.value) == (
        f"no model card can be written: {tmp_path} has no adapter_config.json. Save the adapter first."
    )


def _tokenizer(template):
    return character_tokenizer(["<s>", "</s>"], "abcdefghijklmnopqrstuvwxyzOH!: ", template, pad_token="</s>")


def _model(folder, template):
    model = tiny_llama(intermediate_size=32, num_key_value_heads=4, vocab_size=40)
    model.save_pretrained(folder)
    _tokenizer(template).save_pretrained(folder)
    return model


_RUN = """
import json, os, sys
sys.modules["eaftdrope"] = None  # importing it now raises ModuleNotFoundError
for folder in sys.argv[1:]:
    os.chdir(folder)
    code = open("README.md").read().split("```python\\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    with names["torch"].no_grad():
        print("LOGITS", json.dumps(names["model"](input_ids=names["torch"].arange(9)[None]).logits[0, -1].tolist()))
"""


def test_the_loading_code_runs_without_eaftdrope(tmp_path):
    """A full model with a chat template, and an adapter of a local base without one."""
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    full = tmp_path / "full"
    expected = [_model(full, template)]
    _card(full)

    adapter = tmp_path / "adapter"
    _model(tmp_path / "base", None)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    adapted.save_pretrained(adapter)
    _tokenizer(None).save_pretrained(adapter)
    card = _card(adapter, is_adapter=True, base_model=str(tmp_path / "base"))
    assert card.data.to_dict()["library_name"] == "peft"
    assert card.data.to_dict()["tags"] == ["eaft", "eaftdrope", "lora"]
    expected.append(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval())

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-c", _RUN, str(full), str(adapter)],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = [json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("LOGITS ")]
    assert len(printed) == 2
    for model, logits in zip(expected, printed):
        with torch.no_grad():
            want = model(input_ids=torch.arange(9)[None]).logits[0, -1]
        assert (want - torch.tensor(logits)).abs().max() <= 1e-5


@pytest.mark.parametrize("written", ["package:smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_a_package_base_is_written_as_its_hub_id(tmp_path, written):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": written}))
    card = _card(tmp_path, is_adapter=True)
    assert 'base = "HuggingFaceTB/SmolLM2-135M-Instruct"\n' in card.text
    assert (
        "eaftdrope is not needed. The adapter was trained on the weights of `package:smollm2-135m-instruct`, which were "
        "converted from it."
    ) in card.text


def test_a_model_that_learns_as_it_reads_is_loaded_by_eaftdrope(tmp_path, monkeypatch):
    """The loading code gives the model with its fast MLPs, also from an adapter of a local base."""
    from eaftdrope.ttt import TTTConfig, apply_ttt, is_ttt, save_ttt

    _model(tmp_path / "base", None)
    base = apply_ttt(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), TTTConfig(window=8, chunk=4, fast_blocks=1)
    )
    torch.nn.init.normal_(base.ttt.primes[0].down)
    adapter = tmp_path / "adapter"
    adapted = get_peft_model(
        base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    adapted.save_pretrained(adapter)
    save_ttt(adapted, adapter)
    _tokenizer(None).save_pretrained(adapter)
    card = _card(adapter, is_adapter=True, learns=True, base_model=str(tmp_path / "base"))
    assert "Stock transformers loads the same folder without the fast MLPs" in card.text
    monkeypatch.chdir(adapter)
    names = {}
    exec(card.text.split("```python\n")[1].split("```")[0], names)
    assert is_ttt(names["model"])
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(names["model"](input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)


def test_no_place_of_the_machine_is_in_a_card(tmp_path):
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (tmp_path / "base").mkdir()
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    card = _card(
        run,
        is_adapter=True,
        base_model=str(tmp_path / "base"),
        datasets=[str(tmp_path / "rows.jsonl")],
        command=f"eaftdrope train {tmp_path}/recipe.yaml output.dir={run} model=org/model",
        recipe_yaml=f"model: ../../base\noutput:\n  dir: {run}\n  merge: false\n",
    )
    assert str(tmp_path) not in card.content
    assert 'base = "../../base"\n' in card.text
    assert "- Command: `eaftdrope train recipe.yaml output.dir=mine model=org/model`" in card.text
    assert "output:\n  dir: mine\n  merge: false\n" in card.text


def test_names_cannot_write_markup_into_a_card(tmp_path):
    folder = tmp_path / "a](javascript:x) <img src=x>\n# second *heading*"
    folder.mkdir()
    card = _card(folder, datasets=["rows `x` <img onerror=x>.jsonl", "a``b.csv"], base_model="./mo`del")
    lines = card.text.lstrip().splitlines()
    assert lines[0] == r"# a\](javascript:x) \<img src=x\> # second \*heading\*"
    assert (
        "from `` mo`del `` (a local model) on `` rows `x` <img onerror=x>.jsonl ``, ``` a``b.csv ``` with" in lines[2]
    )
    assert [line for line in lines if line.startswith("# ")] == [lines[0]]


def test_names_cannot_turn_the_text_of_a_card_around(tmp_path):
    card = _card(tmp_path, datasets=["a\u202eb\x1b[0m.jsonl"], title="c\u2066d")
    assert all(char.isprintable() or char == "\n" for char in card.text)
    assert "`a\\u202eb\\x1b[0m.jsonl`" in card.text
