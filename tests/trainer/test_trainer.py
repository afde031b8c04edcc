"""EAFTTrainer as its user meets it: logs, evaluation, LoRA, packing, other trainers' losses, refusals."""

import dataclasses
import json
import warnings

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from torch.nn import functional
from trl import SFTConfig, SFTTrainer

from eaftdrope import EAFTConfig, EAFTTrainer, UserError, eaft_loss, gates
from tests.trainer.test_invariance import KeepGradients, arguments, assert_same, direct_gradients
from tests.trainer.tiny import VOCAB, ragged_rows, tiny_model


def make_trainer(folder, tokenizer, model=None, *, gate=None, callbacks=None, peft_config=None, rows=8, **options):
    return EAFTTrainer(
        model or tiny_model(),
        arguments(folder, per_device_train_batch_size=4, **options),
        train_dataset=ragged_rows(rows),
        eval_dataset=ragged_rows(5, seed=9),
        processing_class=tokenizer,
        gate=gate,
        callbacks=callbacks,
        peft_config=peft_config,
    )


def plain_nll(model, rows):
    """nll of every trained token, row by row."""
    parts = []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
            parts.append(functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="none"))
            parts[-1] = parts[-1][torch.tensor(row["labels"][1:]) != -100]
    return torch.cat(parts)


def test_a_log_carries_every_metric(tmp_path, word_tokenizer):
    trainer = make_trainer(tmp_path, word_tokenizer, gradient_accumulation_steps=2)
    nll = plain_nll(tiny_model(), ragged_rows(8))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["eaft/cross_entropy"] == pytest.approx(nll.mean().item(), rel=1e-4)
    assert log["loss"] == pytest.approx(log["eaft/weighted_loss"], rel=1e-5)
    assert log["num_tokens"] == sum(len(row["input_ids"]) for row in ragged_rows(8))
    assert log["eaft/trained_tokens"] == len(nll)
    assert 0 < log["eaft/gate_mean"] <= 1 and log["eaft/tokens_per_second"] > 0
    assert 0 < log["entropy"] <= torch.log(torch.tensor(float(VOCAB)))
    for key in ("eaft/gate_low_share", "eaft/conflict_share", "mean_token_accuracy", "grad_norm", "learning_rate"):
        assert key in log


def test_conflicts_and_low_gates_are_counted(tmp_path, word_tokenizer):
    """A model that is sure of everything and wrong: every token is a confident conflict and its gate is closed."""
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        # one hidden dimension dwarfs the others whatever the token, and the head reads "token 2" from it
        model.model.embed_tokens.weight[:, 0] = 50.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[2, 0] = 5.0
    trainer = make_trainer(tmp_path, word_tokenizer, model)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["eaft/conflict_share"] == 1.0
    assert log["eaft/gate_low_share"] == 1.0
    assert log["mean_token_accuracy"] == 0.0


def test_totals_go_on_over_logs(tmp_path, word_tokenizer):
    trainer = make_trainer(tmp_path, word_tokenizer, max_steps=4)
    trainer.train()
    totals = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    assert len(totals) == 4 and totals == sorted(totals) and totals[-1] > totals[0]
    two_epochs = 2 * sum(len(row["input_ids"]) for row in ragged_rows(8))
    assert totals[-1] == two_epochs


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_evaluation_is_plain_cross_entropy_over_tokens(tmp_path, word_tokenizer, batch):
    trainer = make_trainer(tmp_path, word_tokenizer, per_device_eval_batch_size=batch)
    expected = plain_nll(tiny_model(), ragged_rows(5, seed=9)).mean().item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert "eval_mean_token_accuracy" in metrics and "eval_entropy" in metrics
    assert not any("gate" in key for key in metrics)


