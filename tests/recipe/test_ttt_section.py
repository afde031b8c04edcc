"""The section ttt: wrong recipes with their lines and ways out, and what a good one means."""

import subprocess
import sys
from dataclasses import fields

import pytest

from eaftdrope.errors import RecipeError
from eaftdrope.recipe import dump_recipe, load_recipe, make_recipe
from eaftdrope.recipe.combinations import combination_problems
from eaftdrope.recipe.data_section import Data
from eaftdrope.recipe.stage_sections import TextData
from eaftdrope.recipe.ttt_section import INNER_GATES, MetaTraining
from eaftdrope.ttt.config import TTTConfig

# The recipe that each case changes. Line numbers of the cases refer to it.
GOOD = """\
model: org/model
stages: [ttt]
ttt:
  window: 1024
  chunk: 256
  layout: prime
  horizon: all
  inner_gate: eaft
  data:
    train: text.jsonl
    held_out: 0.1
    max_length: 4096
  lora:
    r: 8
  train:
    steps: 10
  probes:
    target: [held_out_loss]
output:
  dir: runs/mine
"""


def swap(old, new):
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


# name -> (text, [(line, part of its message), ...])
CASES = {
    "a chunk beyond the window": (
        swap("chunk: 256", "chunk: 2048"),
        [
            (
                5,
                "ttt.chunk: a chunk of 2,048 tokens is larger than the window of 1,024, and the tokens of a chunk must see",
            )
        ],
    ),
    "a window below the chunk's default": (
        swap("window: 1024\n  chunk: 256", "window: 256"),
        [(4, "ttt.window: a chunk of 512 tokens is larger than the window of 256")],
    ),
    "sequences of one chunk": (
        swap("max_length: 4096", "max_length: 256"),
        [
            (
                12,
                "ttt.data.max_length: sequences of 256 tokens end within the first chunk of 256, so nothing learned would",
            )
        ],
    ),
    "a chunk as long as the sequences' default": (
        swap("window: 1024\n  chunk: 256", "window: 8192\n  chunk: 4096").replace("    max_length: 4096\n", ""),
        [(5, "ttt.chunk: sequences of 4,096 tokens end within the first chunk of 4,096")],
    ),
    "a sink without a window": (
        swap("window: 1024", "window: null\n  sink: 4"),
        [(5, "ttt.sink: the window of the model's own configuration has no sink.")],
    ),
    "packing": (
        swap("held_out: 0.1", "packing: true").replace("[held_out_loss]", "[]"),
        [(11, "ttt.data.packing: packed rows would share what is learned from them")],
    ),
    "documents apart": (
        swap("held_out: 0.1", "documents: separate").replace("[held_out_loss]", "[]"),
        [(11, "ttt.data.documents: documents of a block are always joined here")],
    ),
    "in place under adapters": (
        swap("layout: prime", "layout: in_place"),
        [(6, "ttt.layout: in_place makes the blocks' own MLPs the fast ones, and adapters freeze them")],
    ),
    "fast MLPs as modules to save": (
        swap("r: 8", "modules_to_save: [lm_head, ttt]"),
        [(14, "ttt.lora.modules_to_save[1]: peft would train a copy of the fast MLPs that the model does not use.")],
    ),
    "lora without keys": (
        swap("lora:\n    r: 8", "lora:"),
        [(13, "ttt.lora: nothing is set. Write `lora: {}` for adapters with the defaults")],
    ),
    "a horizon in words": (
        swap("horizon: all", "horizon: some"),
        [(7, "ttt.horizon: expected a number of chunks or all, found 'some' (text)")],
    ),
    "a horizon of nothing": (swap("horizon: all", "horizon: 0"), [(7, "ttt.horizon: must be at least 1, found 0")]),
    "a gate over the batch": (
        swap("inner_gate: eaft", "inner_gate: eaft-mask"),
        [(8, "ttt.inner_gate: 'eaft-mask' is not one of eaft, eaft-vocab,")],
    ),
    "an unknown layout": (
        swap("layout: prime", "layout: parallel"),
        [(6, "ttt.layout: 'parallel' is not one of prime, in_place.")],
    ),
    "steps and epochs": (
        swap("steps: 10", "steps: 10\n    epochs: 1"),
        [(16, "ttt.train.steps: epochs and steps are both set")],
    ),
    "function calls of text": (
        swap("[held_out_loss]", "[function_calls]"),
        [(18, "ttt.probes.target[0]: function_calls needs conversations, and sequences: blocks holds out text.")],
    ),
    "no data": (
        swap("  data:\n    train: text.jsonl\n    held_out: 0.1\n    max_length: 4096\n", "").replace(
            "[held_out_loss]", "[]"
        ),
        [(3, "ttt.data: missing. Training text or conversations")],
    ),
    "no section": (
        "model: org/model\nstages: [ttt]\noutput: {dir: x}\n",
        [(2, "stages[0]: the stage ttt has no text to train on. Add `ttt: {data: {train: text.jsonl}}`")],
    ),
    "no stage": (
        swap("stages: [ttt]", "stages: [eaft]").replace("output:", "data: {train: rows.jsonl}\noutput:"),
        [(3, "ttt: this section belongs to the stage ttt, which is not in stages. Write `stages: [eaft, ttt]`")],
    ),
    "sections of eaft": (
        GOOD + "train: {steps: 3}\n",
        [
            (
                21,
                "train: this section belongs to the stage eaft, which is not in stages. For the stage ttt write ttt.train.",
            )
        ],
    ),
    "before the fine-tuning": (
        swap("stages: [ttt]", "stages: [ttt, eaft]").replace("output:", "data: {train: rows.jsonl}\noutput:"),
        [(2, "stages[1]: eaft comes before ttt: a model is dropped, recalibrated, fine-tuned and then made to learn")],
    ),
    "merging without adapters": (
        swap("  lora:\n    r: 8\n", "") + "  merge: true\n",
        [(19, "output.merge: no adapters to merge: without a ttt.lora section the full weights are written anyway.")],
    ),
    "a key of the trainer's name": (
        swap("horizon: all", "learning_rate: 1"),
        [(7, "ttt.learning_rate: unknown key.")],
    ),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    (tmp_path / "text.jsonl").write_text('{"text": "a document"}\n')
    return tmp_path


def load(folder, text, *overrides):
    path = folder / "mine.yaml"
    path.write_text(text)
    return load_recipe(path, list(overrides))


@pytest.mark.parametrize("case", CASES)
def test_wrong_recipes(case, folder):
    text, problems = CASES[case]
    with pytest.raises(RecipeError) as caught:
        load(folder, text)
    found = str(caught.value).splitlines()[1:-1]
    assert len(found) == len(problems), caught.value
    for answer, (line, part) in zip(found, problems, strict=True):
        assert answer.split()[:2] == ["line", str(line)], answer
        assert part in answer


def test_four_bits_are_refused_where_nothing_was_merged_before():
    """Whether or not bitsandbytes is installed, which the schema checks."""
    raw = {"model": {"reference": "org/model", "quantization": "4bit"}, "ttt": {"data": {"train": "x"}}, "lora": {}}
    found = {problem.loc: problem.text for problem in combination_problems({**raw, "stages": ["ttt"]})}
    assert found["model", "quantization"].startswith("the fast MLPs of the stage ttt are copied from the model's own")
    after = combination_problems({**raw, "stages": ["eaft", "ttt"], "data": {"train": "y"}})
    assert not [problem for problem in after if problem.loc == ("model", "quantization")]


def test_an_override_is_checked_with_the_rest(folder):
    with pytest.raises(RecipeError, match=r"override ttt.chunk=4096\s+ttt.chunk: a chunk of 4,096 tokens is larger"):
        load(folder, GOOD, "ttt.chunk=4096")


def test_the_good_recipe_is_good_and_survives_its_dump(folder):
    recipe = load(folder, GOOD)
    again = folder / "again.yaml"
    again.write_text(dump_recipe(recipe, folder=folder))
    assert load_recipe(again) == recipe
    assert str(folder) not in again.read_text()
    assert recipe.adapters == recipe.ttt.lora and recipe.adapters.r == 8


def section(**keys):
    data = {"data": {"train": "org/text"}, **keys}
    return make_recipe({"model": "org/m", "stages": ["ttt"], "ttt": data, "output": {"dir": "x"}}).ttt


def test_the_defaults_are_those_of_the_configuration():
    assert section().config() == TTTConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *{
            "window": 300,
            "sink": 0,
            "chunk": 100,
            "fast_blocks": 3,
            "layout": "in_place",
            "lr": 0.5,
            "clip": 2.0,
        }.items(),
        *{"horizon": 3, "checkpoint": True, "inner_gate": "focal", "warmup": 2}.items(),
    ],
)
def test_every_setting_reaches_the_configuration(key, value):
    given = section(**({"chunk": 100} if key == "window" else {}), **{key: value}).config()
    assert getattr(given, key) == value


