"""Wrong recipes in stages: the right line, the way out, and no problem made up."""

import pytest

from eaftdrope.errors import RecipeError
from eaftdrope.recipe import dump_recipe, load_recipe, make_recipe

# The recipe that each case spoils. Line numbers of the cases refer to it.
GOOD = """\
model: org/model
stages: [drope, recalibrate, eaft]
drope:
  max_length: 16384
  layers: all
recalibrate:
  tokens: 2.0e+9
  data:
    train: text.jsonl
    held_out: 0.01
    documents: joined
  loss:
    gate: none
  train:
    batch_size: 8
    scheduler: cosine
  recovery:
    stop_at: 0.98
  probes:
    target: [held_out_loss]
data:
  train: rows.jsonl
train:
  epochs: 1
output:
  dir: runs/mine
"""


def swap(old, new):
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def without(text, first, last):
    """`text` without its lines `first` to `last`, counted from 1."""
    lines = text.splitlines(keepends=True)
    return "".join(lines[: first - 1] + lines[last:])


# name -> (text, [(line, part of its message), ...])
CASES = {
    "a stage that is none": (
        swap("[drope, recalibrate,", "[drope, recalibrte,"),
        [
            (
                2,
                "stages[1]: 'recalibrte' is not one of pretrain, drope, recalibrate, eaft, ttt. Did you mean `recalibrate`?",
            )
        ],
    ),
    "an order that no key accepts": (
        swap("[drope, recalibrate, eaft]", "[recalibrate, drope, eaft]\nany_order: true"),
        [
            (
                2,
                "any_order accepts eaft before drope and ttt before eaft, and here recalibrate comes before drope. Write",
            )
        ],
    ),
    "two lengths of a pretraining": (
        swap("[drope,", "[pretrain, drope,").replace(
            "drope:\n", "pretrain: {data: {train: text.jsonl}, tokens: 1.0e+6, train: {steps: 5}}\ndrope:\n"
        ),
        [(3, "pretrain.train.steps: tokens and train.steps are both set, and either one fixes the length of the pre")],
    ),
    "no text to pretrain on": (
        swap("stages: [drope,", "stages: [pretrain, drope,"),
        [(2, "the stage pretrain has no text to train on. Add `pretrain: {data: {train: text.jsonl}}`")],
    ),
    "no stage": (swap("[drope, recalibrate, eaft]", "[]"), [(2, "stages: must not be empty")]),
    "stages as text": (
        swap("[drope, recalibrate, eaft]", "drope"),
        [(2, "stages: expected a list, found 'drope' (text)")],
    ),
    "the wrong order": (
        swap("[drope, recalibrate, eaft]", "[recalibrate, drope, eaft]"),
        [
            (
                2,
                "stages[1]: drope comes before recalibrate: a model is dropped, recalibrated, fine-tuned and then made to ",
            )
        ],
    ),
    "a stage twice": (
        swap("[drope, recalibrate, eaft]", "[drope, recalibrate, recalibrate, eaft]"),
        [(2, "stages[2]: recalibrate is listed twice. Keep one")],
    ),
    "a section without its stage": (
        swap("[drope, recalibrate, eaft]", "[recalibrate, eaft]"),
        [
            (
                3,
                "drope: this section belongs to the stage drope, which is not in stages. Write `stages: [drope, recal",
            )
        ],
    ),
    "sections of eaft without it": (
        swap("[drope, recalibrate, eaft]", "[drope, recalibrate]"),
        [
            (
                21,
                "data: this section belongs to the stage eaft, which is not in stages. For the text to recalibrate on",
            ),
            (23, "train: this section belongs to the stage eaft, which is not in stages."),
        ],
    ),
    "sections of stages without stages": (
        without(GOOD, 2, 2),
        [
            (
                2,
                "drope: this section belongs to the stage drope, which a recipe without `stages` does not have. Write `stag",
            ),
            (
                5,
                "recalibrate: this section belongs to the stage recalibrate, which a recipe without `stages` does not have.",
            ),
        ],
    ),
    "a recalibration without text": (
        without(GOOD, 6, 20),
        [
            (
                2,
                "stages[1]: the stage recalibrate has no text to train on. Add `recalibrate: {data: {train: text.jsonl}}`",
            )
        ],
    ),
    "a recalibration without its data": (
        without(GOOD, 8, 11).replace("    target: [held_out_loss]", "    target: []"),
        [(6, "recalibrate.data: missing. Training text and held-out text.")],
    ),
    "eaft without data": (
        without(GOOD, 21, 22),
        [(1, "data: missing. What to train on, and what to hold out.")],
    ),
    "tokens and steps": (
        swap("batch_size: 8", "steps: 100"),
        [
            (
                15,
                "recalibrate.train.steps: tokens and train.steps are both set, and any one of them fixes the length of the",
            )
        ],
    ),
    "tokens and a share": (
        swap("tokens: 2.0e+9", "tokens: 2.0e+9\n  share: 0.02\n  pretraining_tokens: 6.0e+11"),
        [(8, "recalibrate.share: tokens and share are both set")],
    ),
    "a share of nothing": (
        swap("tokens: 2.0e+9", "share: 0.02"),
        [(7, "recalibrate.share: a share of how many tokens? Set pretraining_tokens, such as 600.0e+9")],
    ),
    "pretraining tokens alone": (
        swap("tokens: 2.0e+9", "tokens: 2.0e+9\n  pretraining_tokens: 6.0e+11"),
        [(8, "recalibrate.pretraining_tokens: nothing reads this without share. Set share, such as 0.02")],
    ),
    "a share above one": (
        swap("stop_at: 0.98", "stop_at: 98"),
        [(18, "recalibrate.recovery.stop_at: must be at most 1, found 98")],
    ),
    "typo in a nested section": (
        swap("    held_out: 0.01", "    held_ot: 0.01").replace("[held_out_loss]", "[]"),
        [(10, "recalibrate.data.held_ot: unknown key. Did you mean `held_out`?")],
    ),
    "packing in text": (
        swap("documents: joined", "packing: true"),
        [(11, "recalibrate.data.packing: unknown key. It belongs elsewhere: `data.packing`.")],
    ),
    "a key of another section": (
        swap("layers: all", "tokens: 3"),
        [(5, "drope.tokens: unknown key. It belongs elsewhere: `recalibrate.tokens`.")],
    ),
    "layers as text": (
        swap("layers: all", "layers: first"),
        [
            (
                5,
                "drope.layers: expected all, a list of layer numbers, or a share of the layers such as 0.5, found 'first'",
            )
        ],
    ),
    "a share of more than all layers": (
        swap("layers: all", "layers: 1.5"),
        [(5, "drope.layers: must be less than 1, found 1.5 (a number)")],
    ),
    "an option of another gate": (
        swap("gate: none", "alpha: 2"),
        [(13, "recalibrate.loss.alpha: gate none has no option alpha (it has none).")],
    ),
    "a warm-up the schedule ignores": (
        swap("scheduler: cosine", "scheduler: constant\n    warmup_ratio: 0.1"),
        [(17, "recalibrate.train.warmup_ratio: scheduler constant has no warm-up")],
    ),
    "a decay that nothing reads": (
        swap("scheduler: cosine", "decay_ratio: 0.2"),
        [(16, "recalibrate.train.decay_ratio: only scheduler warmup_stable_decay reads decay_ratio.")],
    ),
    "more than all the steps": (
        swap("scheduler: cosine", "{scheduler: warmup_stable_decay, warmup_ratio: 0.4, decay_ratio: 0.7}").replace(
            "  train:\n    batch_size: 8\n    {", "  train: {"
        ),
        [(14, "recalibrate.train.decay_ratio: warm-up and decay are 1.1 of the steps together. Lower one of them")],
    ),
    "function calls of text": (
        swap("target: [held_out_loss]", "target: [held_out_loss, function_calls]"),
        [(20, "recalibrate.probes.target[1]: function_calls needs conversations, and a recalibration holds out text.")],
    ),
    "nothing held out": (
        without(GOOD, 10, 10),
        [
            (
                19,
                "recalibrate.probes.target[0]: held_out_loss is measured on held-out rows, and the recipe has none. Set ",
            )
        ],
    ),
    "held out from what is trained on": (
        swap("held_out: 0.01", "held_out: text.jsonl"),
        [(10, "recalibrate.data.held_out: 'text.jsonl' (split train) is trained on as well")],
    ),
    "a missing file": (
        swap("train: text.jsonl", "train: txt.jsonl"),
        [(9, "recalibrate.data.train: no such file: 'txt.jsonl' (looked for in ")],
    ),
    "a missing original": (
        swap("stop_at: 0.98", "original: ./nowhere"),
        [(18, "recalibrate.recovery.original: no such file: './nowhere' (looked for in ")],
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    (tmp_path / "text.jsonl").write_text('{"text": "a document"}\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def load(folder, text, *overrides):
    path = folder / "mine.yaml"
    path.write_text(text)
    return load_recipe(path, list(overrides))


@pytest.mark.parametrize("case", CASES)
def test_wrong_stages(case, folder):
    text, problems = CASES[case]
    with pytest.raises(RecipeError) as caught:
        load(folder, text)
    told = str(caught.value).splitlines()[1:-1]
    assert len(told) == len(problems), caught.value
    for answer, (line, part) in zip(told, problems, strict=True):
        assert answer.split()[:2] == ["line", str(line)], answer
        assert part in answer


def test_all_problems_at_once(folder):
    text = (
        GOOD.replace("layers: all", "layrs: all")
        .replace("gate: none", "gate: nothing")
        .replace("rows.jsonl", "row.jsonl")
    )
    with pytest.raises(RecipeError) as caught:
        load(folder, text.replace("batch_size: 8", "epochs: 2"))
    starts = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]]
    assert starts == [
        "line  5  drope.layrs",
        "line 13  recalibrate.loss.gate",
        "line 15  recalibrate.train.epochs",
        "line 22  data.train",
    ]


# ---- what a good recipe means ----


def test_the_good_recipe_is_good_and_survives_its_dump(folder):
    recipe = load(folder, GOOD)
    again = folder / "again.yaml"
    again.write_text(dump_recipe(recipe, folder=folder))
    assert load_recipe(again) == recipe
    assert str(folder) not in again.read_text()


def recalibration(drope=None, **section):
    data = {
        "model": "org/model",
        "stages": ["drope", "recalibrate"],
        "recalibrate": {"data": {"train": "org/text"}, **section},
        "output": {"dir": "runs/x"},
    }
    return make_recipe({**data, "drope": drope} if drope else data).recalibrate


def test_the_defaults_of_the_paper():
    section = recalibration(tokens=1e6)
    train = section.train
    assert (train.learning_rate, train.warmup_ratio, train.scheduler) == (3e-4, 0.01, "cosine")
    assert (train.adam_beta1, train.adam_beta2, train.weight_decay, train.max_grad_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (section.loss.gate, section.data.train_on, section.data.documents) == ("none", "all", "joined")
    assert (section.data.max_length, section.recovery.stop_at) == (None, None)
    assert [probe.name for probe in section.probes.general] == ["perplexity", "multiple_choice"]


def test_the_learning_rate_follows_qk_norm():
    assert recalibration(drope={"qk_norm": True}).train.learning_rate == 1e-3
    assert recalibration(drope={"qk_norm": True}, train={"learning_rate": 5e-4}).train.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("train", "expected"),
    [({"warmup_steps": 5}, None), ({"scheduler": "constant"}, None), ({"warmup_ratio": 0.1}, 0.1), ({}, 0.01)],
)
def test_the_warm_up_is_there_where_nothing_else_is_said(train, expected):
    assert recalibration(train=train).train.warmup_ratio == expected


def test_the_length():
    assert recalibration(tokens=3e6).budget == 3e6
    assert recalibration(share=0.02, pretraining_tokens=6e11).budget == pytest.approx(1.2e10)
    assert (recalibration().budget, recalibration().train.epochs) == (None, 1.0)
    assert (recalibration(tokens=1e6).train.epochs, recalibration(train={"steps": 3}).train.epochs) == (None, None)


def test_a_recipe_without_stages_keeps_its_defaults():
    recipe = make_recipe({"model": "org/model", "data": {"train": "org/rows"}, "output": {"dir": "runs/x"}})
    assert (recipe.stages, recipe.drope, recipe.recalibrate) == (None, None, None)
    assert "stages" not in dump_recipe(recipe) and "recalibrate" not in dump_recipe(recipe)
