"""Loading a recipe: what YAML means, shorthand, overrides, files, and the way back to YAML."""

import copy

import pytest

from eaftdrope.errors import RecipeError
from eaftdrope.recipe import dump_recipe, load_recipe, make_recipe
from eaftdrope.recipe.yaml_lines import line_of, read_value, read_yaml

BASE = {"model": "org/model", "data": {"train": "org/rows"}, "output": {"dir": "runs/x"}}


def recipe_with(**sections):
    data = copy.deepcopy(BASE)
    for name, section in sections.items():
        data[name] = {**data[name], **section} if isinstance(data.get(name), dict) else section
    return data


def load_text(tmp_path, text, *overrides):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_recipe(path, list(overrides))


MINIMAL = "model: org/model\ndata: {train: org/rows}\noutput: {dir: runs/x}\n"


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("12", 12),
        ("-3", -3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("yes", "yes"),
        ("off", "off"),
        ("null", None),
        ("~", None),
        ("", None),
        ("12:30", "12:30"),
        ("2026-01-05", "2026-01-05"),
        ("1_000", "1_000"),
        ('"1e-5"', "1e-5"),
        ("'true'", "true"),
        ("1e-5x", "1e-5x"),
        ("[1e-5, none]", [1e-5, "none"]),
        ("{a: 1}", {"a": 1}),
        ("e5", "e5"),
        (".", "."),
    ],
)
def test_values_are_read_as_yaml_1_2(text, value):
    read = read_value(text)
    assert read == value
    assert type(read) is type(value)
    document = read_yaml(f"key: {text}\n")
    assert document.problems == []
    assert document.data == {"key": value}


def test_a_number_without_a_point_is_a_learning_rate(tmp_path):
    assert load_text(tmp_path, MINIMAL + "train: {learning_rate: 1e-5}\n").train.learning_rate == 1e-5


def test_anchors_and_merges(tmp_path):
    text = """\
model: org/model
data:
  train:
    - &source {path: org/rows, weight: 2}
    - {<<: *source, split: validation}
  held_out: {path: org/rows, split: test}
output: {dir: runs/x}
"""
    recipe = load_text(tmp_path, text)
    assert [(s.path, s.weight, s.split) for s in recipe.data.train_sources()] == [
        ("org/rows", 2.0, "train"),
        ("org/rows", 2.0, "validation"),
    ]
    with pytest.raises(RecipeError, match=r"line 4  data\.train\[1\]\.wieght: unknown key"):
        load_text(tmp_path, text.replace("weight", "wieght"))


@pytest.mark.parametrize("text", ["model: &a [*a]\n", "&a {model: *a}\n", "[" * 3000])
def test_a_knot_is_a_problem_and_no_crash(tmp_path, text):
    with pytest.raises(RecipeError):
        load_text(tmp_path, text)


def test_line_of_the_deepest_part():
    root = read_yaml("a:\n  b:\n    - 1\n    - c: 2\n").root
    assert line_of(root, ("a", "b", 1, "c"))[:2] == (4, ("a", "b", 1, "c"))
    assert line_of(root, ("a", "b", 7))[:2] == (2, ("a", "b"))
    assert line_of(root, ("a", "nothing", "here"))[:2] == (1, ("a",))
    assert line_of(root, ())[:2] == (1, ())


# Defaults and shorthand


def test_defaults():
    recipe = make_recipe(BASE)
    assert recipe.model.reference == "org/model"
    assert (recipe.model.dtype, recipe.model.quantization, recipe.lora) == ("float32", "none", None)
    assert (recipe.train.epochs, recipe.train.steps, recipe.train.learning_rate) == (1.0, None, 1e-5)
    assert (recipe.loss.gate, recipe.loss.gate_kwargs(), recipe.loss.backend) == ("eaft", {}, "auto")
    assert [probe.name for probe in recipe.probes.target] == []
    assert [probe.name for probe in recipe.probes.general] == ["perplexity", "multiple_choice"]
    assert (recipe.output.report_to, recipe.output.merge, recipe.output.private) == ([], False, True)
    assert recipe.data.held_out_sources() == []
    assert recipe.data.held_out_share is None


