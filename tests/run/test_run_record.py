"""What run.json keeps of a run's beginning and end: a change since, damage, and what a finished run lacks."""

import json
import shutil

import pytest

from eaftdrope.errors import UserError
from eaftdrope.run.folder import RunFolder
from tests.run.test_folder import DATA, VERSIONS, WAYS_OUT, begun, checkpoint, complete, recipe, refused
from tests.tiny_run import hashes

# ---- what a run was begun with ----

ROWS, MODEL = "the training rows", "the base model"


def test_what_changed_since_the_start_is_named(tmp_path):
    folder = RunFolder(tmp_path, recipe())
    folder.begin("model: org/model\n", VERSIONS, DATA, {ROWS: "a", MODEL: "b", "the chat template": "c"})
    RunFolder(tmp_path, recipe()).begin("", VERSIONS, DATA, {ROWS: "a", MODEL: "b", "the chat template": "c"})
    before = hashes(tmp_path)
    with pytest.raises(UserError) as error:
        RunFolder(tmp_path, recipe()).begin("", VERSIONS, DATA, {ROWS: "x", MODEL: "b", "the chat template": "y"})
    assert str(error.value) == (
        f"{tmp_path} holds an unfinished run, and the training rows and the chat template changed since its start. Restore "
        f"the former state and run the same command again. {WAYS_OUT}"
    )
    assert hashes(tmp_path) == before
    RunFolder(tmp_path, recipe(), overwrite=True).begin("", VERSIONS, DATA, {ROWS: "x"})


