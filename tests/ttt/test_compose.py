"""TTT under what trains a model: labels, EAFT's gate, stock Trainer, EAFTTrainer, a checkpoint, two processes."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from eaftdrope import EAFTTrainer, apply_eaft, eaft_loss, remove_eaft, remove_ttt
from eaftdrope.ttt import is_ttt, load_ttt, sequence_nll
from tests.trainer.processes import run_two
from tests.trainer.test_invariance import KeepGradients, arguments, assert_same
from tests.ttt.tiny import LENGTH, assert_same_gradients, gradients, random_ids, stock_model, tiny

# tokens of a prompt are read and learned, and do not count
PROMPT = 4


def batch():
    """Two rows, the second shorter, with a masked prompt."""
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def expected_loss(model, gate):
    """The gated loss by its definition on the logits of a model that learns."""
    inputs = batch()
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return eaft_loss(logits[:, :-1], inputs["labels"][:, 1:], gate)


def test_labels_mask_the_outer_loss_only():
    model = tiny(dtype=torch.float32)
    inputs = batch()
    found = model(**inputs)
    kept = inputs["labels"][:, 1:] != -100
    nll = sequence_nll(model, inputs["input_ids"], inputs["attention_mask"])
    assert found.loss.item() == pytest.approx(nll[kept].mean().item(), rel=1e-5)
    expected = gradients(model, expected_loss(model, "none"))
    assert_same_gradients(gradients(model, model(**inputs).loss), expected, 1e-4)


def test_the_count_of_an_accumulated_batch_divides_the_loss():
    model, inputs = tiny(dtype=torch.float32), batch()
    count = (inputs["labels"][:, 1:] != -100).sum()
    whole = model(**inputs).loss
    assert model(**inputs, num_items_in_batch=2 * count).loss.item() == pytest.approx(whole.item() / 2, rel=1e-6)


@pytest.mark.parametrize("horizon", [1, None])
@pytest.mark.parametrize("gate", ["none", "eaft"])
def test_eaft_on_top_is_its_definition(gate, horizon):
    model = tiny(horizon=horizon)
    expected_value = expected_loss(model, gate)
    expected = gradients(model, expected_value)
    apply_eaft(model, gate)
    model.train()
    found = model(**batch()).loss
    assert abs(found.item() - expected_value.item()) < 1e-12
    assert_same_gradients(gradients(model, found), expected, 1e-10)
    model.eval()
    plain = model(**batch())
    assert abs(plain.loss.item() - expected_loss(model, "none").item()) < 1e-12 and plain.logits is not None


@pytest.mark.parametrize("first", ["eaft", "ttt"])
def test_eaft_and_ttt_are_removed_in_any_order(first):
    model, ids = apply_eaft(tiny()), random_ids()
    for remove in (remove_eaft, remove_ttt) if first == "eaft" else (remove_ttt, remove_eaft):
        remove(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock_model()(ids).logits)
    assert not is_ttt(model) and "forward" not in vars(model)


# Trainers


def rows(count=8):
    """Rows of several lengths, most of them longer than a chunk."""
    found = []
    for index, row in enumerate(random_ids(count, seed=3).tolist()):
        row = row[: LENGTH - 2 * index]
        found.append({"input_ids": row, "labels": [-100] * PROMPT + row[PROMPT:]})
    return Dataset.from_list(found)


def stock_trainer(folder, model, steps, **options):
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
        **{"save_strategy": "no", **options},
    )
    collate = DataCollatorForLanguageModeling(pad_token_id=2)
    return Trainer(model, settings, train_dataset=rows(), data_collator=collate)


def parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_plain_trainer_trains_everything(tmp_path):
    model = tiny(dtype=torch.float32, horizon=1)
    before = parameters(model)
    trainer = stock_trainer(tmp_path, model, 2)
    trainer.train()
    assert moved(before, parameters(model)) == before.keys()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_eafttrainer_trains_with_its_gate(tmp_path, word_tokenizer):
    keep, model = KeepGradients(), tiny(horizon=1)
    before = parameters(model)
    trainer = EAFTTrainer(
        model,
        arguments(tmp_path, max_steps=2, per_device_train_batch_size=8, gate="eaft", remove_unused_columns=False),
        train_dataset=rows(),
        processing_class=word_tokenizer,
        callbacks=[keep],
    )
    trainer.train()
    assert moved(before, parameters(model)) == before.keys()
    # the first step's gradient is that of the definition, row by row
    fresh = tiny(horizon=1)
    logits, labels = [], []
    for row in rows():
        logits.append(fresh(torch.tensor([row["input_ids"]])).logits[0, :-1])
        labels.append(torch.tensor(row["labels"][1:]))
    expected = gradients(fresh, eaft_loss(torch.cat(logits), torch.cat(labels), "eaft"))
    assert_same(keep.gradients, expected, 1e-9)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = tiny(dtype=torch.float32, horizon=1)
    stock_trainer(tmp_path / "whole", whole, 4).train()
    part = tiny(dtype=torch.float32, horizon=1)
    stock_trainer(tmp_path / "part", part, 2, save_strategy="steps", save_steps=2).train()
    halfway = parameters(part)
    resumed = tiny(dtype=torch.float32, horizon=1)
    trainer = stock_trainer(tmp_path / "part", resumed, 4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert moved(halfway, parameters(resumed)) == halfway.keys()
    assert moved(parameters(whole), parameters(resumed)) == set()
    loaded = load_ttt(str(tmp_path / "part" / "checkpoint-2"), dtype=torch.float32)
    assert moved(halfway, parameters(loaded)) == set()


WORKER = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
from tests.forked import end_together
from tests.ttt.tiny import random_ids, tiny
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
found = {}
for horizon in (1, None):
    model = DistributedDataParallel(tiny(dtype=torch.float32, horizon=horizon))
    for step in range(2):
        ids = random_ids(2, seed=step)[rank : rank + 1]
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    found[horizon] = model.module.state_dict()
if rank == 0:
    torch.save(found, sys.argv[1])
end_together()
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    run_two(WORKER, tmp_path / "models.pt")
    for horizon, theirs in torch.load(tmp_path / "models.pt").items():
        model = tiny(dtype=torch.float32, horizon=horizon)
        before = parameters(model)
        for step in range(2):
            ids = random_ids(2, seed=step)
            found = gradients(model, model(ids, labels=ids).loss)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter -= 0.1 * found[name]
        ours = model.state_dict()
        assert ours.keys() == theirs.keys() and moved(before, parameters(model)) == before.keys()
        for name, value in ours.items():
            assert (theirs[name] - value).abs().max() < 1e-5, (horizon, name)
