"""The column `token_weights` through collation, packing, accumulation and processes, and `loss_exempt` of TRL's rows."""

import pytest
import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from eaftdrope import EAFTConfig, EAFTTrainer, apply_eaft, eaft_loss, pop_metrics
from eaftdrope.errors import UserError
from eaftdrope.loss import token_statistics
from eaftdrope.loss.definition import evaluate_gate
from eaftdrope.loss.gates import EAFT
from eaftdrope.trainer.token_weights import WeightedCollator, exempt_tokens
from tests.tiny_models import byte_tokenizer
from tests.trainer.processes import run_two
from tests.trainer.test_invariance import KeepGradients, arguments, assert_same
from tests.trainer.tiny import ragged_rows, tiny_model


def weighted_rows(count=8):
    """Rows of different lengths, each with a weight, every third token exempt from the gate."""
    rows = []
    for index, row in enumerate(ragged_rows(count)):
        signs = [-1.0 if position % 3 == 0 else 1.0 for position in range(len(row["input_ids"]))]
        rows.append({**row, "token_weights": [sign * (0.25 + 0.5 * index) for sign in signs]})
    return Dataset.from_list(rows)


def gradients(folder, tokenizer, batch, accumulation, rows=None, model=None, **options):
    keep = KeepGradients()
    trainer = EAFTTrainer(
        model or tiny_model(dtype=torch.float64),
        arguments(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **options),
        train_dataset=rows or weighted_rows(),
        processing_class=tokenizer,
        callbacks=[keep],
    )
    trainer.train()
    return keep.gradients, trainer


def forwards(model, rows):
    """Logits, labels and weights of the next tokens of all rows."""
    logits, labels, weights = [], [], []
    for row in rows:
        logits.append(model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1])
        labels.append(torch.tensor(row["labels"][1:]))
        weights.append(torch.tensor(row["token_weights"][1:]))
    return torch.cat(logits), torch.cat(labels), torch.cat(weights)


def direct_gradients(gate="eaft"):
    """One backward of the definition over all rows, in float64."""
    model = tiny_model().double()
    logits, labels, weights = forwards(model, weighted_rows())
    eaft_loss(logits, labels, gate, token_weights=weights).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (1, 8), (3, 3)])
def test_equal_to_the_definition_however_the_rows_are_cut(tmp_path, word_tokenizer, batch, accumulation):
    actual, _ = gradients(tmp_path, word_tokenizer, batch, accumulation)
    assert_same(actual, direct_gradients(), 1e-10)


@pytest.mark.parametrize("options", [{"padding_free": True}, {"packing": True, "max_length": 64}], ids=str)
def test_without_padding_and_packed(tmp_path, word_tokenizer, options):
    if "packing" in options:
        options = {**options, "packing_strategy": "bfd", "dataset_kwargs": {}}
    actual, trainer = gradients(tmp_path, word_tokenizer, 8, 1, **options)
    assert trainer.padding_free
    assert_same(actual, direct_gradients(), 1e-10)
    if "packing" in options:
        assert len(trainer.train_dataset) < 8 and "seq_lengths" in trainer.train_dataset.column_names


def test_metrics(tmp_path, word_tokenizer):
    _, trainer = gradients(tmp_path, word_tokenizer, 4, 2)
    model = tiny_model().double()
    with torch.no_grad():
        logits, labels, weights = forwards(model, weighted_rows())
        kept = labels != -100
        stats, weights = token_statistics(logits[kept], labels[kept]), weights[kept].double()
        gate = evaluate_gate(EAFT(), stats)
    gated = weights > 0
    log = next(entry for entry in trainer.state.log_history if "eaft/gate_mean" in entry)
    used = torch.where(gated, gate * weights, -weights)
    assert log["eaft/weighted_loss"] == pytest.approx((used * stats.nll).mean().item(), rel=1e-6)
    assert log["loss"] == pytest.approx((used * stats.nll).mean().item(), rel=1e-5)
    assert log["eaft/cross_entropy"] == pytest.approx(stats.nll.mean().item(), rel=1e-6)
    # the `constant` gate of the same scale: exempt tokens are exempt from it too
    mean = (gate * weights)[gated].sum() / weights[gated].sum()
    assert log["eaft/gate_mean"] == pytest.approx(mean.item(), rel=1e-6)
    assert log["eaft/gate_low_share"] == pytest.approx(((gate < 0.05) & gated).float().mean().item(), abs=1e-6)
    assert log["eaft/gate_hist_09"] >= (~gated).float().mean().item()
    assert log["eaft/trained_tokens"] == kept.sum()


def test_a_column_costs_nothing_where_there_is_none(tmp_path, word_tokenizer):
    _, trainer = gradients(tmp_path, word_tokenizer, 8, 1, rows=ragged_rows(8))
    assert type(trainer.data_collator) is DataCollatorForLanguageModeling
    assert "token_weights" not in next(iter(trainer.get_train_dataloader()))