def test_a_run_of_an_older_version_is_resumed_with_a_note(tmp_path):
    begun(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    del run["fingerprints"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    folder = RunFolder(tmp_path, recipe())
    folder.begin("", VERSIONS, DATA, {ROWS: "a"})
    assert folder.pop_notes() == [
        f"{tmp_path} was begun by an older version, which stored no fingerprints: whether data and base model are as they "
        "were at its start cannot be checked"
    ]
    assert json.loads((tmp_path / "run.json").read_text())["fingerprints"] == {ROWS: "a"}
    with pytest.raises(UserError, match="the training rows changed since its start"):
        RunFolder(tmp_path, recipe()).begin("", VERSIONS, DATA, {ROWS: "b"})


# ---- a damaged run.json ----


@pytest.fixture
def recipe_yaml(tmp_path):
    """The text of a recipe that `load_recipe` reads, and the recipe."""
    from eaftdrope.recipe import load_recipe
    from eaftdrope.recipe.dump import dump_recipe

    file = tmp_path / "first.yaml"
    file.write_text(f"model: org/model\ndata: {{train: org/rows}}\noutput: {{dir: {tmp_path / 'run'}}}\n")
    loaded = load_recipe(file)
    return dump_recipe(loaded), loaded


DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "data": lambda text: json.dumps({**json.loads(text), "data": {}}),
    "recipe": lambda text: json.dumps({**json.loads(text), "recipe": []}),
    "status": lambda text: json.dumps({**json.loads(text), "status": "?"}),
    "deleted": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_json_is_rebuilt_from_recipe_yaml(tmp_path, recipe_yaml, damage):
    text, loaded = recipe_yaml
    folder = RunFolder(tmp_path / "run", loaded)
    folder.begin(text, VERSIONS, DATA, {ROWS: "a"})
    kept = checkpoint(folder, 3)
    file = folder.path / "run.json"
    if damage == "deleted":
        file.unlink()
    else:
        file.write_text(DAMAGES[damage](file.read_text()))
    again = RunFolder(folder.path, loaded)
    assert again.pop_notes() == [
        f"{file} is damaged or missing and was rebuilt from recipe.yaml: whether data and base model are those that the run "
        "began with cannot be checked"
    ]
    again.begin(text, VERSIONS, DATA, {ROWS: "b"})
    assert again.resume_point().checkpoint == kept
    assert RunFolder(folder.path, loaded).pop_notes() == []


def test_a_damaged_run_json_of_another_recipe(tmp_path, recipe_yaml):
    text, loaded = recipe_yaml
    RunFolder(tmp_path / "run", loaded).begin(text, VERSIONS, DATA)
    (tmp_path / "run" / "run.json").write_text("")
    other = loaded.model_copy(update={"train": loaded.train.model_copy(update={"steps": 9})})
    assert "holds an unfinished run of another recipe (different: train.steps: " in refused(tmp_path / "run", other)
    again = RunFolder(tmp_path / "run", other, overwrite=True)
    again.begin("", VERSIONS, DATA)
    assert again.pop_notes() == []


def test_a_damaged_run_json_without_a_recipe_beside_it(tmp_path, recipe_yaml):
    _, loaded = recipe_yaml
    folder = RunFolder(tmp_path / "run", loaded)
    folder.begin("model: [", VERSIONS, DATA)
    checkpoint(folder, 3)
    (folder.path / "run.json").write_text("{")
    assert refused(folder.path, loaded) == (
        f"{folder.path / 'run.json'} is damaged or missing, and so is recipe.yaml beside it, from which it could be rebuilt. "
        f"Put back a copy of either and run the same command again. {WAYS_OUT}"
    )
    RunFolder(folder.path, loaded, overwrite=True).begin("", VERSIONS, DATA)
    assert {path.name for path in folder.path.iterdir()} == {"run.json", "recipe.yaml"}


def test_a_damaged_run_json_of_a_stage_with_a_later_one(tmp_path):
    """The later stage holds what was made of its result: nothing is made again, and the file is named."""
    from eaftdrope.recipe import load_recipe
    from eaftdrope.recipe.dump import dump_recipe
    from eaftdrope.run.stages.chain import open_stages

    (tmp_path / "text.jsonl").write_text('{"text": "The rain fell."}\n')
    file, top = tmp_path / "staged.yaml", tmp_path / "run"
    data = "recalibrate: {tokens: 64, data: {train: text.jsonl, max_length: 64}}"
    file.write_text(f"model: org/model\nstages: [drope, recalibrate]\n{data}\noutput: {{dir: {top}}}\n")
    loaded = load_recipe(file)
    drope, recalibrate = open_stages(loaded)
    made = tmp_path / "made"
    made.mkdir()
    top.mkdir()
    drope.folder.take(made, dump_recipe(drope.record), VERSIONS)
    assert drope.folder.finished
    recalibrate.folder.begin(dump_recipe(recalibrate.record), VERSIONS, DATA)
    (top / "drope" / "run.json").write_text("")
    with pytest.raises(UserError) as error:
        open_stages(loaded)
    assert str(error.value) == (
        f"{top / 'drope' / 'run.json'} is damaged or missing, and {top / 'recalibrate'} holds a run on the result of the "
        f"stage drope. Put back a copy of that file and run the same command again. {WAYS_OUT}"
    )
    assert [stage.folder.begun for stage in open_stages(loaded, overwrite=True)] == [True, True]


# ---- a finished run that lacks something ----


def test_a_finished_run_that_lacks_its_report_is_completed(tmp_path):
    folder = begun(tmp_path)
    complete(folder)
    (tmp_path / "report.html").unlink()
    again = RunFolder(tmp_path, recipe())
    assert (again.finished, again.trained, again.missing) == (True, True, ["report.html"])
    uploaded = RunFolder(tmp_path, recipe(), uploads="me/tuned")
    assert uploaded.missing == ["report.html", "upload to me/tuned"]
    complete(uploaded)
    assert "holds a finished run" in refused(tmp_path)
    with pytest.raises(UserError, match="holds a finished run"):
        RunFolder(tmp_path, recipe(), uploads="me/tuned")


def test_a_finished_run_that_lost_its_weights_is_made_again_from_its_last_checkpoint(tmp_path):
    folder = begun(tmp_path)
    kept = checkpoint(folder, 3)
    complete(folder)
    assert "holds a finished run" in refused(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    again = RunFolder(tmp_path, recipe())
    assert again.pop_notes() == [f"{tmp_path} no longer has weights: made again from the last checkpoint"]
    assert (again.finished, again.trained, again.resume_point().checkpoint) == (False, False, kept)
    shutil.rmtree(kept)
    assert "holds a finished run" in refused(tmp_path)
    folder.note_trained({})
    assert refused(tmp_path) == (
        f"{tmp_path} no longer has weights, nor a checkpoint to make it from again. {WAYS_OUT}"
    )
