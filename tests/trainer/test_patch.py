"""apply_eaft on the architectures people train, and what it refuses."""

import inspect
import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from eaftdrope import EAFTCallback, UserError, apply_eaft, eaft_loss, gates, pop_metrics, remove_eaft
from eaftdrope.loss.backends.tile import LogitsTransform
from eaftdrope.trainer.head import logits_transform
from eaftdrope.trainer.targets import sequence_ids, shift_left
from tests.tiny_models import SHAPE
from tests.trainer.tiny import ragged_rows, tiny_model

SIZES = dict(
    **SHAPE,
    vocab_size=97,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MOE = dict(num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1)
CONFIGS = {
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma2, softcap": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8),
    "cohere, logit_scale": CohereConfig(**SIZES, logit_scale=0.25),
    "granite, logits_scaling": GraniteConfig(**SIZES, logits_scaling=4.0),
    "olmo2": Olmo2Config(**SIZES),
    "phi, head bias": PhiConfig(**{**SIZES, "num_key_value_heads": 4}),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, **MOE),
    "qwen3 moe": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16, head_dim=8, **MOE),
}


def make(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model.eval()


def batch(vocab=97):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def training_without_dropout(model):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_gate_none_is_the_models_own_loss(name):
    model = make(CONFIGS[name])
    own = model(**batch())
    expected = gradients(model, own.loss)
    apply_eaft(model, "none")

    evaluated = model(**batch())
    assert torch.allclose(evaluated.logits, own.logits, atol=1e-4)
    assert torch.allclose(evaluated.loss, own.loss, rtol=1e-5)
    assert model(**batch(), skip_logits=True).logits is None

    training_without_dropout(model)
    trained = model(**batch())
    assert trained.logits is None
    actual = gradients(model, trained.loss)
    assert actual.keys() == expected.keys()
    for key, gradient in actual.items():
        assert (gradient - expected[key]).norm() <= 1e-4 * expected[key].norm().clamp_min(1e-3), key


@pytest.mark.parametrize("name", ["gemma2, softcap", "cohere, logit_scale", "phi, head bias"])
def test_the_gate_sees_the_models_own_logits(name):
    model = make(CONFIGS[name])
    inputs = batch()
    logits = model(**inputs).logits[:, :-1].double()
    expected = eaft_loss(logits, inputs["labels"][:, 1:], "eaft")
    apply_eaft(model)
    training_without_dropout(model)
    assert torch.allclose(model(**inputs).loss.double(), expected, rtol=1e-5)


def test_generation_is_untouched_and_removal_complete():
    model = make(CONFIGS["qwen3"])
    ids = batch()["input_ids"][:1]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    own_forward = model.forward
    apply_eaft(model, "eaft", alpha=0.5)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
    remove_eaft(model)
    assert model.forward == own_forward and "forward" not in model.__dict__ and not hasattr(model, "_eaft")


def test_shift_labels_are_not_shifted_again():
    model = training_without_dropout(apply_eaft(make(CONFIGS["llama, tied"])))
    inputs = batch()
    labels = inputs.pop("labels")
    assert torch.equal(model(**inputs, labels=labels).loss, model(**inputs, shift_labels=shift_left(labels)).loss)


def test_labels_may_be_positional_and_return_dict_false():
    model = training_without_dropout(apply_eaft(make(CONFIGS["llama, tied"])))
    inputs = batch()
    expected = model(**inputs).loss
    (loss,) = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"], return_dict=False)
    assert torch.equal(loss, expected)


def test_shift_left_and_sequence_ids():
    labels = torch.tensor([[5, 6, 7], [8, -100, 9]])
    assert shift_left(labels).tolist() == [[6, 7, -100], [-100, 9, -100]]
    assert sequence_ids(labels, None).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert sequence_ids(labels, torch.tensor([[0, 1, 0], [0, 1, 2]])).tolist() == [[1, 1, 2], [3, 3, 3]]
    assert sequence_ids(labels, torch.tensor([[0, 1, 2]])).tolist() == [[1, 1, 1], [2, 2, 2]]


def test_metrics_for_own_loops():
    model = training_without_dropout(apply_eaft(make(CONFIGS["llama, tied"])))
    model(**batch())
    first = pop_metrics(model)
    assert first["eaft/trained_tokens"] == (batch()["labels"][:, 1:] != -100).sum()
    assert pop_metrics(model) == {}
    model.eval()
    model(**batch())
    assert pop_metrics(model) == {} and pop_metrics(model, training=False)["eaft/gate_mean"] == 1.0


def test_plain_trainer_with_the_callback(tmp_path):
    """One line and a callback: the same gradients over accumulation as the definition, metrics in the log."""
    from transformers import DataCollatorForSeq2Seq

    from tests.tiny_models import make_word_tokenizer
    from tests.trainer.test_invariance import KeepGradients, assert_same, direct_gradients

    for size, accumulation in ((8, 1), (2, 4)):
        keep = KeepGradients()
        trainer = Trainer(
            apply_eaft(tiny_model(dtype=torch.float64)),
            TrainingArguments(
                str(tmp_path / str(size)),
                max_steps=1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                max_grad_norm=0.0,
                use_cpu=True,
                report_to="none",
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=ragged_rows(8),
            data_collator=DataCollatorForSeq2Seq(make_word_tokenizer(), padding=True),
            callbacks=[EAFTCallback(), keep],
        )
        trainer.train()
        assert_same(keep.gradients, direct_gradients("eaft"), 1e-10)


def callback_error(model, tmp_path, **options):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options)
    with pytest.raises(UserError) as error:
        EAFTCallback().on_train_begin(arguments, None, None, model=model)
    return str(error.value)


def test_the_callback_refuses_what_would_train_another_loss(tmp_path):
    assert "patched by apply_eaft" in callback_error(tiny_model(), tmp_path)
    assert "label_smoothing_factor" in callback_error(apply_eaft(tiny_model()), tmp_path, label_smoothing_factor=0.1)


def test_trls_fused_head_after_apply_eaft_is_refused(tmp_path):
    model = apply_eaft(tiny_model())
    trls_fused_head(model)
    assert "was replaced after apply_eaft" in callback_error(model, tmp_path)
    with pytest.raises(UserError, match="was wrapped after apply_eaft"):
        remove_eaft(model)


def test_training_without_labels_warns_once():
    model = apply_eaft(make(CONFIGS["llama, tied"])).train()
    inputs = batch()
    inputs.pop("labels")
    with pytest.warns(UserWarning, match="EAFT is NOT what it trains"):
        model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)


