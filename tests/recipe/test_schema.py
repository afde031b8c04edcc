"""The schema agrees with what it names: gates, formats, optimisers, schedules, the shipped recipes, and JSON schema."""

from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from eaftdrope.cli.recipes import shipped_recipes, title
from eaftdrope.cli.schema import json_schema
from eaftdrope.loss.gates import ALL_GATE_OPTIONS, GATE_OPTIONS
from eaftdrope.recipe import Recipe, load_recipe
from eaftdrope.recipe.load import section_at
from eaftdrope.recipe.schema import LOGGERS, Data
from eaftdrope.recipe.suggest import FOREIGN_KEYS
from eaftdrope.recipe.training_sections import OPTIMIZERS, Loss, Train
from eaftdrope.recipe.yaml_lines import read_yaml

SHIPPED = shipped_recipes()


def choices(model, field):
    found = model.model_json_schema()["properties"][field]
    return tuple(found["enum"])


def test_gates_are_those_of_the_loss():
    assert choices(Loss, "gate") == tuple(GATE_OPTIONS)
    operator = {"backend", "tile_mb", "tail", "tail_threshold", "gate_threshold", "recompute", "exempt"}
    assert set(ALL_GATE_OPTIONS) | {"gate"} | operator == set(Loss.model_fields)


@pytest.mark.parametrize("gate", GATE_OPTIONS)
def test_every_option_reaches_its_gate(gate):
    from eaftdrope.loss.gates import resolve_gate

    options = {name: 2.0 if default is None else default for name, default in GATE_OPTIONS[gate].items()}
    loss = Loss(gate=gate, **options)
    assert loss.gate_kwargs() == options
    resolved = resolve_gate(loss.gate, **loss.gate_kwargs())
    assert {name: getattr(resolved, name) for name in options} == options


def test_data_choices_are_those_of_the_data_package():
    from eaftdrope.data import FORMATS, TRAIN_ON

    assert choices(Data, "format") == FORMATS
    assert choices(Data, "train_on") == TRAIN_ON


def test_optimisers_and_schedules_exist_in_transformers():
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}
    assert set(choices(Train, "scheduler")) <= {name.value for name in SchedulerType}


def test_loggers_exist_in_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(LOGGERS) <= set(INTEGRATION_TO_CALLBACK)


def test_keys_of_other_toolkits_lead_to_keys_of_ours():
    for path in FOREIGN_KEYS.values():
        section, key = path.split(".")
        assert key in section_at((section,)).model_fields


def sections():
    found, stack = [], [Recipe]
    while stack:
        section = stack.pop()
        found.append(section)
        for name, field in section.model_fields.items():
            parts = [field.annotation]
            while parts:
                part = parts.pop()
                if isinstance(part, type) and issubclass(part, BaseModel):
                    stack.append(part)
                parts += get_args(part)
            assert name
    return found


def test_every_key_is_described():
    seen = sections()
    assert len({section.__name__ for section in seen}) == 47
    for section in seen:
        for name, field in section.model_fields.items():
            assert field.description and field.description.endswith("."), f"{section.__name__}.{name}"


# JSON schema


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def base(**sections):
    return {"model": "org/model", "data": {"train": "rows.jsonl"}, "output": {"dir": "runs/x"}, **sections}


@pytest.mark.parametrize(
    "recipe",
    [
        base(),
        base(model={"reference": "org/model", "dtype": "bfloat16"}),
        base(data={"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}], "held_out": 0.05}),
        base(data={"train": {"path": "org/rows"}, "held_out": {"path": "org/rows", "split": "test"}}),
        base(probes={"target": ["held_out_loss", {"function_calls": {"limit": 3}}], "general": []}),
        base(lora=None),
        base(lora={"target_modules": ["q_proj"]}),
        base(output={"dir": "x", "report_to": "none"}),
        base(stages=["drope", "eaft"], drope={"layers": [0, 2], "max_length": 4096}),
        base(stages=["drope", "eaft"], drope={"layers": 0.5}),
        base(stages=["eaft", "ttt"], ttt={"data": {"train": "text.jsonl"}, "horizon": "all", "lora": {"r": 4}}),
        base(stages=["eaft", "ttt"], ttt={"data": {"train": "text.jsonl"}, "horizon": 2, "window": None}),
        {
            "model": "org/model",
            "stages": ["drope", "recalibrate"],
            "recalibrate": {"data": {"train": "text.jsonl"}, "tokens": 1e6, "recovery": {"stop_at": 0.98}},
            "output": {"dir": "runs/x"},
        },
    ],
)
def test_json_schema_accepts_what_we_accept(recipe, validator):
    assert list(validator.iter_errors(recipe)) == []


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"model": "org/model", "output": {"dir": "runs/x"}},
        base(stages=["recalibrte"]),
        base(stages=[]),
        base(stages=["drope", "eaft"], drope={"layers": "some"}),
        base(stages=["recalibrate", "eaft"], recalibrate={"tokens": 1e6}),
        base(stages=["eaft", "ttt"], ttt={"chunk": 64}),
        base(stages=["eaft", "ttt"], ttt={"data": {"train": "text.jsonl"}, "horizon": "none"}),
        base(stages=["eaft", "ttt"], ttt={"data": {"train": "text.jsonl"}, "layout": "series"}),
        base(los={}),
        base(loss={"gate": "eatf"}),
        base(train={"learning_rate": -1}),
        base(train={"learning_rate": "fast"}),
        base(data={"train": 3}),
        base(data={"train": "x", "held_out": 1.5}),
        base(probes={"target": ["perplexity"]}),
        base(lora={"r": 0}),
        base(lora={"target_modules": "q_proj"}),
    ],
)
def test_json_schema_refuses_what_we_refuse(recipe, validator):
    assert list(validator.iter_errors(recipe)) != []


