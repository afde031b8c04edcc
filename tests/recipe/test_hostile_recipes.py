"""Recipes that ended in a traceback once, each with the sentence that it gets; the fuzz test looks for others."""

import pytest

from eaftdrope.cli import main
from eaftdrope.errors import RecipeError
from eaftdrope.recipe import load_recipe, make_recipe

GOOD = "model: org/model\ndata: {train: org/rows}\noutput: {dir: runs/x}\n"
LONG = "a" * 300
SHOWN = "a" * 57 + "..."


def with_model(value):
    return GOOD.replace("org/model", value)


def with_rows(value):
    return GOOD.replace("org/rows", value)


def with_dir(value):
    return GOOD.replace("runs/x", value)


# name -> (recipe, override, the problem with its place)
CASES = {
    "!!bool": (GOOD + "lora: !!bool x", None, "line 4  not valid YAML: 'x' is not a value of the type bool"),
    "!!timestamp": (
        GOOD + "lora: !!timestamp x",
        None,
        "line 4  not valid YAML: 'x' is not a value of the type timestamp",
    ),
    "!!int": (GOOD + "lora: {r: !!int ''}", None, "line 4  not valid YAML: '' is not a value of the type int"),
    "!!bool in an override": (GOOD, "lora=!!bool x", "the value is not YAML: 'x' is not a value of the type bool"),
    "hexadecimal digits": (
        GOOD + f"train: {{steps: 0x{'f' * 6000}}}",
        None,
        "train.steps: must be at most 1,000,000,000, found a whole number of about 7,225 digits",
    ),
    "decimal digits": (
        GOOD + f"train: {{steps: {'9' * 6000}}}",
        None,
        "line 4  not valid YAML: a value of 6,000 characters is not a value of the type int",
    ),
    "a rank": (
        GOOD + f"lora: {{r: 0x{'f' * 400}}}",
        None,
        "lora.r: must be at most 65,536, found a whole number of about 482 digits",
    ),
    "a long model": (with_model("/" + LONG), None, f"model: '/{SHOWN[1:]}' cannot be accessed: File name too long."),
    "long data": (with_rows(LONG), None, f"data.train: '{SHOWN}' cannot be accessed: File name too long."),
    "a long folder": (with_dir(LONG), None, f"output.dir: '{SHOWN}' cannot be accessed: File name too long."),
    "no such user": (
        with_dir("~nosuchuser/x"),
        None,
        "output.dir: '~nosuchuser/x': this user does not exist, so ~ cannot be expanded. Write the full path.",
    ),
    "a NUL": (
        with_rows('"a\\0b"'),
        None,
        "data.train: 'a\\x00b' cannot be a file name: it has a character that",
    ),
    "900 brackets": (GOOD, f"train.steps={'[' * 900}{']' * 900}", "the value is not YAML: nested too deeply"),
    "101 levels": (
        GOOD,
        f"train.steps={'[' * 101}{']' * 101}",
        "the value is not YAML: nested too deeply (at most 100 ",
    ),
    "100 levels": (GOOD, f"train.steps={'[' * 100}{']' * 100}", "train.steps: expected a whole number, found a list"),
    "levels of a file": (
        GOOD + f"\n\nextra: {'[' * 900}",
        None,
        "not valid YAML: nested too deeply (at most 100 levels)",
    ),
    "half a character": (
        with_dir('"a\\ud800"'),
        None,
        "line 3  output.dir: not Unicode text: it has half a character.",
    ),
    "half a key": (GOOD + '"\\udcff": 1', None, "line 4  \\udcff: not Unicode text: it has half a character."),
    "half an override": (GOOD, "output.dir=\udce9", "the value is not YAML: special characters are not allowed"),
    "a key like a tag of ours": (GOOD, "\t<<: *a=package:x", "<<: *a: unknown key.   (keys here: model, stages,"),
    "another one": (GOOD + "<share>: 1", None, "line 4  <share>: unknown key."),
    "an endless index": (GOOD, f"data.train.{'9' * 5000}=1", "data.train is 'org/rows' (text) and has no keys."),
    "a key for the terminal": (GOOD + '"\\e[2J": 1', None, "line 4  \\x1b[2J: unknown key."),
    "a value for the terminal": (with_model('"\\e]0;x\\a"'), None, "model '\\x1b]0;x\\x07' is neither"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_a_traceback(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, override, problem = CASES[case]
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("mine.yaml", [override] if override else [])
    assert problem in str(caught.value)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


BOUNDS = {
    "train.learning_rate": ("1e38", "1e+30"),
    "train.weight_decay": ("1e300", "1e+30"),
    "train.max_grad_norm": ("1e300", "1e+30"),
    "train.epochs": ("1e300", "1e+06"),
    "train.steps": ("10000000000000000000", "1,000,000,000"),
    "train.batch_size": ("10000000000000000000", "1,000,000,000"),
    "train.warmup_steps": ("10000000000000000000", "1,000,000,000"),
    "train.dataloader_workers": ("1000000", "1,024"),
    "data.max_length": ("10000000000000000000", "1,000,000,000"),
    "lora.r": ("1000000000000", "65,536"),
    "lora.alpha": ("1e300", "1e+06"),
    "loss.alpha": ("1e300", "1e+06"),
    "loss.k": ("10000000000000000000", "1,000,000,000"),
    "loss.divisor": ("1e300", "1e+06"),
    "probes.batch_tokens": ("10000000000000000000", "1,000,000,000"),
}


@pytest.mark.parametrize("key", BOUNDS)
def test_numbers_have_bounds(key, tmp_path):
    value, most = BOUNDS[key]
    (tmp_path / "mine.yaml").write_text(GOOD + "lora: {r: 4}\n")
    with pytest.raises(RecipeError, match=f"{key}: must be at most {most}, found".replace("+", r"\+")):
        load_recipe(tmp_path / "mine.yaml", [f"{key}={value}"])


@pytest.mark.parametrize("value", [1e300, 1e9])
def test_the_weight_of_a_source_has_a_bound(value):
    data = {"model": "org/model", "data": {"train": [{"path": "org/rows", "weight": value}]}, "output": {"dir": "x"}}
    with pytest.raises(RecipeError, match=r"data\.train\[0\]\.weight: must be at most 1000, found"):
        make_recipe(data)


def test_a_rate_that_diverges_is_no_slip(tmp_path):
    """Within float32: training itself finds out."""
    (tmp_path / "mine.yaml").write_text(GOOD)
    assert load_recipe(tmp_path / "mine.yaml", ["train.learning_rate=1e30"]).train.learning_rate == 1e30


def test_a_character_in_two_halves_as_json_writes_it(tmp_path):
    (tmp_path / "mine.yaml").write_text(with_dir('"runs/\\ud83d\\ude00"'))
    assert load_recipe(tmp_path / "mine.yaml").output.dir == "runs/\U0001f600"


def test_what_is_good_steers_no_terminal_either(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(with_dir('"runs/\\e[31m\\u202ex"'))
    with pytest.raises(SystemExit):
        main(["validate", "mine.yaml"])
    out = capsys.readouterr().out
    assert "  output    runs/\\x1b[31m\\u202ex\n" in out and "\x1b" not in out and "\u202e" not in out


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (LONG, f"'{SHOWN}' cannot be accessed: File name too long."),
        ("~nosuchuser/x.yaml", "'~nosuchuser/x.yaml': this user does not exist"),
        ("a\0b", "'a\\x00b' cannot be a file name"),
        ("\udce9.yaml", "no recipe at \udce9.yaml."),
    ],
)
def test_the_recipe_itself_has_such_a_name(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(message)
