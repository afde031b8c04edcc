"""Whose folder it is, and what a second start may do with it."""

import json
import os
import shutil
import subprocess

import pytest

from eaftdrope.errors import UserError
from eaftdrope.evaluate import Score
from eaftdrope.recipe import Recipe
from eaftdrope.run.folder import RunFolder
from eaftdrope.run.record import DataStats
from tests.tiny_run import hashes

VERSIONS = {"eaftdrope": "0.1.0"}
DATA = DataStats(rows=24, tokens=1271, trained_tokens=355)
WAYS_OUT = (
    "Nothing was changed: choose another folder with output.dir=..., or pass --overwrite to delete it and start over."
)


def recipe(**sections):
    output = sections.pop("output", {"dir": "unused"})
    return Recipe.model_validate({"model": "org/model", "data": {"train": "org/rows"}, "output": output, **sections})


def begun(path, which=None, data=DATA):
    folder = RunFolder(path, which or recipe())
    folder.begin("model: org/model\n", VERSIONS, data)
    return folder


def refused(path, which=None, *, overwrite=False):
    """The text; and nothing was touched."""
    before = hashes(path)
    with pytest.raises(UserError) as error:
        RunFolder(path, which or recipe(), overwrite=overwrite)
    assert hashes(path) == before
    return str(error.value)


def checkpoint(folder, step, optimizer="optimizer.pt"):
    """A sealed checkpoint."""
    path = folder.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / optimizer).write_text("moments")
    (path / "trainer_state.json").write_text('{"global_step": 1}')
    folder.sealed.seal(step)
    return path


def complete(folder):
    """What a trained run leaves for `finish` to record."""
    for name in ("README.md", "report.html", "model.safetensors"):
        (folder.path / name).write_text("written")
    folder.note_trained({"command": "eaftdrope train r.yaml"})
    folder.finish()


def test_looking_writes_nothing(tmp_path):
    RunFolder(tmp_path / "a" / "run", recipe())
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_its_beginning_to_its_end(tmp_path):
    folder = begun(tmp_path / "a" / "run")
    assert (folder.path / "recipe.yaml").read_text() == "model: org/model\n"
    run = json.loads((folder.path / "run.json").read_text())
    assert (run["status"], run["versions"], run["processes"]) == ("running", VERSIONS, 1)
    assert run["data"] == {"rows": 24, "tokens": 1271, "trained_tokens": 355, "truncated": 0, "skipped": 0}
    assert "output" not in run["recipe"]
    begun(folder.path)  # an unfinished one is resumed
    complete(folder)
    finished = {**run, "status": "finished", "about": {"command": "eaftdrope train r.yaml"}}
    assert json.loads((folder.path / "run.json").read_text()) == finished
    assert refused(folder.path) == f"{folder.path} holds a finished run. {WAYS_OUT}"


def test_where_results_go_is_not_part_of_the_run(tmp_path):
    begun(tmp_path)
    begun(tmp_path, recipe(output={"dir": "elsewhere", "merge": True}))


def test_another_recipe_is_refused_by_its_keys(tmp_path):
    begun(tmp_path, recipe(train={"steps": 5, "learning_rate": 0.1}, lora={"r": 4}))
    other = recipe(train={"steps": 6, "learning_rate": 0.1})
    assert refused(tmp_path, other) == (
        f"{tmp_path} holds an unfinished run of another recipe (different: lora.r: 4 then, null now; lora.alpha: 8.0 then, "
        'null now; lora.dropout: 0.0 then, null now; lora.target_modules: "all-linear" then, null now; '
        f"lora.modules_to_save: [] then, null now; lora.use_rslora: false then, null now; ...). {WAYS_OUT}"
    )
    other = recipe(train={"steps": 5, "learning_rate": 0.2}, lora={"r": 4})
    assert "(different: train.learning_rate: 0.1 then, 0.2 now)" in refused(tmp_path, other)


def test_keys_that_decide_nothing_of_what_is_trained_may_change(tmp_path):
    free = {"save_every": 7, "keep_checkpoints": 3, "log_every": 2}
    begun(tmp_path, recipe(train={"steps": 5}))
    folder = begun(tmp_path, recipe(train={"steps": 5, **free}))
    train = json.loads((folder.path / "run.json").read_text())["recipe"]["train"]
    assert {key: train[key] for key in free} == free