def test_compute_metrics_gets_logits(tmp_path, word_tokenizer):
    seen = {}

    def compute_metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {"ok": 1.0}

    trainer = make_trainer(tmp_path, word_tokenizer)
    trainer.compute_metrics = compute_metrics
    assert trainer.evaluate()["eval_ok"] == 1.0
    assert seen["shape"][0] == 5 and seen["shape"][2] == VOCAB


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_equals_trl(tmp_path, word_tokenizer, loss_type):
    """`none` is TRL's nll and `dft` its dft: same gradients on the same batch."""

    def run(trainer_class, config):
        keep = KeepGradients()
        trainer = trainer_class(
            tiny_model(), config, train_dataset=ragged_rows(8), processing_class=word_tokenizer, callbacks=[keep]
        )
        trainer.train()
        return keep.gradients, trainer.state.log_history[0]

    ours = arguments(tmp_path / "ours", per_device_train_batch_size=8, gate={"nll": "none", "dft": "dft"}[loss_type])
    options = {field.name: getattr(ours, field.name) for field in dataclasses.fields(SFTConfig) if field.init}
    theirs = SFTConfig(**{**options, "loss_type": loss_type, "output_dir": str(tmp_path / "trl")})
    actual, our_log = run(EAFTTrainer, ours)
    expected, their_log = run(SFTTrainer, theirs)
    assert_same(actual, expected, 2e-5)
    for key in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert our_log[key] == pytest.approx(their_log[key], rel=1e-4), key


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="older TRL sums the aux loss over the steps")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_mixture_of_experts_equals_trl(tmp_path, word_tokenizer, family):
    """The load-balancing loss is a mean of the micro-batch: it is averaged over accumulation steps, not summed. It is logged
    as TRL logs it, and so are the tokens at an evaluation."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def run(trainer_class, config):
        torch.manual_seed(0)
        sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        experts = dict(num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.5, head_dim=8)
        experts |= {"num_experts_per_tok": 2}
        experts |= {"num_experts": 4, "moe_intermediate_size": 48} if family == "qwen3_moe" else {}
        keep = KeepGradients()
        trainer = trainer_class(
            AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **experts), dtype=torch.float32),
            config,
            train_dataset=ragged_rows(8),
            eval_dataset=ragged_rows(5, seed=9),
            processing_class=word_tokenizer,
            callbacks=[keep],
        )
        trainer.train()
        return keep.gradients, trainer.state.log_history

    ours = arguments(
        tmp_path / "ours",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gate="none",
        eval_strategy="steps",
        eval_steps=1,
    )
    options = {field.name: getattr(ours, field.name) for field in dataclasses.fields(SFTConfig) if field.init}
    theirs = SFTConfig(**{**options, "output_dir": str(tmp_path / "trl")})
    (actual, our_logs), (expected, their_logs) = run(EAFTTrainer, ours), run(SFTTrainer, theirs)
    assert_same(actual, expected, 2e-5)
    for our_log, their_log in zip(our_logs, their_logs, strict=True):
        assert their_log.keys() <= our_log.keys()
    for key in ("aux_loss", "loss", "num_tokens", "entropy"):
        assert our_logs[0][key] == pytest.approx(their_logs[0][key], rel=1e-4), key
    for key in ("eval_aux_loss", "eval_num_tokens"):
        assert our_logs[1][key] == pytest.approx(their_logs[1][key], rel=1e-4), key


@pytest.mark.parametrize("column", ["train_dataset", "eval_dataset"])
def test_a_token_beyond_the_embedding_is_named_before_the_first_step(tmp_path, word_tokenizer, column):
    rows = {"train_dataset": ragged_rows(4), "eval_dataset": ragged_rows(4)}
    rows[column] = Dataset.from_list([*ragged_rows(4), {"input_ids": [3, VOCAB], "labels": [3, VOCAB]}])
    with pytest.raises(UserError, match=rf"^row 4 holds token {VOCAB} .*the model's embedding has {VOCAB} rows"):
        EAFTTrainer(tiny_model(), arguments(tmp_path), processing_class=word_tokenizer, **rows)


@pytest.mark.parametrize("loaded_by", ["us", "the trainer"])
def test_the_saved_configuration_is_the_models_own(tmp_path, word_tokenizer, loaded_by):
    """transformers' Trainer switches the cache off, TRL's has the routers' logits returned."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    experts = dict(num_key_value_heads=2, num_local_experts=2, output_router_logits=False, router_aux_loss_coef=0.5)
    model = MixtralForCausalLM(MixtralConfig(**sizes, **experts, pad_token_id=0))
    model.save_pretrained(tmp_path / "base")
    given = model if loaded_by == "us" else str(tmp_path / "base")
    trainer = make_trainer(tmp_path, word_tokenizer, given)
    assert (trainer.model.config.use_cache, trainer.model.config.output_router_logits) == (False, True)
    trainer.save_model(str(tmp_path / "saved"))
    keys = ("use_cache", "output_router_logits")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert [saved[key] for key in keys] == [True, False]
    # training goes on as the trainer set it
    assert [getattr(trainer.model.config, key) for key in keys] == [False, True]


