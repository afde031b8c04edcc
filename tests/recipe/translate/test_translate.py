"""Configurations of other tools as recipes: sixty of them, and every key that the tools have."""

import importlib.util
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml

from eaftdrope.data import normalise
from eaftdrope.errors import UserError
from eaftdrope.recipe import load_recipe
from eaftdrope.recipe.translate import TOOLS, axolotl, leftovers, llamafactory, translate, trl_cli
from eaftdrope.recipe.translate.detect import detect_tool
from eaftdrope.recipe.translate.draft import Fate
from eaftdrope.recipe.translate.recipe_text import fates_table, recipe_text
from eaftdrope.recipe.yaml_lines import read_yaml

HERE = Path(__file__).parent
MODULES = {"llamafactory": llamafactory, "axolotl": axolotl, "trl": trl_cli}
INFO = {
    "alpaca_mine": {"file_name": "alpaca.jsonl"},
    "chat_mine": {"file_name": "chat.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
    "text_mine": {"file_name": "text.jsonl", "columns": {"prompt": "prompt"}},
    "hub_mine": {"hf_hub_url": "me/chat", "split": "sft", "subset": "default", "num_samples": 800},
    "columns_mine": {
        "file_name": "columns.csv",
        "formatting": "sharegpt",
        "columns": {"prompt": "frage", "response": "answer"},
        "tags": {"role_tag": "who", "content_tag": "value"},
    },
    "pairs_mine": {"file_name": "pairs.json", "ranking": True},
}


def documents(tool):
    text = (HERE / f"{tool}.yaml").read_text(encoding="utf-8")
    # as the recipes are read: 1e-5 is a number
    parts = [read_yaml(part) for part in re.split(r"^---$", text, flags=re.MULTILINE)[1:]]
    assert not [problem for part in parts for problem in part.problems]
    return [part.data for part in parts]


CASES = [(tool, case) for tool in TOOLS for case in documents(tool)]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working directory of a configuration: data/ with its files, and packages that need not be installed."""
    (tmp_path / "data").mkdir()
    for name in ("alpaca.jsonl", "chat.json", "chat.jsonl", "text.jsonl", "columns.csv"):
        (tmp_path / "data" / name).write_text("[]" if name.endswith(".json") else "{}\n")
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec
    packages = ("bitsandbytes", "wandb", "tensorboard", "swanlab", "trackio")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name in packages or found(name, *rest))
    return tmp_path


def value_at(recipe, path):
    for key in path.split("."):
        recipe = (recipe or {}).get(key)
    return recipe


def test_there_are_twenty_of_each():
    assert {tool: sum(one == tool for one, _ in CASES) for tool in TOOLS} == dict.fromkeys(TOOLS, 20)
    assert len({(tool, case["name"]) for tool, case in CASES}) == 60


@pytest.mark.parametrize(("tool", "case"), CASES, ids=[f"{tool}: {case['name']}" for tool, case in CASES])
def test_configurations(tool, case, project):
    config = case["config"]
    if "refused" in case:
        with pytest.raises(UserError) as refusal:
            translate(config, project, tool)
        assert all(re.search(pattern, str(refusal.value)) for pattern in case["refused"]), refusal.value
        assert detect_tool(config) == tool
        return
    translation = translate(config, project)
    assert translation.tool == MODULES[tool].NAME
    for path, value in case["recipe"].items():
        assert value_at(translation.recipe, path) == value, path
    assert [one.key for one in translation.fates if one.fate is Fate.LOST] == case["lost"]
    assert all(one.note for one in translation.fates)
    # every key has an outcome, and every value of the recipe that was written for a key is in it
    assert set(config) <= {one.key for one in translation.fates}
    for one in translation.fates:
        if one.fate is Fate.WRITTEN:
            assert all(value_at(translation.recipe, path) is not None for path in one.note.split(", "))
    text = recipe_text(translation, "their.yaml")
    assert read_yaml(text).data == translation.recipe
    (project / "mine.yaml").write_text(text)
    recipe = load_recipe(project / "mine.yaml")
    assert recipe.train.learning_rate == translation.recipe["train"]["learning_rate"]
    for key in case["lost"]:
        assert re.search(rf"^#   {re.escape(key)}: ", text, re.MULTILINE) and f"\n{key}: " in fates_table(translation)


@pytest.mark.parametrize(
    ("field", "value", "weight"), [("train", False, 0), ("training", False, 0), ("weight", 0.5, 0.5), ("keep", 0, None)]
)
def test_weights_of_messages_from_axolotl(field, value, weight):
    """A field that weights a message, or marks it as trained, is read from the rows; another has to be renamed."""
    source = {"path": "me/chats", "type": "chat_template", "message_field_training": field}
    translation = translate({"base_model": "m/m", "learning_rate": 1e-4, "datasets": [source]}, Path(), "axolotl")
    (found,) = (one for one in translation.fates if one.key == "datasets[0].message_field_training")
    assert found.fate is (Fate.LOST if weight is None else Fate.NOTHING) and "`weight`" in found.note
    turns = [("user", "Hi", {}), ("assistant", "Yes", {field: value}), ("user", "Why?", {}), ("assistant", "So.", {})]
    row = {"messages": [{"role": role, "content": content, **extras} for role, content, extras in turns]}
    assert normalise(row).messages[1].get("weight") == weight


def decided(tool):
    """Names that the code of a translation has as text, without its tables."""
    folder = Path(leftovers.__file__).parent
    files = [folder / "hf_arguments.py", *folder.glob(f"{MODULES[tool].__name__.rpartition('.')[2]}*.py")]
    texts = [file.read_text(encoding="utf-8").partition("LEFTOVERS = Leftovers")[0] for file in files]
    return set(re.findall(r'"(\w+)"', "".join(texts)))


def names(tool):
    return (HERE / "keys" / f"{tool}.txt").read_text(encoding="utf-8").split()


@pytest.mark.parametrize("tool", TOOLS)
def test_every_key_of_a_tool_is_known(tool):
    """keys/ has the options of LLaMA-Factory 0.9.5, Axolotl 0.21.0 and TRL 1.16.0 (with transformers 4.57 and 5.23)."""
    table, known = MODULES[tool].LEFTOVERS, decided(tool)
    assert [name for name in names(tool) if table.reason(name) is None and name not in known] == []
    patterns = [
        pattern for reasons in (table.nothing, table.lost) for words in reasons.values() for pattern in words.split()
    ]
    assert [one for one in patterns if not any(fnmatchcase(name, one) for name in names(tool))] == []
    assert set(table.translated) <= known & set(names(tool))


def test_the_shared_patterns_match_something():
    every = {name for tool in TOOLS for name in names(tool)}
    patterns = [
        one for table in (leftovers.NOTHING, leftovers.LOST) for words in table.values() for one in words.split()
    ]
    assert [one for one in patterns if not any(fnmatchcase(name, one) for name in every)] == []


def test_detection():
    with pytest.raises(UserError, match=r"no configuration of llamafactory, axolotl, trl: it has none of their keys"):
        detect_tool({"learning_rate": 1e-5})
    with pytest.raises(UserError, match=r"could be for llamafactory or axolotl: .*Pass --tool"):
        detect_tool({"stage": "sft", "base_model": "m"})
    assert detect_tool({"stage": "sft", "dataset": "d", "base_model": "m"}) == "llamafactory"


def test_a_value_that_is_no_number(project):
    config = {"model_name_or_path": "m/m", "dataset_name": "me/set", "learning_rate": "fast"}
    with pytest.raises(UserError, match="learning_rate: expected a number, found 'fast'"):
        translate(config, project)
    config["learning_rate"] = "2e-5"
    assert translate(config, project).recipe["train"]["learning_rate"] == 2e-5


def test_dataset_info_beside_the_configuration(project, monkeypatch):
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = {"model_name_or_path": "m/m", "stage": "sft", "dataset": "alpaca_mine"}
    (source,) = translate(config, project).recipe["data"]["train"]
    assert Path(source["path"]) == project / "data" / "alpaca.jsonl"


def test_the_text_of_a_recipe(project):
    config = {"model_name_or_path": "m/m", "dataset_name": "me/set", "loss_type": "dft", "env": {"A": "b\x1b[31m"}}
    text = recipe_text(translate(config, project), "their.yaml")
    assert text.startswith("# Translated from their.yaml (TRL) by `eaftdrope recipes from`.\n")
    assert "\nloss:\n  gate: dft  # loss_type\n" in text and "\x1b" not in text
    assert "  learning_rate: 2.0e-05  # the default of TRL\n" in text
    assert yaml.safe_load(text)["model"] == {"reference": "m/m"}