def test_a_run_may_be_lengthened(tmp_path):
    """Also a finished one, from its last checkpoint; a shorter one is another recipe."""
    begun(tmp_path, recipe(train={"steps": 5}))
    assert RunFolder(tmp_path, recipe(train={"steps": 8})).pop_notes() == [
        f"{tmp_path}: train.steps was 5 and is 8: continued, with the learning-rate schedule of a run of that length"
    ]
    assert "(different: train.steps: 5 then, 4 now)" in refused(tmp_path, recipe(train={"steps": 4}))
    assert "(different: train.steps: 5 then, null now; train.epochs" in refused(tmp_path, recipe(train={"epochs": 3}))
    folder = begun(tmp_path, recipe(train={"steps": 5}))
    complete(folder)
    assert refused(tmp_path, recipe(train={"steps": 8})) == (
        f"{tmp_path} holds a finished run without a checkpoint to continue from. {WAYS_OUT}"
    )
    checkpoint(folder, 5)
    longer = RunFolder(tmp_path, recipe(train={"steps": 8}))
    assert not longer.finished and longer.resume_point().checkpoint.name == "checkpoint-5"


def test_another_number_of_processes_needs_steps_of_the_same_rows(tmp_path, monkeypatch):
    begun(tmp_path, recipe(train={"batch_size": 4, "accumulation": 2}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(tmp_path, recipe(train={"batch_size": 4, "accumulation": 2})) == (
        f"{tmp_path} holds an unfinished run on 1 processes with 8 rows per step (batch_size 4, accumulation 2), and this "
        "run has 2 with 16: its steps would have other rows. Set train.accumulation=1 to resume it. " + WAYS_OUT
    )
    assert "train.accumulation" not in refused(tmp_path, recipe(train={"batch_size": 3, "accumulation": 2}))
    RunFolder(tmp_path, recipe(train={"batch_size": 4, "accumulation": 1}))
    monkeypatch.setenv("WORLD_SIZE", "1")
    RunFolder(tmp_path, recipe(train={"batch_size": 2, "accumulation": 4}))


def test_a_gate_that_compares_tokens_needs_its_batches(tmp_path, monkeypatch):
    begun(tmp_path, recipe(loss={"gate": "talr"}, train={"accumulation": 2}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(tmp_path, recipe(loss={"gate": "talr"}, train={"accumulation": 1})).startswith(
        f"{tmp_path} holds an unfinished run of another recipe (different: train.accumulation: 2 then, 1 now)"
    )
    assert "the gate talr compares the tokens of a batch with each other" in refused(
        tmp_path, recipe(loss={"gate": "talr"}, train={"accumulation": 2})
    )


@pytest.mark.parametrize(
    ("file", "engine", "reason"),
    [
        ("optimizer.bin", {}, "by another engine (FSDP; now one that replicates the weights)"),
        (
            "optimizer.pt",
            {"ACCELERATE_USE_FSDP": "true"},
            "by another engine (one that replicates the weights; now FSDP)",
        ),
        ("optimizer.bin", {"ACCELERATE_USE_FSDP": "true"}, None),
        ("optimizer.pt", {}, None),
        (
            "global_step5",
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "by DeepSpeed, which loads it on the same number of processes only",
        ),
    ],
)
def test_a_checkpoint_of_another_engine_is_refused(tmp_path, monkeypatch, file, engine, reason):
    folder = begun(tmp_path, recipe(train={"accumulation": 2}))
    checkpoint(folder, 5, file)
    for name, value in {"WORLD_SIZE": "2", **engine}.items():
        monkeypatch.setenv(name, value)
    now = recipe(train={"accumulation": 1})
    if reason is None:
        RunFolder(tmp_path, now)
    else:
        assert refused(tmp_path, now) == (
            f"{tmp_path} holds an unfinished run whose checkpoint-5 was written {reason}"
            f"{', with other files' if 'another' in reason else ''}. {WAYS_OUT}"
        )


def test_other_data_are_refused(tmp_path):
    begun(tmp_path)
    before = hashes(tmp_path)
    with pytest.raises(UserError) as error:
        begun(tmp_path, data=DataStats(rows=25, tokens=1300, trained_tokens=360))
    assert str(error.value) == (
        f"{tmp_path} holds an unfinished run on other data: 24 rows with 1,271 tokens, 355 of them trained then, 25 rows "
        f"with 1,300 tokens, 360 of them trained now. {WAYS_OUT}"
    )
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("thesis.txt", "years of work"),
        ("run.json", '{"status": "finished", "of": "another program"}'),
        ("run.json", '["a list"]'),
        ("run.json", "not json"),
        ("checkpoints/checkpoint-2/weights", "somebody's"),
        (".recipe.yaml.partial", "model: org/model"),
    ],
)
def test_a_strangers_folder_is_never_touched(tmp_path, name, text, overwrite):
    """--overwrite deletes runs of eaftdrope and nothing else."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    assert refused(tmp_path, overwrite=overwrite) == (
        f"{tmp_path} is not empty and does not contain an eaftdrope run (no run.json). Nothing was changed: choose another "
        "folder with output.dir=..."
    )


def test_what_a_start_leaves_that_was_killed_at_once_is_no_stranger(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".run.json.partial").write_text('{"stat')
    assert begun(tmp_path).last_checkpoint() is None


def test_overwrite_deletes_when_the_run_begins(tmp_path):
    old = begun(tmp_path, recipe(train={"steps": 5}))
    checkpoint(old, 5)
    old.save_scores("before", [Score("perplexity", "general", "perplexity", 9.5, None, 10, "lower")])
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    (tmp_path / "link").symlink_to(elsewhere)
    before = hashes(tmp_path)
    new = RunFolder(tmp_path, recipe(), overwrite=True)
    assert hashes(tmp_path) == before
    new.begin("model: org/model\n", VERSIONS, DATA)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "recipe.yaml"}
    assert new.last_checkpoint() is None
    assert new.load_scores("before") is None
    assert (elsewhere / "kept").read_text() == "kept"


def test_a_deletion_that_was_cut_short_leaves_a_run(tmp_path, monkeypatch):
    """Killed while it deletes, the folder still is a run's: --overwrite works again."""
    old = begun(tmp_path)
    for step in (2, 4):
        checkpoint(old, step)
    complete(old)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path, recipe(), overwrite=True).begin("", VERSIONS, DATA)
    monkeypatch.undo()
    assert RunFolder(tmp_path, recipe()).begun
    RunFolder(tmp_path, recipe(), overwrite=True).begin("", VERSIONS, DATA)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "recipe.yaml"}