def test_a_plain_sftconfig_trains_with_the_default_gate(tmp_path, word_tokenizer):
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = EAFTTrainer(tiny_model(), config, train_dataset=ragged_rows(4), processing_class=word_tokenizer)
    assert trainer.gate == gates.EAFT()
    assert isinstance(trainer.args, EAFTConfig) and trainer.args.output_dir == str(tmp_path)


def test_a_function_is_a_gate(tmp_path, word_tokenizer):
    keep = KeepGradients()
    model = tiny_model(dtype=torch.float64)

    def gate(stats):
        return stats.entropy / 10

    make_trainer(tmp_path, word_tokenizer, model, gate=gate, callbacks=[keep], gradient_accumulation_steps=2).train()
    assert_same(keep.gradients, direct_gradients(gate), 1e-10)


def test_lora_trains_the_adapter_alone(tmp_path, word_tokenizer, monkeypatch):
    monkeypatch.setattr("eaftdrope.loss.gradients.Gradients._add_weight", lambda *_: pytest.fail("dW of a frozen head"))
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    keep = KeepGradients()
    torch.manual_seed(1)
    trainer = make_trainer(
        tmp_path, word_tokenizer, peft_config=config, callbacks=[keep], gradient_accumulation_steps=2
    )
    rows, labels = [], []
    for row in ragged_rows(8):
        rows.append(trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1])
        labels.append(torch.tensor(row["labels"][1:]))
    eaft_loss(torch.cat(rows), torch.cat(labels)).backward()
    expected = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.zero_grad()
    trainer.train()
    assert set(keep.gradients) == set(expected) and all("lora_" in name for name in expected)
    assert_same(keep.gradients, expected, 1e-4)


def test_a_head_in_modules_to_save_is_trained(tmp_path, word_tokenizer):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        tmp_path, word_tokenizer, tiny_model(tie_word_embeddings=False), peft_config=config, learning_rate=1e-2
    )
    head = trainer.model.get_base_model().lm_head
    before = head.modules_to_save["default"].weight.clone()
    original = head.original_module.weight.clone()
    trainer.train()
    assert not torch.equal(head.modules_to_save["default"].weight, before)
    assert torch.equal(head.original_module.weight, original)


def test_bfloat16_autocast(tmp_path, word_tokenizer):
    trainer = make_trainer(tmp_path, word_tokenizer, bf16=True, learning_rate=1e-2, max_steps=12)
    trainer.train()
    losses = [entry["eaft/cross_entropy"] for entry in trainer.state.log_history if "eaft/cross_entropy" in entry]
    assert losses[-1] < losses[0] - 0.3
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