# The shipped recipes


def test_the_shipped_recipes():
    """What runs first comes first."""
    assert list(SHIPPED) == [
        "quickstart",
        "math_cpu",
        "medical_cpu",
        "tool_use_cpu",
        "math",
        "medical",
        "tool_use",
        "pipelines/drope_then_eaft_cpu",
        "distributed/math_32b",
        "drope/llama3.1_8b",
        "drope/qwen3_4b",
        "drope/smollm2_1.7b",
        "drope/smollm2_135m",
        "drope/smollm2_360m",
        "pipelines/drope_then_eaft",
        "pipelines/full",
        "pipelines/full_smollm2",
        "rlm/smollm2_root",
        "ttt/llama3.1_8b",
        "ttt/qwen3_4b",
        "ttt/smollm2_135m",
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_validates(name, validator, tmp_path, monkeypatch):
    # nothing is read from the working directory
    monkeypatch.chdir(tmp_path)
    path = SHIPPED[name]
    recipe = load_recipe(path)
    assert recipe.output.dir == f"runs/{name}"
    assert list(validator.iter_errors(read_yaml(path.read_text(encoding="utf-8")).data)) == []
    # it means the same to a reader of YAML 1.1
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == read_yaml(path.read_text(encoding="utf-8")).data


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_is_explained(name):
    """A header with a title, the command and what to expect, and a comment above every key of every section."""
    lines = SHIPPED[name].read_text(encoding="utf-8").splitlines()
    header = lines[: lines.index("")]
    assert all(line.startswith("#") for line in header)
    # a launch on several devices takes two lines
    assert f"train recipes/{name}.yaml" in header[3 if header[2].endswith("\\") else 2]
    for word in ("Hardware:", "Data:", "Expect:"):
        assert sum(word in line for line in header) == 1
    assert title(SHIPPED[name]).endswith(".") and len(title(SHIPPED[name])) < 100
    assert max(map(len, lines)) <= 120
    explained = False
    for line in lines[len(header) :]:
        stripped = line.strip()
        if stripped.startswith("#"):
            explained = True
        elif not stripped or stripped.endswith(":"):
            # a section, in another or not
            explained = False
        elif not stripped.startswith("- "):
            # keys that one comment explains together stand below one another
            assert explained, line


def explanations(name):
    """key path -> the comment above it, without line breaks."""
    found, comment, path = {}, [], []
    for line in SHIPPED[name].read_text(encoding="utf-8").split("\n\n", 1)[1].splitlines():
        text, depth = line.strip(), (len(line) - len(line.lstrip())) // 2
        if text.startswith("#"):
            comment.append(text[1:].strip())
            continue
        if text and not text.startswith("- "):
            path = [*path[:depth], text.split(":")[0]]
            if not text.endswith(":"):
                found[".".join(path)] = " ".join(comment)
        comment = []
    return found


def test_a_key_is_explained_alike_in_every_recipe():
    """The same sentences; what a recipe adds to them stands before them."""
    every = [explanations(name) for name in SHIPPED]
    for path in sorted({path for found in every for path in found}):
        comments = [found[path] for found in every if path in found]
        shared = min(comments, key=len)
        assert shared.endswith(")"), path
        assert [comment for comment in comments if not comment.endswith(shared)] == [], path


def test_quickstart_is_small_and_local():
    recipe = load_recipe(SHIPPED["quickstart"])
    assert recipe.model.reference == "package:smollm2-135m-instruct"
    sources = [*recipe.data.train_sources(), *recipe.data.held_out_sources()]
    assert [(s.path, s.split, s.limit) for s in sources] == [
        ("package:bfcl", "train", 365),
        ("package:bfcl", "test", 35),
    ]
    assert (recipe.train.steps, recipe.train.batch_size, recipe.train.learning_rate) == (16, 4, 5e-4)
    assert Path(recipe.output.dir) == Path("runs/quickstart")


def test_the_rows_of_the_quickstart_have_one_function_and_one_call():
    """Its limits are where the package's first category ends."""
    from eaftdrope.data import Source, iter_rows

    recipe = load_recipe(SHIPPED["quickstart"])
    for source in (*recipe.data.train_sources(), *recipe.data.held_out_sources()):
        rows = [row.data for row in iter_rows(source)]
        assert len(rows) == source.limit
        assert all(
            row["id"].startswith("simple_python") and len(row["tools"]) == len(row["ground_truth"]) == 1 for row in rows
        )
        (other,) = list(iter_rows(Source(source.path, split=source.split, limit=source.limit + 1)))[source.limit :]
        assert other.data["id"].startswith("multiple")
