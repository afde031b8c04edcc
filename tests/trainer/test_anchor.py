"""An anchor in training: the base is the model with its adapters off, or a frozen second model."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from eaftdrope import EAFTConfig, EAFTTrainer, UserError, apply_eaft, eaft_loss, pop_metrics
from eaftdrope.loss import Anchor
from eaftdrope.trainer.base_forward import adapters_off, base_rows
from tests.trainer.processes import run_two
from tests.trainer.test_invariance import KeepGradients, arguments, assert_same
from tests.trainer.tiny import ragged_rows, tiny_model

ANCHOR = {"kl": 0.7, "direction": "reverse", "mask_target": True}


def adapted(dtype=torch.float64, **options):
    """A model whose adapters already move its logits."""
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    torch.manual_seed(5)
    return get_peft_model(tiny_model(dtype=dtype), config).to(dtype)


def definition_gradients(model, base, anchor=ANCHOR, gate="eaft"):
    """One backward of the definition over all rows, on full logits in float64; `base` returns the base model's logits."""
    logits, of_base, labels = [], [], []
    for row in ragged_rows(8):
        ids = torch.tensor([row["input_ids"]])
        logits.append(model(input_ids=ids).logits[0, :-1])
        of_base.append(base(ids)[0, :-1].detach())
        labels.append(torch.tensor(row["labels"][1:]))
    of_base = torch.cat(of_base)
    loss = eaft_loss(torch.cat(logits), torch.cat(labels), gate, anchor=Anchor(**anchor), base_logits=of_base)
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, loss.item()


def without_adapters(model):
    def logits(ids):
        with torch.no_grad(), model.disable_adapter():
            return model(input_ids=ids).logits

    return logits


def gradients(folder, tokenizer, model, batch=8, accumulation=1, *, base_model=None, anchor=ANCHOR, **options):
    keep = KeepGradients()
    sizes = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    trainer = EAFTTrainer(
        model,
        arguments(folder, anchor=anchor, **sizes, **options),
        train_dataset=ragged_rows(8),
        processing_class=tokenizer,
        callbacks=[keep],
        base_model=base_model,
    )
    trainer.train()
    return keep.gradients, trainer


# in float64 nothing hides an error of scale or count
@pytest.mark.parametrize(
    ("batch", "accumulation", "options"), [(8, 1, {}), (4, 2, {}), (1, 8, {}), (4, 2, {"gradient_checkpointing": True})]
)
def test_with_adapters_the_base_is_the_model_without_them(tmp_path, word_tokenizer, batch, accumulation, options):
    actual, trainer = gradients(tmp_path, word_tokenizer, adapted(), batch, accumulation, **options)
    expected, loss = definition_gradients(model := adapted(), without_adapters(model))
    assert_same(actual, expected, 1e-10)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss, rel=1e-5)
    assert log["loss"] == pytest.approx(log["eaft/weighted_loss"] + 0.7 * log["eaft/anchor_kl"], rel=1e-5)
    assert log["eaft/anchor_kl"] > 0.01


def test_modules_that_are_trained_beside_the_adapters_have_their_own_base(tmp_path, word_tokenizer):
    """`modules_to_save`: the base's head is the original one."""

    def made():
        model = adapted(modules_to_save=["lm_head"])
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
        return model

    actual, _ = gradients(tmp_path, word_tokenizer, made(), 4, 2)
    expected, _ = definition_gradients(model := made(), without_adapters(model))
    assert any("lm_head" in name for name in actual)
    assert_same(actual, expected, 1e-10)


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (3, 3)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_second_model(tmp_path, word_tokenizer, tied, batch, accumulation):
    model, base = (tiny_model(seed, dtype=torch.float64, tie_word_embeddings=tied) for seed in (0, 3))
    before = copy.deepcopy(base.state_dict())
    actual, trainer = gradients(tmp_path, word_tokenizer, copy.deepcopy(model), batch, accumulation, base_model=base)
    expected, loss = definition_gradients(model, lambda ids: base(input_ids=ids).logits)
    assert_same(actual, expected, 1e-10)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(name.startswith("base_model") for name in trainer.model.state_dict())