def trls_fused_head(model):
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("TRL has its own fused head since 1.15")
    utils.add_fused_lm_head(model)


def test_trls_fused_head_before_apply_eaft_is_refused():
    model = tiny_model()
    trls_fused_head(model)
    with pytest.raises(UserError, match="TRL's fused head"):
        apply_eaft(model)


def test_refusals():
    from peft import LoraConfig, get_peft_model

    model = apply_eaft(tiny_model())
    with pytest.raises(UserError, match="already applied"):
        apply_eaft(model)
    with pytest.raises(UserError, match="not applied"):
        remove_eaft(tiny_model())
    with pytest.raises(UserError, match="logits_to_keep"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long), logits_to_keep=1)
    adapted = get_peft_model(tiny_model(tie_word_embeddings=False), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(UserError, match="has an adapter on the head"):
        apply_eaft(adapted)
    with pytest.raises(UserError, match="DataParallel"):
        apply_eaft(torch.nn.DataParallel(tiny_model()))
    with pytest.raises(UserError, match="got Linear"):
        apply_eaft(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Did you mean 'eaft'"):
        apply_eaft(tiny_model(), "eaf")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(UserError, match="encoder-decoder"):
        apply_eaft(t5)


def test_liger_patched_model_is_refused():
    liger = pytest.importorskip("liger_kernel.transformers.model.llama")
    import types

    model = tiny_model()
    model.forward = types.MethodType(liger.lce_forward, model)
    with pytest.raises(UserError, match="Liger's fused cross-entropy"):
        apply_eaft(model)


def test_a_model_with_other_logits_is_refused():
    """An architecture whose logits are not softcap(scale * head(hidden)) must not be trained by the formula."""
    model = make(CONFIGS["llama, tied"])
    model.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    with pytest.raises(UserError, match="computes its logits differently"):
        apply_eaft(model)
    assert "forward" not in model.__dict__


def test_falcon_h1_multiplier_is_read():
    assert logits_transform(FalconH1Config(lm_head_multiplier=0.5)) == LogitsTransform(0.5)
    assert logits_transform(GraniteConfig(logits_scaling=4.0)) == LogitsTransform(0.25)


def test_under_peft_prompts_of_the_gate_options():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    apply_eaft(model, gates.EAFTVocab(alpha=2.0))
    model.train()
    model(**batch(128)).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name for name in trained)


def test_a_compiled_model_trains_the_same():
    model = training_without_dropout(apply_eaft(make(CONFIGS["llama, tied"])))
    expected = gradients(model, model(**batch()).loss)
    metrics = pop_metrics(model)
    # one graph: nothing of the loss, the head or the metrics breaks it
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = gradients(model, compiled(**batch()).loss)
    for key, gradient in actual.items():
        assert (gradient - expected[key]).norm() <= 1e-5 * expected[key].norm().clamp_min(1e-3), key
    assert pop_metrics(model) == pytest.approx(metrics, rel=1e-5)


def test_a_forward_that_accelerate_has_wrapped():
    """Models loaded with a device_map carry a functools.partial as their forward."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = make(CONFIGS["llama, tied"])
    expected = model(**batch()).loss
    add_hook_to_module(model, ModelHook())
    apply_eaft(model, "none")
    assert torch.allclose(training_without_dropout(model)(**batch()).loss, expected, rtol=1e-5)
    remove_eaft(model)
    assert torch.allclose(model.eval()(**batch()).loss, expected, rtol=1e-5)


def test_parts_that_are_frozen_in_evaluation_mode_stay_so():
    model = make(CONFIGS["llama, tied"]).train()
    model.model.layers[0].eval()
    apply_eaft(model)
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training


def test_pipeline_parallelism_is_refused():
    from transformers.distributed import DistributedConfig

    if "pp_size" not in inspect.signature(DistributedConfig).parameters:
        pytest.skip("the installed transformers has no pipeline parallelism")
    model = tiny_model()
    model.config.distributed_config = DistributedConfig(pp_size=2)
    with pytest.raises(UserError, match=r"split by pipeline parallelism \(pp_size\).*Load it with pp_size=1"):
        apply_eaft(model)
