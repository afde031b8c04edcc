"""Gradients do not depend on how a batch is cut into accumulation steps or processes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from eaftdrope import EAFTConfig, EAFTTrainer, apply_eaft, eaft_loss, remove_eaft
from tests.trainer.processes import run_two
from tests.trainer.tiny import ragged_rows, tiny_model


class KeepGradients(TrainerCallback):
    """The gradients of the first optimiser step."""

    def __init__(self):
        self.gradients = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def arguments(folder, **options):
    defaults = dict(
        output_dir=str(folder),
        max_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    return EAFTConfig(**{**defaults, **options})


def gradients(folder, tokenizer, batch, accumulation, model=None, masked=3, **options):
    keep = KeepGradients()
    trainer = EAFTTrainer(
        model or tiny_model(),
        arguments(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **options),
        train_dataset=ragged_rows(8, masked=masked),
        processing_class=tokenizer,
        callbacks=[keep],
    )
    trainer.train()
    return keep.gradients, trainer


def direct_gradients(gate, model=None, rows=8, masked=3):
    """One backward of the definition over all rows, in float64."""
    model = (model or tiny_model()).double()
    logits, labels = [], []
    for row in ragged_rows(rows, masked=masked):
        logits.append(model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1])
        labels.append(torch.tensor(row["labels"][1:]))
    eaft_loss(torch.cat(logits), torch.cat(labels), gate).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name in actual:
        error = (actual[name].double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error <= tolerance, (name, error.item())


# in float64 nothing hides an error of scale or count
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (1, 8), (3, 3)])
@pytest.mark.parametrize("gate", ["eaft", "none"])
def test_equal_to_the_definition_over_all_rows(tmp_path, word_tokenizer, batch, accumulation, gate):
    model = tiny_model(dtype=torch.float64)
    actual, trainer = gradients(tmp_path, word_tokenizer, batch, accumulation, model=model, gate=gate)
    assert trainer.state.global_step == 1
    assert_same(actual, direct_gradients(gate), 1e-10)


def test_float32_over_batch_and_accumulation(tmp_path, word_tokenizer):
    expected, _ = gradients(tmp_path, word_tokenizer, 8, 1)
    assert_same(expected, direct_gradients("eaft"), 1e-5)
    for batch, accumulation in ((4, 2), (1, 8)):
        assert_same(gradients(tmp_path, word_tokenizer, batch, accumulation)[0], expected, 1e-6)


def test_with_gradient_checkpointing(tmp_path, word_tokenizer):
    model = tiny_model(dtype=torch.float64)
    actual, _ = gradients(tmp_path, word_tokenizer, 4, 2, model=model, gradient_checkpointing=True)
    assert_same(actual, direct_gradients("eaft"), 1e-10)


def test_untied_head_in_small_tiles(tmp_path, word_tokenizer):
    model = tiny_model(tie_word_embeddings=False, dtype=torch.float64)
    expected = direct_gradients("eaft", tiny_model(tie_word_embeddings=False))
    actual, _ = gradients(tmp_path, word_tokenizer, 4, 2, model=model, loss_tile_bytes=128 * 8 * 5)
    assert_same(actual, expected, 1e-10)


def qwen_vl():
    """A class that declares that its loss takes no count of the tokens."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}
    text = {**tiny_model().config.to_dict(), "model_type": "qwen2_5_vl_text", "rope_parameters": rope}
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=64)
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def qwen_vl_lora():
    base = qwen_vl()
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def gpt2():
    """A class that is not among those whose loss shifts the labels, although it does."""
    torch.manual_seed(0)
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, **dropout)).eval()


def plain_gradients(folder, model, batch, accumulation):
    """Of transformers' own Trainer, every token trained, the first of a row too where its labels say so."""
    keep = KeepGradients()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows, collate = ragged_rows(8, masked=0), DataCollatorForLanguageModeling(pad_token_id=0)
    Trainer(apply_eaft(model), arguments, train_dataset=rows, data_collator=collate, callbacks=[keep]).train()
    return keep.gradients


@pytest.mark.parametrize("make", [qwen_vl, qwen_vl_lora, gpt2])
def test_the_plain_trainer_counts_the_tokens_of_every_class(tmp_path, make):
    expected = plain_gradients(tmp_path, make(), 8, 1)
    for batch, accumulation in ((4, 2), (1, 8)):
        actual = plain_gradients(tmp_path, make(), batch, accumulation)
        assert_same(actual, {name: expected[name] for name in actual}, 1e-6)


def test_the_first_token_of_a_row_is_not_counted_whatever_the_class(tmp_path, word_tokenizer):
    expected = direct_gradients("eaft", gpt2(), masked=0)
    plain = plain_gradients(tmp_path, gpt2(), 8, 1)
    ours, _ = gradients(tmp_path, word_tokenizer, 8, 1, model=gpt2(), masked=0)
    for actual in (plain, ours):
        assert_same(actual, {name: expected[name] for name in actual}, 1e-5)


def test_what_the_trainer_reads_is_as_before_once_eaft_is_removed():
    model = qwen_vl()
    model.loss_type = "its own"
    before = dict(vars(model))
    apply_eaft(model)
    assert (model.accepts_loss_kwargs, model.loss_type) == (True, "ForCausalLM")
    remove_eaft(model)
    assert vars(model) == before and model.accepts_loss_kwargs is False


WORKER = """
import sys, torch
from tests.tiny_models import make_word_tokenizer
from tests.forked import end_together
from tests.trainer.test_invariance import gradients
folder, target = sys.argv[1:3]
found, trainer = gradients(folder, make_word_tokenizer(), 2, 2)
if trainer.accelerator.is_main_process:
    found = {name.removeprefix("module."): value for name, value in found.items()}
    log = [entry for entry in trainer.state.log_history if "eaft/gate_mean" in entry]
    torch.save({"gradients": found, "log": log, "processes": trainer.accelerator.num_processes}, target)
end_together()
"""


@pytest.mark.slow
def test_over_two_processes(tmp_path, word_tokenizer):
    target = tmp_path / "gradients.pt"
    run_two(WORKER, tmp_path / "out", target)
    found = torch.load(target)
    assert found["processes"] == 2
    alone, single = gradients(tmp_path / "single", word_tokenizer, 8, 1)
    assert_same(found["gradients"], alone, 1e-6)
    # metrics are over the tokens of both processes
    expected = single.state.log_history[0]
    for key in ("eaft/gate_mean", "eaft/cross_entropy", "entropy", "eaft/trained_tokens", "num_tokens", "loss"):
        assert found["log"][0][key] == pytest.approx(expected[key], rel=1e-5), key
