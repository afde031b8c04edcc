"""Replay: rows that the model generates once, or rows of a file, mixed into those of a training at a given share."""

import io
import json
import random

import pytest
from rich.console import Console

from eaftdrope.errors import RecipeError, UserError
from eaftdrope.models import load_model
from eaftdrope.recipe import dump_recipe, load_recipe
from eaftdrope.run import replay
from eaftdrope.run.data import build_data
from eaftdrope.run.replay import choose_rows, find_replies, rows_wanted
from eaftdrope.run.settings import eaft_settings
from eaftdrope.run.train import run_recipe, show_plan
from tests.tiny_models import byte_tokenizer
from tests.tiny_run import make_project, metrics, save_rows

SHORT = ["probes.target=[]", "probes.general=[]", "train.steps=4", "lora.dropout=0.0"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    recipe = make_project(tmp_path_factory.mktemp("replay"))
    prompts = [{"prompt": f"Tell me about number {number}."} for number in range(10)]
    (recipe.parent / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return recipe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EAFTDROPE_CACHE", str(tmp_path / "cache"))
    # the random model rarely ends a reply: most of its tokens do here
    monkeypatch.setattr(replay, "stop_token_ids", lambda model, tokenizer: [])
    monkeypatch.setattr(replay, "_PART", 4)
    return tmp_path / "cache"


def recipe_of(project, *overrides, share=0.2):
    section = f"data.replay={{share: {share}, prompts: prompts.jsonl, max_tokens: 5}}"
    return load_recipe(project, [section, *SHORT, *overrides])


def generated(settings, rows):
    model = load_model(settings.model.reference).eval()
    replies = find_replies(settings, byte_tokenizer())
    steps = []
    file = replies.generate(
        model, byte_tokenizer(), rows, batch_tokens=512, progress=lambda done, total: steps.append((done, total))
    )
    return file, steps


def test_the_number_of_rows_and_their_choice():
    assert rows_wanted(0.2, 24) == 6 and rows_wanted(0.5, 10) == 10 and rows_wanted(0.01, 3) == 1
    chosen = choose_rows(5, 12, 7)
    assert sorted(chosen)[::2] == sorted(chosen)[::2] and len(chosen) == 12 and chosen == choose_rows(5, 12, 7)
    counts = [chosen.count(row) for row in range(5)]
    assert sorted(counts) == [2, 2, 2, 3, 3]
    assert any(choose_rows(50, 10, seed) != choose_rows(50, 10, 0) for seed in (1, 2))


def test_the_plan_counts_rows_that_are_still_to_be_generated(project, cache):
    recipe = recipe_of(project)
    data = build_data(eaft_settings(recipe), byte_tokenizer())
    assert len(data.train) == 24 and data.replay.rows == 6
    assert data.stats.rows == 30 and data.stats.tokens > sum(map(len, data.train["input_ids"]))
    console = Console(file=io.StringIO(), width=200)
    show_plan(recipe, console)
    line = next(line for line in console.file.getvalue().splitlines() if line.startswith("replay"))
    assert "6 of the rows, which the model generates first: 6 replies are missing, at most 30 tokens" in line
    assert not cache.exists(), "a plan writes nothing"


def test_replies_do_not_depend_on_where_a_start_was_killed(project, cache):
    settings = eaft_settings(recipe_of(project))
    file, steps = generated(settings, 10)
    text = file.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 10 and steps[-1] == (10, 10)
    asked = [row["messages"][0]["content"] for row in rows]
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)
    order = random.Random(f"{settings.data_seed}:replay:0").sample(range(10), 10)
    assert asked == [f"Tell me about number {number}." for number in order]
    # killed after its first part, which stays as it is
    file.unlink()
    for part in sorted(file.parent.glob("0*.json"))[1:]:
        part.unlink()
    assert find_replies(settings, byte_tokenizer()).cached(10) == 4
    assert generated(settings, 10)[0].read_text() == text
    # fewer and more rows begin with the same ones; beyond the prompts, each has another reply
    assert generated(settings, 3)[0].read_text().splitlines() == text.splitlines()[:3]
    longer = generated(settings, 14)[0].read_text().splitlines()
    assert longer[:10] == text.splitlines() and len(set(longer)) == 14


def test_the_cache_is_by_model_prompts_length_and_seed(project, tmp_path):
    def folder(*overrides):
        return find_replies(eaft_settings(recipe_of(project, *overrides)), byte_tokenizer()).folder

    (project.parent / "others.jsonl").write_text('{"prompt": "Hello"}\n')
    folders = [
        folder(),
        folder("data.replay.seed=9"),
        folder("data.replay.max_tokens=6"),
        folder("data.replay.prompts=others.jsonl"),
        find_replies(eaft_settings(recipe_of(project)), byte_tokenizer("<|endoftext|>")).folder,
    ]
    assert len(set(folders)) == len(folders) and folder("train.learning_rate=0.5") == folders[0]
    other = make_project(tmp_path / "other", tied=False)
    (other.parent / "prompts.jsonl").write_text((project.parent / "prompts.jsonl").read_text())
    assert find_replies(eaft_settings(recipe_of(other)), byte_tokenizer()).folder not in folders


def test_rows_are_mixed_and_masked_like_the_others(project):
    recipe = recipe_of(project, "data.held_out=0.25")
    settings = eaft_settings(recipe)
    before = build_data(settings, byte_tokenizer())
    file, _ = generated(settings, before.replay.rows)
    data = build_data(settings, byte_tokenizer())
    count = before.replay.rows
    assert data.replay.replies is None and len(data.train) == len(before.train) + count
    assert abs(count / len(data.train) - 0.2) < 0.02
    # none of them is held out
    assert data.held_out["origin"][:] == before.held_out["origin"][:]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row, encoded in zip(rows, data.train.select(range(len(before.train), len(data.train)))):
        answer = byte_tokenizer().decode([label for label in encoded["labels"] if label != -100])
        assert answer == f"{row['messages'][1]['content']}<|im_end|>"
    assert data.report.by_source["replay by the model"].rows == count
    assert data.stats.rows == len(data.train)


def test_rows_of_a_file(project):
    save_rows(project.parent / "old.jsonl", 4, start=100)
    recipe = load_recipe(project, ["data.replay={from: old.jsonl, share: 0.25}", *SHORT])
    data = build_data(eaft_settings(recipe), byte_tokenizer())
    assert len(data.train) == 32 and data.replay.rows == 8
    origins = [origin for origin in data.train["origin"][:] if "old.jsonl" in origin]
    assert sorted(origins.count(origin) for origin in set(origins)) == [2, 2, 2, 2]
    again = load_recipe(project, ["data.replay={from: old.jsonl, share: 0.25}", *SHORT])
    assert "from: " in dump_recipe(again) and again == recipe


@pytest.mark.parametrize("weighted", ["rows", "replay", "exempt"])
def test_weights_beside_replay(project, weighted):
    """Whichever part has weights of tokens, the other has a weight of 1, and an exempt string is one in both."""
    for name, start, part in (("new", 0, "rows"), ("old", 100, "replay")):
        path = save_rows(project.parent / f"{name}_{weighted}.jsonl", 4, start=start)
        if weighted == part:
            rows = [json.loads(line) | {"weight": 0.5} for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = f"data.replay={{from: old_{weighted}.jsonl, share: 0.5}}"
    exempt = ["loss.exempt=['<|im_end|>']"] if weighted == "exempt" else []
    recipe = load_recipe(project, [f"data.train=new_{weighted}.jsonl", section, *exempt, *SHORT])
    data = build_data(eaft_settings(recipe), byte_tokenizer())
    assert len(data.train) == 8 and data.replay.rows == 4
    for number, row in enumerate(data.train):
        trained = {value for value, label in zip(row["token_weights"], row["labels"], strict=True) if label != -100}
        half = weighted == ("rows" if number < 4 else "replay")
        assert trained == ({0.5} if half else {1.0, -1.0} if exempt else {1.0}), (number, trained)


def test_the_preview_shows_what_is_stored(project, capsys):
    from eaftdrope.cli import main

    arguments = ["preview", str(project), "data.replay={prompts: prompts.jsonl, max_tokens: 5}", "--rows", "31"]
    for expected in ("no replies are stored yet", "chosen from the last source"):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and "replay: 20% of the training rows" in shown and expected in shown
        file, _ = generated(eaft_settings(recipe_of(project)), 6)
    assert f"{file}:1" in shown


def test_a_run_generates_once_and_another_uses_it(project, tmp_path, monkeypatch):
    def run(name):
        recipe = recipe_of(project, f"output.dir={tmp_path / name}")
        console = Console(file=io.StringIO(), width=200)
        run_recipe(recipe, console, command="eaftdrope train")
        return console.file.getvalue()

    from eaftdrope.report import page

    monkeypatch.setattr(page, "try_write_report", lambda folder, console: None)
    assert "replay 6/6" in run("first")

    def unwanted(*args, **options):
        raise AssertionError("generated again")

    monkeypatch.setattr(replay, "generate_ids", unwanted)
    shown = run("second")
    assert "replay        6 of the rows" in shown and "30 rows" in shown
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")
    recorded = json.loads((tmp_path / "first" / "run.json").read_text())
    assert recorded["data"]["rows"] == 30 and recorded["recipe"]["data"]["replay"]["from"] == "model"


def test_replies_that_do_not_end_are_left_out(project, monkeypatch):
    settings = eaft_settings(recipe_of(project))
    monkeypatch.setattr(replay, "stop_token_ids", lambda model, tokenizer: [1])
    made = iter(range(1000))
    monkeypatch.setattr(
        replay, "generate_ids", lambda m, t, prompts, **o: [[70] * (1 + next(made) % 5) for _ in prompts]
    )
    rows = [json.loads(line) for line in generated(settings, 6)[0].read_text().splitlines()]
    assert [len(row["messages"][1]["content"]) for row in rows] == [1, 2, 3, 4, 1, 2]
    monkeypatch.setattr(replay, "generate_ids", lambda m, t, prompts, **o: [[70] * 5 for _ in prompts])
    with pytest.raises(UserError, match=r"of \d+ replies of the model only 0 end within max_tokens: 5. Raise"):
        generated(eaft_settings(recipe_of(project, "data.replay.seed=3")), 6)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{}", "data.replay: the model replies to prompts, and there are none. Set data.replay.prompts"),
        ("{prompts: promts.jsonl}", "Did you mean `prompts.jsonl`"),
        ("{from: rows.jsonl, prompts: prompts.jsonl}", "rows of a file need no prompts"),
        ("{from: rowz.jsonl}", "no such file: 'rowz.jsonl'"),
        ("{share: 1.0, prompts: prompts.jsonl}", "data.replay.share: must be less than 1"),
        ("{form: model, prompts: prompts.jsonl}", "Did you mean `from`"),
    ],
)
def test_sections_that_cannot_work(project, section, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(project, [f"data.replay={section}"])
    assert message in str(error.value)
