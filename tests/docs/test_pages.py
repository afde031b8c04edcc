"""The generated pages: up to date, and complete for every key, gate, verb and option."""

import json
import re

import click
import pytest
import yaml

from eaftdrope.cli.app import VERBS
from eaftdrope.loss.gates import EAFT, GATES, resolve_gate
from eaftdrope.recipe.training_sections import Loss
from tests.docs.pages import ROOT, generator

GENERATE = generator()


@pytest.mark.parametrize("name", GENERATE.PAGES)
def test_a_generated_page_is_up_to_date(name):
    assert (ROOT / "docs" / name).read_text() == GENERATE.page(name), "run `make docs` and commit what it writes"


def _section(page: str, title: str) -> str:
    """The text from the heading `title` to the next."""
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found.group(1)


def _keys(schema: dict, definitions: dict) -> set[str]:
    return {name for below in [schema, *definitions.values()] for name in below.get("properties", {})}


def test_the_recipe_reference_has_every_key_of_the_schema():
    page = (ROOT / "docs/recipe_reference.md").read_text()
    schema = GENERATE.Recipe.model_json_schema(mode="validation")
    assert {definition for definition in schema["$defs"]} == {
        model.__name__ for model in GENERATE.sections() if model is not GENERATE.Recipe
    }
    assert {"learning_rate", "max_new_tokens", "stop_at"} <= _keys(schema, schema["$defs"])
    for model, (path, *_) in GENERATE.sections().items():
        title = path if model is GENERATE.Recipe else f"`{path}`"
        section = _section(page, title)
        base, own = GENERATE.own_keys(model)
        inherited = set(base.model_fields) if base else set()
        assert set(own) | inherited >= set(model.model_fields)
        for key in own:
            row = next(line for line in section.splitlines() if line.startswith(f"| `{key}` |"))
            description = model.model_fields[key].description
            assert description is None or description.replace("<", "&lt;")[:20] in row.replace("\\|", "|")
        if base:
            assert f"The keys are those of [`{GENERATE.sections()[base][0]}`]" in section


def test_the_recipe_reference_states_type_default_and_bounds():
    page = (ROOT / "docs/recipe_reference.md").read_text()
    train, lora = _section(page, "`train`"), _section(page, "`lora`")
    assert "| `learning_rate` | number (above 0); default `1.0e-05` |" in train
    assert "| `dropout` | number (from 0, below 1); default `0.0` |" in lora
    assert "| `dir` | text; required |" in _section(page, "`output`")
    assert "default `null`" in next(line for line in train.splitlines() if line.startswith("| `steps` |"))


@pytest.mark.parametrize("name", GATES)
def test_the_configurations_of_a_gate_can_be_used(name):
    """What the paper index prints is a valid recipe section and builds the same gate in Python."""
    section = _section((ROOT / "docs/gates.md").read_text(), f"`{name}`")
    in_recipes = [yaml.safe_load(line)["loss"] for line in section.splitlines() if line.startswith("loss: ")]
    in_python = re.findall(rf'^apply_eaft\(model, "{name}"(?:, (.*))?\)$', section, flags=re.MULTILINE)
    in_config = re.findall(rf'^EAFTConfig\(gate="{name}"(?:, gate_kwargs=(.*))?\)$', section, flags=re.MULTILINE)
    assert len(in_recipes) == len(in_python) == len(in_config) >= 1
    for recipe, keywords, kwargs in zip(in_recipes, in_python, in_config):
        options = {key: value for key, value in recipe.items() if key != "gate"}
        gate = resolve_gate(name, **options)
        assert Loss.model_validate(recipe).gate_kwargs() == options
        assert gate == resolve_gate(name, **json.loads(kwargs or "{}"))
        assert gate == eval(f"resolve_gate({name!r}, {keywords})")


def test_every_gate_states_its_paper():
    page = (ROOT / "docs/gates.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| [`")]
    assert len(table) == len(GATES)
    with_paper = {"eaft", "eaft-sigmoid", "eaft-mask", "conflict-mask", "dft", "focal", "talr", "mile", "profit"}
    for name, line in zip(GATES, table):
        assert ("https://arxiv.org/abs/" in line) == (name in with_paper), name
    assert "divisor: 3.0" in _section(page, "`eaft`") and "alpha: 3.0" in _section(page, "`eaft`")


def test_a_docstring_of_another_form_is_an_error():
    class Odd(EAFT):
        """Weights by h."""

    with pytest.raises(ValueError, match="the docstring of Odd must be"):
        GENERATE.read_gate(Odd)


def test_the_command_line_has_every_verb_and_option():
    page = (ROOT / "docs/command_line.md").read_text()
    paths = {path for path, _ in GENERATE.commands()}
    assert {f"eaftdrope {verb}" for verb in VERBS} <= paths and "eaftdrope drope check" in paths
    for path, command in GENERATE.commands():
        section = _section(page, path)
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert all(name in section for name in parameter.opts), (path, parameter.opts)
    assert "| `--dry-run` |" in _section(page, "eaftdrope train")
