"""Wrong recipes: every one is answered with the right line, the way out, exit code 2 and no traceback."""

import importlib.util

import pytest

from eaftdrope.cli import main
from tests.recipe.wrong_recipes import CASES, GOOD, swap


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def validate(path, *overrides, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["validate", str(path), *overrides])
    output = capsys.readouterr()
    return stop.value.code, output.out, output.err


def test_the_good_recipe_is_good(folder, capsys):
    path = folder / "mine.yaml"
    path.write_text(GOOD)
    code, out, err = validate(path, capsys=capsys)
    assert (code, err) == (0, "")
    assert out.startswith(f"ok  {path}\n  model     org/model\n  method    LoRA r 16, alpha 32\n")


@pytest.mark.parametrize("case", CASES)
def test_wrong_recipe(case, folder, capsys):
    text, line, parts = CASES[case]
    path = folder / "mine.yaml"
    path.write_text(text)
    code, out, err = validate(path, capsys=capsys)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    first, *problems, last = err.splitlines()
    assert first.startswith(f"{path} has ")
    assert last == f"Nothing was loaded. `eaftdrope validate {path}` checks again in a second."
    assert first.endswith("1 problem" if len(problems) == 1 else f"{len(problems)} problems")
    answers = [text for text in problems if all(part in text for part in parts)]
    assert len(answers) == 1, err
    assert answers[0].split()[:2] == ["line", str(line)], err


# A mistake that makes others is reported with them; every other case is one problem and no more.
MORE_THAN_ONE = {"typo in output": 2}


@pytest.mark.parametrize("case", CASES)
def test_no_problem_is_made_up(case, folder, capsys):
    path = folder / "mine.yaml"
    path.write_text(CASES[case][0])
    _, _, err = validate(path, capsys=capsys)
    assert len(err.splitlines()) - 2 == MORE_THAN_ONE.get(case, 1), err


def test_a_missing_tracker_is_told_beside_a_misspelt_one(folder, capsys, monkeypatch):
    monkeypatch.setattr("eaftdrope.recipe.base.importlib.util.find_spec", lambda name: None)
    path = folder / "mine.yaml"
    path.write_text(swap("report_to: none", "report_to: [wandb, tensorbord]"))
    _, _, err = validate(path, capsys=capsys)
    missing, misspelt = err.splitlines()[1:-1]
    assert missing == (
        "  line 22  output.report_to[0]: 'wandb' needs the package wandb, which is not installed: pip install wandb"
    )
    assert misspelt.startswith("  line 22  output.report_to[1]: 'tensorbord' is not one of tensorboard, ")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        (
            "model: org/model",
            "model: {reference: org/model, quantization: 4bit}",
            1,
            "model.quantization: '4bit' (QLoRA) needs the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes",
        ),
        (
            "epochs: 1",
            "optimizer: paged_adamw_8bit",
            14,
            "train.optimizer: 'paged_adamw_8bit' needs the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes",
        ),
    ],
)
def test_bitsandbytes_is_missing(old, new, line, message, folder, capsys):
    path = folder / "mine.yaml"
    path.write_text(swap(old, new))
    code, _, err = validate(path, capsys=capsys)
    assert code == 2
    assert err.splitlines()[1] == f"  line {line}  {message}"


def test_all_problems_at_once_in_order(folder, capsys):
    path = folder / "mine.yaml"
    text = GOOD.replace("format: auto", "formt: auto").replace("gate: eaft", "gate: eatf")
    text = (
        text.replace("epochs: 1", "epochs: 1\n  steps: 2").replace("r: 16", "r: x").replace("perplexity", "perplxity")
    )
    path.write_text(text)
    code, _, err = validate(path, "train.seed=-1", "foo", capsys=capsys)
    assert code == 2
    starts = [line.split(":")[0] for line in err.splitlines()[1:-1]]
    assert starts == [
        "  line  5  data.formt",
        "  line  8  loss.gate",
        "  line 11  lora.r",
        "  line 15  train.steps",
        "  line 20  probes.general[0]",
        "  override foo  expected key.sub=value, such as train.steps=10",
        "  override train.seed=-1  train.seed",
    ]
    assert err.splitlines()[0] == f"{path} has 7 problems"
    assert err.splitlines()[-1].startswith(f"Nothing was loaded. `eaftdrope validate {path} train.seed=-1 foo`")


def test_a_file_is_looked_for_in_both_folders(folder, capsys):
    path = folder / "mine.yaml"
    path.write_text(swap("rows.jsonl", "row.jsonl"))
    _, _, err = validate(path, capsys=capsys)
    assert f"looked for in {folder} and {folder / 'elsewhere'})." in err


def test_the_recipe_itself_is_missing(folder, capsys):
    (folder / "mine.yaml").write_text(GOOD)
    code, _, err = validate(folder / "mien.yaml", capsys=capsys)
    assert code == 2
    assert err == (
        f"no recipe at {folder / 'mien.yaml'}. Did you mean `mine.yaml`? "
        "`eaftdrope recipes ls` lists the recipes that come with eaftdrope.\n"
    )
    code, _, err = validate(folder, capsys=capsys)
    assert (code, err) == (2, f"{folder} is a folder. Use the path of a recipe inside it.\n")


def test_not_utf8(folder, capsys):
    (folder / "mine.yaml").write_bytes(b"model: \xff\xfe")
    code, _, err = validate(folder / "mine.yaml", capsys=capsys)
    assert code == 2
    assert err == f"{folder / 'mine.yaml'} is not UTF-8 text (byte 7). A recipe is a YAML file.\n"