def test_evaluation_is_plain_cross_entropy_of_unweighted_tokens(tmp_path, word_tokenizer):
    _, trainer = gradients(tmp_path, word_tokenizer, 8, 1)
    weighted, plain = (trainer.evaluate(rows)["eval_loss"] for rows in (weighted_rows(), ragged_rows(8)))
    assert weighted == plain


def test_a_collator_that_leaves_them_out_is_refused(tmp_path, word_tokenizer):
    trainer = EAFTTrainer(
        tiny_model(),
        arguments(tmp_path, per_device_train_batch_size=2),
        train_dataset=weighted_rows(),
        processing_class=word_tokenizer,
        data_collator=lambda rows: DataCollatorForLanguageModeling(pad_token_id=0)(rows),
    )
    with pytest.raises(UserError, match="the data collator leaves them out of its batches"):
        trainer.train()
    short = [{"input_ids": [4, 5], "labels": [4, 5], "token_weights": [1.0]}]
    with pytest.raises(UserError, match="a row has 2 tokens and 1 token_weights"):
        WeightedCollator(pad_token_id=0)(short)


def test_the_patched_model_in_a_loop_of_its_own():
    model = apply_eaft(tiny_model(dtype=torch.float64)).train()
    batch = WeightedCollator(pad_token_id=0)(list(weighted_rows()))
    model(**batch).loss.backward()
    expected = direct_gradients()
    assert_same({name: p.grad for name, p in model.named_parameters()}, expected, 1e-10)
    assert pop_metrics(model)["eaft/trained_tokens"] == (batch["labels"][:, 1:] != -100).sum()
    with pytest.raises(UserError, match="token_weights belong to labels, not to shift_labels"):
        model(batch["input_ids"], shift_labels=batch["labels"], token_weights=batch["token_weights"])
    # generation and a forward without labels are the model's own
    assert model(input_ids=batch["input_ids"], token_weights=None).loss is None


TALK = [
    {"role": "user", "content": "llm_query"},
    {"role": "assistant", "content": "x = llm_query(text)\nprint(llm_query(x))"},
]


def test_exempt_strings_in_rows_that_trl_prepares(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
        "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    trainer = EAFTTrainer(
        tiny_model(vocab_size=260, max_position_embeddings=512),
        arguments(tmp_path, loss_exempt=["llm_query", "<|im_end|>"], assistant_only_loss=True),
        train_dataset=Dataset.from_list([{"messages": TALK}] * 2),
        processing_class=tokenizer,
    )
    row = trainer.train_dataset[0]
    exempt = [
        index for index, value in enumerate(row["token_weights"]) if value == -1.0 and row["labels"][index] != -100
    ]
    assert tokenizer.decode([row["input_ids"][index] for index in exempt]) == "llm_queryllm_query<|im_end|>"
    assert isinstance(trainer.data_collator, WeightedCollator)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["eaft/gate_hist_09"] >= len(exempt) / (log["eaft/trained_tokens"] / 2) - 1e-6


def test_exempt_tokens_where_decoded_text_has_other_tokens():
    """`ab` was tokenised as two tokens; its text would be one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "c": 3}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="c")
    from tokenizers import decoders

    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="c")
    assert exempt_tokens([3, 0, 1, 3, 2, 3], ["ab"], tokenizer) == [1, 2, 4]
    assert exempt_tokens([3, 2, 3], ["b"], tokenizer) == [1]
    assert exempt_tokens([3, 3], ["ab"], tokenizer) == []


def test_settings():
    with pytest.raises(UserError, match="expected strings that are not empty"):
        EAFTConfig(output_dir="out", loss_exempt=[""], use_cpu=True, bf16=False)
    with pytest.raises(UserError, match="Bring rows with a column token_weights"):
        EAFTConfig(
            output_dir="out", loss_exempt=["x"], dataset_kwargs={"skip_prepare_dataset": True}, use_cpu=True, bf16=False
        )


WORKER = """
import sys, torch
from tests.tiny_models import make_word_tokenizer
from tests.forked import end_together
from tests.trainer.test_token_weights import gradients
folder, target = sys.argv[1:3]
found, trainer = gradients(folder, make_word_tokenizer(), 2, 2)
if trainer.accelerator.is_main_process:
    log = [entry for entry in trainer.state.log_history if "eaft/gate_mean" in entry][0]
    torch.save({"gradients": {name.removeprefix("module."): value for name, value in found.items()}, "log": log}, target)
end_together()
"""


@pytest.mark.slow
def test_over_two_processes(tmp_path, word_tokenizer):
    run_two(WORKER, tmp_path / "out", tmp_path / "gradients.pt")
    found = torch.load(tmp_path / "gradients.pt")
    assert_same(found["gradients"], direct_gradients(), 1e-10)
    _, single = gradients(tmp_path / "single", word_tokenizer, 8, 1)
    expected = single.state.log_history[0]
    for key in ("eaft/gate_mean", "eaft/weighted_loss", "eaft/trained_tokens", "loss"):
        assert found["log"][key] == pytest.approx(expected[key], rel=1e-5), key