@pytest.mark.parametrize(("bf16", "instructions", "warned"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_bfloat16_that_the_processor_does_not_know_is_told(
    tmp_path, word_tokenizer, monkeypatch, bf16, instructions, warned
):
    monkeypatch.setattr("eaftdrope.trainer.trainer.has_instructions", lambda dtype: instructions)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make_trainer(tmp_path, word_tokenizer, bf16=bf16)
    assert sum("bf16 is on, as TRL has it by default" in str(one.message) for one in seen) == warned


def test_packed_rows_train_as_if_alone(tmp_path, word_tokenizer):
    """Packing changes which rows share a sequence, not the gradient."""
    rows = Dataset.from_list([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in ragged_rows(6)])
    keep = KeepGradients()
    trainer = EAFTTrainer(
        tiny_model(dtype=torch.float64),
        arguments(tmp_path, per_device_train_batch_size=8, packing=True, max_length=64),
        train_dataset=rows,
        processing_class=word_tokenizer,
        callbacks=[keep],
    )
    assert len(trainer.train_dataset) < 6
    trainer.train()
    # rotary angles are float32 even in a float64 model, and positions differ by row
    assert_same(keep.gradients, direct_gradients("eaft", rows=6), 1e-7)


def test_packing_is_refused_where_packed_rows_see_each_other(tmp_path, word_tokenizer, monkeypatch):
    model = tiny_model()
    inner = model.model.forward
    # an attention that ignores where sequences begin
    monkeypatch.setattr(model.model, "forward", lambda **kwargs: inner(**{**kwargs, "position_ids": None}))
    with pytest.raises(UserError, match="lets packed sequences attend to each other"):
        EAFTTrainer(
            model,
            arguments(tmp_path, packing=True, max_length=64),
            train_dataset=ragged_rows(6),
            processing_class=word_tokenizer,
        )


def test_an_all_masked_micro_batch_adds_nothing(tmp_path, word_tokenizer):
    rows = [row for row in ragged_rows(4)]
    masked = [{"input_ids": row["input_ids"], "labels": [-100] * len(row["labels"])} for row in rows]
    keep = KeepGradients()
    trainer = EAFTTrainer(
        tiny_model(dtype=torch.float64),
        arguments(
            tmp_path,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            shuffle_dataset=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list([row for pair in zip(rows, masked) for row in pair]),
        processing_class=word_tokenizer,
        callbacks=[keep],
    )
    trainer.train()
    assert_same(keep.gradients, direct_gradients("eaft", rows=4), 1e-10)


CONFIG_REFUSALS = [
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported with a gate: smoothing pulls"),
    ({"label_smoothing_factor": 0.1, "gate": "none"}, "use TRL's SFTTrainer for plain cross-entropy with smoothing"),
    ({"loss_type": "dft"}, "set gate='dft'"),
    ({"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}, "Liger's fused_linear"),
    ({"gate": "eatf"}, "Did you mean 'eaft'?"),
    ({"gate_kwargs": {"alhpa": 1}}, "Did you mean 'alpha'?"),
    ({"loss_backend": "cudda"}, "unknown loss backend"),
]


@pytest.mark.parametrize(("options", "message"), CONFIG_REFUSALS)
def test_a_configuration_that_would_train_something_else_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError) as error:
        arguments(tmp_path, **options)
    assert message in str(error.value)


def test_gate_kwargs_as_json(tmp_path):
    config = arguments(tmp_path, gate_kwargs=json.dumps({"alpha": 0.5}))
    assert config.gate_kwargs == {"alpha": 0.5}


def test_constructor_refusals(tmp_path, word_tokenizer):
    from eaftdrope import apply_eaft

    common = {"train_dataset": ragged_rows(2), "processing_class": word_tokenizer}
    with pytest.raises(UserError, match="compute_loss_func replaces the loss"):
        EAFTTrainer(tiny_model(), arguments(tmp_path), compute_loss_func=lambda *_: 0, **common)
    with pytest.raises(UserError, match="EAFT is already applied"):
        EAFTTrainer(apply_eaft(tiny_model()), arguments(tmp_path), **common)
    with pytest.raises(ValueError, match="lm_head"):
        EAFTTrainer(
            tiny_model(tie_word_embeddings=False),
            arguments(tmp_path),
            peft_config=LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"),
            **common,
        )


@pytest.mark.parametrize("kind", ["sp", "cp"])
def test_sequence_and_context_parallelism_are_refused(kind):
    from types import SimpleNamespace

    from eaftdrope.trainer.trainer import refuse_parallelism

    refuse_parallelism(None)
    refuse_parallelism(SimpleNamespace(sp_enabled=False, cp_enabled=False))
    with pytest.raises(UserError, match=f"{kind}_size"):
        refuse_parallelism(SimpleNamespace(sp_enabled=kind == "sp", cp_enabled=kind == "cp"))


def test_data_parallel_is_refused(tmp_path, word_tokenizer, monkeypatch):
    monkeypatch.setattr(EAFTConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="DataParallel"):
        EAFTTrainer(tiny_model(), arguments(tmp_path), train_dataset=ragged_rows(2), processing_class=word_tokenizer)


def test_a_batch_without_labels_is_refused(tmp_path, word_tokenizer):
    trainer = make_trainer(tmp_path, word_tokenizer)
    trainer.model.train()
    with pytest.raises(UserError, match="no `labels`"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_the_saved_model_loads_without_the_patch(tmp_path, word_tokenizer):
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(tmp_path, word_tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(3, 20)[None]
    trainer.model.eval()
    assert torch.equal(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
