"""The landscape a training accumulates is that of the full logits, however the rows are cut into batches; its file tells
every trained token once, also when the run was killed in between."""

import json

import pytest
import torch

from eaftdrope import EAFTTrainer, apply_eaft, gates, pop_metrics
from eaftdrope.loss import token_statistics
from eaftdrope.loss.definition import evaluate_gate
from eaftdrope.loss.gates import resolve_gate
from eaftdrope.loss.landscape import Landscape
from eaftdrope.trainer.callbacks.landscape import LandscapeFileCallback
from tests.loss.test_landscape import distance_to_a_border
from tests.trainer.callbacks.test_metrics import KillAt, Killed
from tests.trainer.processes import run_two
from tests.trainer.test_invariance import arguments
from tests.trainer.tiny import ragged_rows, tiny_model


def sure_model():
    """Its tokens are all over the landscape."""
    return tiny_model(scale=0.4)


def offline(gate="eaft", rows=8):
    """The landscape from every row's full logits in float64."""
    model, gate = sure_model().double(), resolve_gate(gate)
    found = []
    for row in ragged_rows(rows):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        stats = token_statistics(logits[labels != -100], labels[labels != -100], k=gate.topk)
        assert distance_to_a_border(stats) > 1e-5, "too near for float32"
        found.append(Landscape.of(stats, evaluate_gate(gate, stats)))
    return sum(found[1:], found[0])


def trained(folder, tokenizer, *, gate="eaft", callbacks=(), resume=None, **options):
    """A run that never changes its weights, and the lines of its file."""
    path = folder / "landscape.jsonl"
    trainer = EAFTTrainer(
        sure_model(),
        arguments(folder, **{"learning_rate": 0.0, **options}),
        train_dataset=ragged_rows(8),
        processing_class=tokenizer,
        gate=gate,
        callbacks=list(callbacks),
    )
    trainer.add_callback(LandscapeFileCallback(path, trainer.pop_landscape))
    trainer.train(resume_from_checkpoint=resume)
    return lines(path), trainer


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_equal(told, expected):
    """`told` is of float32, `expected` of float64."""
    expected = expected.to_dict()
    for key in ("density", "gate", "tokens", "conflicts", "entropy_width", "probability_width"):
        assert told[key] == expected[key], key
    for name, group in expected["groups"].items():
        assert told["groups"][name] == pytest.approx(group, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (1, 8), (3, 3)])
def test_equal_to_the_full_logits_however_the_rows_are_split(tmp_path, word_tokenizer, batch, accumulation):
    found, trainer = trained(
        tmp_path, word_tokenizer, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    (line,) = found
    expected = offline()
    assert (line["first_step"], line["step"]) == (1, 1)
    assert all(group["tokens"] > 5 for group in line["groups"].values()) and line["conflicts"] > 0
    assert_equal(line, expected)
    # and the same in the log, as numbers
    log = trainer.state.log_history[0]
    for name, value in expected.log_values().items():
        assert log[f"eaft/{name}"] == pytest.approx(value, rel=1e-5), name
    assert sum(log[f"eaft/gate_hist_{k:02d}"] for k in range(10)) == pytest.approx(1)


def test_equal_to_the_full_logits_with_packing(tmp_path, word_tokenizer):
    found, _ = trained(tmp_path, word_tokenizer, per_device_train_batch_size=8, packing=True, max_length=64)
    assert_equal(found[0], offline())


@pytest.mark.parametrize("gate", ["eaft-vocab", "dft", "none", gates.EAFT(alpha=2.0, divisor=3.0)])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_every_gate_and_backend(tmp_path, word_tokenizer, gate, backend):
    found, _ = trained(tmp_path, word_tokenizer, gate=gate, loss_backend=backend, per_device_train_batch_size=8)
    assert_equal(found[0], offline(gate))


def test_own_loops_get_the_numbers_too():
    model = apply_eaft(sure_model())
    model.train()
    row = ragged_rows(8)[7]
    model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
    metrics = pop_metrics(model)
    assert sum(metrics[f"eaft/gate_hist_{k:02d}"] for k in range(10)) == pytest.approx(1)
    assert metrics["eaft/high_entropy_share"] + metrics["eaft/low_entropy_share"] <= 1
    assert "eaft/high_entropy_loss" in metrics


def test_windows_end_at_checkpoints_and_about_twenty_times_a_run(tmp_path, word_tokenizer):
    found, _ = trained(
        tmp_path, word_tokenizer, max_steps=45, save_strategy="steps", save_steps=10, per_device_train_batch_size=2
    )
    steps = [line["step"] for line in found]
    assert steps == sorted({*range(3, 46, 3), 10, 20, 30, 40})
    assert [line["first_step"] for line in found] == [1, *(step + 1 for step in steps[:-1])]
    # four batches are an epoch
    tokens = offline().to_dict()["tokens"]
    assert sum(line["tokens"] for line in found if line["step"] <= 12) == 3 * tokens


def test_killed_and_resumed_equals_undisturbed(tmp_path, word_tokenizer):
    options = dict(max_steps=8, save_strategy="steps", save_steps=4, per_device_train_batch_size=2, learning_rate=0.01)
    whole, _ = trained(tmp_path / "a", word_tokenizer, **options)
    assert [line["step"] for line in whole] == list(range(1, 9))
    with pytest.raises(Killed):
        trained(tmp_path / "b", word_tokenizer, callbacks=[KillAt(7)], **options)
    path = tmp_path / "b" / "landscape.jsonl"
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5, 6]
    with open(path, "a") as file:
        file.write('{"step": 7, "fi')  # torn by the kill
    resumed, _ = trained(tmp_path / "b", word_tokenizer, resume=str(tmp_path / "b" / "checkpoint-4"), **options)
    assert resumed == whole


WORKER = """
import sys, json
from pathlib import Path
from tests.tiny_models import make_word_tokenizer
from tests.forked import end_together
from tests.trainer.callbacks.test_landscape import trained
trained(Path(sys.argv[1]), make_word_tokenizer(), per_device_train_batch_size=2, gradient_accumulation_steps=2)
end_together()
"""


@pytest.mark.slow
def test_over_two_processes(tmp_path):
    run_two(WORKER, tmp_path / "out", tmp_path / "unused")
    (line,) = lines(tmp_path / "out" / "landscape.jsonl")
    assert_equal(line, offline())