def test_held_out_data_is_measured_unless_the_recipe_says_otherwise():
    measured = make_recipe(recipe_with(data={"held_out": 0.05}))
    assert [probe.name for probe in measured.probes.target] == ["held_out_loss"]
    assert make_recipe(recipe_with(data={"held_out": 0.05}, probes={"target": []})).probes.target == []


def test_steps_leave_the_epochs_open_and_alpha_follows_r():
    recipe = make_recipe(recipe_with(train={"steps": 25}, lora={"r": 8}))
    assert (recipe.train.steps, recipe.train.epochs) == (25, None)
    assert recipe.lora.alpha == 16.0
    assert make_recipe(recipe_with(lora={"r": 8, "alpha": 8})).lora.alpha == 8.0


def test_sources():
    recipe = make_recipe(
        recipe_with(
            data={
                "train": ["org/a", {"path": "org/b", "weight": 3, "limit": 5, "name": "en", "split": "validation"}],
                "held_out": {"path": "org/a", "split": "test"},
            }
        )
    )
    from eaftdrope.data import Source

    assert recipe.data.train_sources() == [
        Source(path="org/a"),
        Source(path="org/b", weight=3.0, split="validation", limit=5, name="en"),
    ]
    assert recipe.data.held_out_sources() == [Source(path="org/a", split="test")]
    share = make_recipe(recipe_with(data={"held_out": 0.05}))
    assert (share.data.held_out_share, share.data.held_out_sources()) == (0.05, [])


def test_probes_with_options():
    recipe = make_recipe(
        recipe_with(
            data={"held_out": 0.1},
            probes={"target": [{"function_calls": {"limit": 3}}, {"held_out_loss": None}], "general": "perplexity"},
        )
    )
    calls, loss = recipe.probes.target
    assert (calls.name, calls.options.limit, calls.options.max_new_tokens) == ("function_calls", 3, 96)
    assert (loss.name, loss.options.limit) == ("held_out_loss", None)
    assert [probe.name for probe in recipe.probes.general] == ["perplexity"]


def test_gate_options():
    recipe = make_recipe(recipe_with(loss={"gate": "eaft-sigmoid", "slope": 10, "threshold": 0.2, "alpha": None}))
    assert recipe.loss.gate_kwargs() == {"slope": 10.0, "threshold": 0.2}


# Files


def test_files_are_found_beside_the_recipe_first_then_here(tmp_path, monkeypatch):
    beside, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
        (folder / "both.jsonl").write_text('{"text": "x"}\n')
    (here / "only_here.jsonl").write_text('{"text": "x"}\n')
    monkeypatch.chdir(here)
    text = MINIMAL.replace("org/rows", "[both.jsonl, only_here.jsonl]")
    recipe = load_text(beside, text)
    assert [source.path for source in recipe.data.train] == [
        str(beside / "both.jsonl"),
        str(here / "only_here.jsonl"),
    ]


