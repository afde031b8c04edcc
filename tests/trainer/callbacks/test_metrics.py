"""The file of a killed and resumed run equals an undisturbed run's; disks that cannot be written are named."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from eaftdrope.errors import UserError
from eaftdrope.trainer.callbacks.metrics import MetricsFileCallback
from tests.tiny_models import SMALLEST, tiny_llama

VARIES = ("time", "train_runtime", "eval_runtime", "train_samples_per_second", "train_steps_per_second")


def _state(step, *, main=True):
    return TrainerState(global_step=step, epoch=step / 8, is_world_process_zero=main)


def _begin(callback, step, **kwargs):
    callback.on_train_begin(None, _state(step, **kwargs), TrainerControl())


def _log(callback, step, logs, **kwargs):
    callback.on_log(None, _state(step, **kwargs), TrainerControl(), logs=logs)


def _rows(path, without=()):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in without} for row in rows]


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def _train(folder, path, *, kill_at=None, resume=None):
    model = tiny_llama(**SMALLEST, vocab_size=32)
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (24, 6), generator=generator)]
    args = TrainingArguments(
        str(folder), max_steps=8, logging_steps=1, save_steps=4, eval_strategy="steps", eval_steps=2, report_to=[],
        use_cpu=True, per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows[:4])
    trainer.add_callback(MetricsFileCallback(path))
    if kill_at:
        trainer.add_callback(KillAt(kill_at))
    trainer.train(resume_from_checkpoint=resume)


def test_killed_and_resumed_equals_undisturbed(tmp_path):
    _train(tmp_path / "a", tmp_path / "a" / "metrics.jsonl")
    whole = _rows(tmp_path / "a" / "metrics.jsonl", VARIES)
    assert [row["step"] for row in whole] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 8]

    path = tmp_path / "b" / "metrics.jsonl"
    with pytest.raises(Killed):
        _train(tmp_path / "b", path, kill_at=7)
    assert [row["step"] for row in _rows(path)] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    with open(path, "a") as file:
        file.write('{"step": 7, "ep')  # torn by the kill
    _train(tmp_path / "b", path, resume=str(tmp_path / "b" / "checkpoint-4"))
    resumed = [
        {key: value for key, value in row.items() if key not in VARIES and not key.startswith("eval_s")}
        for row in _rows(path)
    ]
    whole = [{key: value for key, value in row.items() if not key.startswith("eval_s")} for row in whole]
    # The summary's train_loss averages over the steps of its own process.
    assert {**resumed.pop(), "train_loss": 0} == {**whole.pop(), "train_loss": 0}
    assert resumed == whole

    # Resumed after its last step, a run writes its summary again: it must not be there twice.
    _begin(MetricsFileCallback(path), 8)
    assert [row["step"] for row in _rows(path)] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]


def test_line_layout_and_numbers_without_a_json_form(tmp_path):
    path = tmp_path / "new" / "folder" / "metrics.jsonl"
    callback = MetricsFileCallback(path)
    _begin(callback, 0)
    _log(
        callback, 2, {"loss": math.nan, "a": math.inf, "b": np.float32(0.5), "c": torch.tensor(0.25), "d": 3, "e": "x"}
    )
    text = path.read_text()
    assert text.endswith("\n") and "NaN" not in text
    (row,) = _rows(path)
    assert list(row) == ["step", "epoch", "time", "loss", "a", "b", "c", "d", "e"]
    assert row["time"] > 1.6e9
    del row["time"]
    assert row == {"step": 2, "epoch": 0.25, "loss": None, "a": None, "b": 0.5, "c": 0.25, "d": 3, "e": "x"}


def test_a_new_run_starts_the_file_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("anything\n")
    callback = MetricsFileCallback(path)
    _begin(callback, 0)
    _log(callback, 1, {"loss": 1.0})
    assert [row["step"] for row in _rows(path)] == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    before = '{"step": 1}\n{"step": 3}\n'
    path.write_text(before)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("eaftdrope.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        _begin(MetricsFileCallback(path), 2)
    assert path.read_text() == before
    monkeypatch.undo()
    _begin(MetricsFileCallback(path), 2)
    assert path.read_text() == '{"step": 1}\n'


def test_a_foreign_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(UserError) as error:
        _begin(MetricsFileCallback(path), 2)
    assert str(error.value) == (
        f"{path}:2: not a line of training metrics, so the file cannot be continued. "
        "Move the file away and run the command again; the run then resumes with a new file."
    )


def test_other_processes_write_nothing(tmp_path):
    callback = MetricsFileCallback(tmp_path / "metrics.jsonl")
    _begin(callback, 0, main=False)
    _log(callback, 1, {"loss": 1.0}, main=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")  # every write to it fails with ENOSPC
    with pytest.raises(UserError) as error:
        _log(MetricsFileCallback(path), 1, {"loss": 1.0})
    assert str(error.value) == (
        f"cannot write {path}: the disk is full. Free some space and start the same command again; "
        "the run resumes from its last checkpoint."
    )


def test_an_unwritable_place_is_named_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "metrics.jsonl"
    with pytest.raises(UserError) as error:
        _begin(MetricsFileCallback(path), 0)
    assert str(error.value).startswith(f"cannot write the training metrics to {path}: ")
    assert str(error.value).endswith("Choose an output folder that can be written to.")