def test_an_anchor_to_itself_changes_nothing(tmp_path, word_tokenizer):
    """New adapters add nothing yet, so the divergence and its gradient are 0."""

    def fresh():
        return get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))

    torch.manual_seed(0)
    anchored, trainer = gradients(tmp_path, word_tokenizer, fresh(), anchor={"kl": 5.0})
    torch.manual_seed(0)
    plain, _ = gradients(tmp_path, word_tokenizer, fresh(), anchor=None)
    assert trainer.state.log_history[0]["eaft/anchor_kl"] < 1e-6
    assert_same({n: g for n, g in anchored.items() if g.any()}, {n: g for n, g in plain.items() if g.any()}, 1e-4)


def test_weights_of_tokens_do_not_weight_it():
    """The patched forward with both, against the definition on full logits in float64."""
    ids = torch.tensor([[3, 7, 1, 9, 4, 2], [5, 5, 8, 0, 6, 3]])
    labels, weights = ids.clone(), torch.tensor([[1, 0.5, -2, 0, 1, 3], [1, 1, -1, 2, 0, 0.25]])
    labels[0, :2] = -100
    model = adapted()
    logits, of_base = model(input_ids=ids).logits[:, :-1], without_adapters(model)(ids)[:, :-1]
    options = {"anchor": Anchor(**ANCHOR), "base_logits": of_base}
    expected = eaft_loss(logits, labels[:, 1:], token_weights=weights[:, 1:], **options)
    expected.backward()
    wanted = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    apply_eaft(model, anchor=ANCHOR)
    loss = model(input_ids=ids, labels=labels, token_weights=weights).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert expected.item() != pytest.approx(eaft_loss(logits, labels[:, 1:], **options).item(), rel=0.01)
    assert_same({name: value.grad for name, value in model.named_parameters() if value.grad is not None}, wanted, 1e-10)


def test_evaluation_is_plain_cross_entropy(tmp_path, word_tokenizer):
    trainer = EAFTTrainer(
        adapted(torch.float32),
        arguments(tmp_path, anchor=ANCHOR),
        train_dataset=ragged_rows(8),
        eval_dataset=ragged_rows(5, seed=9),
        processing_class=word_tokenizer,
    )
    result = trainer.evaluate()
    unanchored = EAFTTrainer(
        adapted(torch.float32),
        arguments(tmp_path),
        train_dataset=ragged_rows(8),
        eval_dataset=ragged_rows(5, seed=9),
        processing_class=word_tokenizer,
    ).evaluate()
    assert result["eval_loss"] == unanchored["eval_loss"] and "eval_eaft/anchor_kl" not in result