def test_a_saved_recipe_finds_its_files_from_its_new_folder(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = MINIMAL.replace("org/rows", "rows.jsonl") + "probes: {general: [{perplexity: {files: [text.txt]}}]}\n"
    recipe = load_text(tmp_path, text)
    saved = tmp_path / "runs" / "recipe.yaml"
    saved.write_text(dump_recipe(recipe, folder=saved.parent))
    assert str(tmp_path) not in saved.read_text()
    again = load_recipe(saved)
    assert again == recipe


# Overrides


@pytest.mark.parametrize(
    ("override", "keys", "value"),
    [
        ("train.learning_rate=1e-3", ("train", "learning_rate"), 1e-3),
        ("train.steps=7", ("train", "steps"), 7),
        ("lora.r=4", ("lora", "r"), 4),
        ("loss.gate=none", ("loss", "gate"), "none"),
        ("model=org/other", ("model", "reference"), "org/other"),
        ("model.dtype=bfloat16", ("model", "dtype"), "bfloat16"),
        ("output.dir=runs/a=b", ("output", "dir"), "runs/a=b"),
        ("output.dir='1'", ("output", "dir"), "1"),
        ("lora.target_modules=[q_proj, v_proj]", ("lora", "target_modules"), ["q_proj", "v_proj"]),
        ("data.held_out=0.1", ("data", "held_out"), 0.1),
        ("lora=null", ("lora",), None),
    ],
)
def test_override(tmp_path, override, keys, value):
    found = load_text(tmp_path, MINIMAL, override)
    for key in keys:
        found = getattr(found, key)
    assert found == value


def test_an_override_of_a_key_in_a_list(tmp_path):
    text = MINIMAL.replace("{train: org/rows}", "{train: [{path: org/a}, {path: org/b}]}")
    recipe = load_text(tmp_path, text, "data.train.1.weight=4", "data.train.1.weight=5")
    assert [source.weight for source in recipe.data.train] == [1.0, 5.0]


def test_an_override_keeps_the_reference(tmp_path):
    assert load_text(tmp_path, MINIMAL, "model.dtype=bfloat16").model.reference == "org/model"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foo", "override foo  expected key.sub=value, such as train.steps=10"),
        ("=3", "override =3  expected key.sub=value, such as train.steps=10"),
        ("train..steps=3", "override train..steps=3  expected key.sub=value, such as train.steps=10"),
        ("train.steps=[1", "override train.steps=[1  the value is not YAML: "),
        ("train.stps=3", "override train.stps=3  train.stps: unknown key. Did you mean `steps`?"),
        ("trian.steps=3", "override trian.steps=3  trian: unknown key. Did you mean `train`?"),
        ("train.epochs=many", "override train.epochs=many  train.epochs: expected a number, found 'many' (text)"),
        ("data.train.path=x", "override data.train.path=x  data.train is 'org/rows' (text) and has no keys. Set "),
        (
            "data.train=x.jsonl",
            "override data.train=x.jsonl  data.train[0].path: no such file: 'x.jsonl' (looked for in ",
        ),
        ("loss.gamma=2", "override loss.gamma=2  loss.gamma: gate eaft has no option gamma"),
        ("output.merge=true", "override output.merge=true  output.merge: no adapters to merge"),
        ("model=null", "override model=null  model: expected a hub id, a folder or package:NAME, or a mapping, found"),
    ],
)
def test_a_problem_in_an_override_names_the_override(tmp_path, override, message):
    with pytest.raises(RecipeError) as caught:
        load_text(tmp_path, MINIMAL, override)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("has 1 problem")
    assert lines[1].strip().startswith(message)


def test_an_index_that_is_not_there(tmp_path):
    text = MINIMAL.replace("{train: org/rows}", "{train: [org/a, org/b]}")
    with pytest.raises(RecipeError, match=r"data\.train is a list of 2\. Use an index from 0 to 1"):
        load_text(tmp_path, text, "data.train.2=org/c")


def test_a_good_override_does_not_take_the_blame_of_the_file(tmp_path):
    with pytest.raises(RecipeError, match=r"  line 4  train\.stps: unknown key"):
        load_text(tmp_path, MINIMAL + "train: {stps: 3}\n", "train.seed=3")


def test_make_recipe_reports_all_problems_without_lines():
    with pytest.raises(RecipeError) as caught:
        make_recipe(recipe_with(train={"epochs": 1, "steps": 2}, loss={"gate": "none", "alpha": 1.0}))
    lines = str(caught.value).splitlines()
    assert lines[0] == "the recipe has 2 problems"
    assert "train.steps: epochs and steps are both set" in lines[1]
    assert "loss.alpha: gate none has no option alpha" in lines[2]


def test_a_recipe_does_not_change():
    recipe = make_recipe(BASE)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 3