def test_scores(tmp_path):
    folder = begun(tmp_path)
    scores = [Score("held_out_loss", "target", "loss", 1.25, 0.5, 10, "lower")]
    assert folder.load_scores("before") is None
    folder.save_scores("before", scores)
    assert folder.load_scores("before") == scores
    assert folder.load_scores("after") is None


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        RunFolder(tmp_path / "file" / "run", recipe())
    assert str(error.value) == (
        f"{tmp_path / 'file' / 'run'} cannot be created: {tmp_path / 'file'} is a file. Choose another folder with "
        "output.dir=..."
    )


def test_a_folder_that_can_not_be_written_to(tmp_path):
    """Root may write anywhere but on a read-only disk."""
    closed = tmp_path / "closed"
    closed.mkdir()
    if os.geteuid() == 0:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", closed], capture_output=True).returncode:
            pytest.skip("root, and no disk can be mounted: nothing is unwritable here")
    else:
        closed.chmod(0o555)
    try:
        with pytest.raises(UserError) as error:
            RunFolder(closed / "a" / "run", recipe())
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", closed], check=True)
    assert str(error.value) == (
        f"{closed / 'a' / 'run'} cannot be written to: no permission to write in {closed}. Choose another folder with "
        "output.dir=..., or change its permissions."
    )


def test_keys_that_an_older_version_did_not_have_are_their_defaults(tmp_path):
    begun(tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    run = json.loads(file.read_text())
    del run["recipe"]["probes"]["batch_tokens"], run["recipe"]["data"]["train"][0]["weight"]
    file.write_text(json.dumps(run))
    RunFolder(tmp_path / "run", recipe())
    text = refused(tmp_path / "run", recipe(probes={"batch_tokens": 64}))
    assert "(different: probes.batch_tokens: 2048 then, 64 now)" in text


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "link",
            "{path} is a link to {target}, which does not exist. Create that folder, or choose another one with "
            "output.dir=...",
        ),
        ("a" * 300, "{path} cannot be created (File name too long). Choose another folder with output.dir=..."),
        ("a\0b", "{path} cannot be created (embedded null byte). Choose another folder with output.dir=..."),
        ("/proc/x", "/proc/x cannot be created (No such file or directory). Choose another folder with output.dir=..."),
    ],
)
def test_a_place_where_no_folder_can_be(tmp_path, path, text):
    from rich.console import Console

    from eaftdrope.run.train import run_recipe

    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
    where = tmp_path / path
    with pytest.raises(UserError) as error:
        run_recipe(recipe(output={"dir": str(where)}), Console(quiet=True), command="")
    assert str(error.value) == text.format(path=where, target=tmp_path / "nowhere" / "at all")