def test_all_is_the_whole_sequence():
    assert section(horizon="all").config().horizon is None


def test_the_section_has_every_setting_and_nothing_else_of_the_conversion():
    sections = {"data", "loss", "lora", "train", "probes"}
    assert set(MetaTraining.model_fields) - sections == {field.name for field in fields(TTTConfig)}


@pytest.mark.parametrize("gate", INNER_GATES)
def test_inner_gates_are_accepted_by_the_configuration(gate):
    assert TTTConfig(inner_gate=gate).inner_gate == gate


def test_rows_of_text_and_rows_of_chats():
    blocks = section().data.resolved()
    assert isinstance(blocks, TextData)
    assert (blocks.train_on, blocks.max_length, blocks.documents) == ("all", 4096, "joined")
    rows = section(data={"train": "org/chats", "sequences": "rows", "max_length": 2048}).data.resolved()
    assert isinstance(rows, Data)
    assert (rows.train_on, rows.max_length, rows.packing) == ("assistant", 2048, False)
    chosen = section(data={"train": "org/chats", "sequences": "rows", "train_on": "last_assistant"}).data.resolved()
    assert chosen.train_on == "last_assistant"


def test_defaults_that_depend_on_other_keys():
    assert [probe.name for probe in section().probes.target] == []
    held_out = section(data={"train": "org/text", "held_out": 0.1})
    assert [probe.name for probe in held_out.probes.target] == ["held_out_loss"]
    assert (held_out.train.epochs, held_out.train.batch_size, held_out.loss.gate) == (1.0, 1, "none")
    assert (held_out.train.weight_decay, held_out.train.adam_beta2) == (0.1, 0.95)


def test_a_recipe_is_read_without_torch():
    code = "import sys, eaftdrope.recipe, eaftdrope.ttt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