def test_the_base_has_no_dropout_and_the_model_keeps_its_mode():
    config = dict(attention_dropout=0.5)
    model = get_peft_model(tiny_model(**config), LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False))
    apply_eaft(model, anchor=ANCHOR)
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    needed = [parameter.requires_grad for parameter in model.parameters()]
    ids = torch.tensor([ragged_rows(8)[5]["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    of_base = base_rows(model.get_base_model(), None, {"input_ids": ids})
    with torch.no_grad():
        expected = tiny_model(**config).eval().model(input_ids=ids).last_hidden_state
    assert of_base.head is None and torch.equal(of_base.hidden, expected)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    assert pop_metrics(model)["eaft/anchor_kl"] > 0.01


def test_an_anchor_alone_trains_and_is_no_mistake():
    """A gate of 0 everywhere is warned of, but for an anchor."""
    model = apply_eaft(adapted(), "constant", weight=0.0, anchor=ANCHOR).train()
    ids = torch.tensor([ragged_rows(8)[5]["input_ids"]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = pop_metrics(model)
    assert metrics["eaft/weighted_loss"] == 0 and loss.item() == pytest.approx(0.7 * metrics["eaft/anchor_kl"])
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


def test_adapters_come_back_after_an_error():
    model = adapted()
    ids = torch.tensor([[3, 4, 5]])
    with_adapters, without = model(input_ids=ids).logits, without_adapters(model)(ids)
    with pytest.raises(RuntimeError), adapters_off(model):
        assert torch.equal(model(input_ids=ids).logits, without)
        raise RuntimeError
    assert torch.equal(model(input_ids=ids).logits, with_adapters) and not torch.equal(with_adapters, without)


def test_the_plain_trainer(tmp_path):
    keep = KeepGradients()
    model = apply_eaft(adapted(), anchor=Anchor(**ANCHOR))
    options = dict(
        max_steps=1, max_grad_norm=0.0, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True
    )
    sizes = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    settings = TrainingArguments(output_dir=str(tmp_path), **sizes, **options)
    Trainer(model, settings, train_dataset=ragged_rows(8), data_collator=collate, callbacks=[keep]).train()
    expected, _ = definition_gradients(other := adapted(), without_adapters(other))
    assert_same(keep.gradients, expected, 1e-10)


@pytest.mark.slow
def test_compiled():
    """The base's forward is outside the graph; the operator is inside."""
    torch._dynamo.reset()
    ids = torch.tensor([ragged_rows(8)[5]["input_ids"]])
    losses = []
    for compiled in (False, True):
        model = apply_eaft(adapted(torch.float32), anchor=ANCHOR).train()
        step = torch.compile(model, backend="aot_eager") if compiled else model
        loss = step(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append((loss.item(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    assert len(losses[0][1]) == len(losses[1][1]) > 0
    assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(losses[1][1], losses[0][1], strict=True))


def test_refusals(monkeypatch):
    with pytest.raises(UserError, match=r"has no adapters that could be switched off\. Pass a second copy"):
        apply_eaft(tiny_model(), anchor=ANCHOR)
    prompts = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UserError, match="has no adapters that could be switched off"):
        apply_eaft(prompts, anchor=ANCHOR)
    partly = adapted()
    partly.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"training would change that base: model\.norm\.weight would be trained"):
        apply_eaft(partly, anchor=ANCHOR)
    with pytest.raises(UserError, match="Load the model a second time"):
        apply_eaft(model := tiny_model(), anchor=ANCHOR, base_model=model)
    with pytest.raises(UserError, match="base_model has 64 tokens and the model has 128"):
        apply_eaft(tiny_model(), anchor=ANCHOR, base_model=tiny_model(vocab_size=64))
    with pytest.raises(UserError, match="without an anchor, and nothing reads it"):
        apply_eaft(tiny_model(), base_model=tiny_model())
    with pytest.raises(ValueError, match="no option 'lambda'"):
        EAFTConfig(output_dir="out", use_cpu=True, bf16=False, anchor={"lambda": 0.1})
    with pytest.raises(ValueError, match="An anchor requires tail='exact'"):
        EAFTConfig(output_dir="out", use_cpu=True, bf16=False, anchor={}, loss_tail="sparse")
    monkeypatch.setattr("eaftdrope.trainer.base_forward.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="an anchor under DeepSpeed ZeRO-3 is not supported"):
        apply_eaft(adapted(), anchor=ANCHOR)


def test_an_anchor_as_json_on_a_command_line():
    config = EAFTConfig(output_dir="out", use_cpu=True, bf16=False, anchor='{"kl": 0.2, "mask_target": true}')
    assert config.loss_settings().anchor == Anchor(kl=0.2, mask_target=True)


WORKER = """
import sys, torch
from tests.tiny_models import make_word_tokenizer
from tests.forked import end_together
from tests.trainer.test_anchor import adapted, gradients
folder, target = sys.argv[1:3]
found, trainer = gradients(folder, make_word_tokenizer(), adapted(), 2, 2, ddp_find_unused_parameters=False)
if trainer.accelerator.is_main_process:
    found = {name.removeprefix("module."): value for name, value in found.items()}
    torch.save({"gradients": found, "log": trainer.state.log_history[0]}, target)
end_together()
"""


@pytest.mark.engines
def test_over_two_processes(tmp_path, word_tokenizer):
    run_two(WORKER, tmp_path / "out", tmp_path / "gradients.pt")
    found = torch.load(tmp_path / "gradients.pt")
    expected, trainer = gradients(tmp_path / "single", word_tokenizer, adapted())
    assert_same(found["gradients"], expected, 1e-9)
    for key in ("loss", "eaft/anchor_kl", "eaft/weighted_loss"):
        assert found["log"][key] == pytest.approx(trainer.state.log_history[0][key], rel=1e-5), key
