"""Adapters that cannot be merged, or of which there is no share: refused by their configuration."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from eaftdrope.checkpoints import merge
from eaftdrope.checkpoints.merge import merge_adapter
from eaftdrope.checkpoints.repair_options import Repair
from eaftdrope.errors import UserError
from tests.tiny_models import make_word_tokenizer
from tests.trainer.tiny import tiny_model

PLAIN = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_model(tie_word_embeddings=False).save_pretrained(folder)
    make_word_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def save(base, folder, *, moved=0.0, **options):
    """An adapter as it begins, or moved at random; returns its model's logits."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**PLAIN, **options}))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += moved * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return logits(model)


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_took_a_part_of_the_base_has_no_share(base, tmp_path, start):
    """A scale of 0 would leave what is left of the base model, whose logits are 4 away."""
    live = save(base, tmp_path / "adapter", moved=0.05, init_lora_weights=start)
    for share in (0.0, 0.3):
        with pytest.raises(UserError) as caught:
            merge_adapter(tmp_path / "adapter", tmp_path / "merged", repair=Repair(share))
        assert str(caught.value) == (
            f"an adapter with init_lora_weights='{start}' cannot be scaled towards its base model, or repaired: "
            "merge it as it is, or train plain LoRA."
        )
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (
        (merged - live).abs().max()
        <= 5e-5
        < 1
        < (live - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max()
    )


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "mica"])
def test_nothing_of_an_adapter_that_left_the_base_alone_is_the_base_model(base, tmp_path, start):
    save(base, tmp_path / "adapter", moved=0.05, init_lora_weights=start)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", repair=Repair(0.0))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (merged - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() <= 5e-5


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": "newer"}, "init_lora_weights='newer'"),
        ({"use_dora": True, "bias": "all"}, "use_dora, trained biases"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"peft_type": "LOHA"}, "LOHA layers"),
    ],
)
def test_other_adapters_without_a_share(base, tmp_path, monkeypatch, changes, why):
    monkeypatch.setattr(merge, "load_model", None)  # nothing is loaded
    save(base, tmp_path / "adapter")
    edit(tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match=f"^an adapter with {why} cannot be scaled towards its base model"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", repair=Repair(0.5))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"alora_invocation_tokens": [5]},
            "cannot be merged: alora_invocation_tokens is set, and an activated LoRA acts",
        ),
        ({"layer_replication": [[0, 2]]}, "cannot be merged: layer_replication is set, and it repeats layers"),
        ({"arrow_config": {"top_k": 1}}, "cannot be merged: arrow_config is set, and a router chooses"),
        ({"use_qalora": True}, "cannot be merged: use_qalora is set, and QA-LoRA exists on quantised layers only"),
        ({"task_type": "SEQ_CLS"}, "was trained for SEQ_CLS, not as a causal language model"),
        ({"peft_type": "P_TUNING"}, "is a P_TUNING adapter: it adds tokens or a path of its own"),
        ({"peft_type": "PREFIX_TUNING"}, "is a PREFIX_TUNING adapter: it adds tokens"),
        ({"peft_type": "POLY"}, "is a POLY adapter: it adds tokens"),
        (
            {"peft_type": "NEXT_YEAR"},
            r"is a NEXT_YEAR adapter, which the installed peft does not have\. Install a newer",
        ),
        (
            {"lora_bias": True},
            r"cannot be merged: it was trained with lora_bias, and model\.layers\.0\.self_attn\.q_proj of the base model has "
            r"no bias to add it to\. Use it as it is, with peft\.$",
        ),
    ],
)
def test_what_peft_cannot_merge_is_refused_before_anything_is_loaded(base, tmp_path, monkeypatch, changes, why):
    monkeypatch.setattr(merge, "load_model", None)
    save(base, tmp_path / "adapter")
    edit(tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match=f"^{tmp_path / 'adapter'} {why}"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"layers_to_transform": [1]},
        {"use_rslora": True},
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda options: ", ".join(options),
)
def test_half_of_every_plain_adapter_lies_half_way(base, tmp_path, options):
    save(base, tmp_path / "adapter", moved=0.05, **options)
    for share in (0.0, 0.5, 1.0):
        merge_adapter(tmp_path / "adapter", tmp_path / f"{share}", repair=Repair(share))
    start, half, end = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / f"{share}").named_parameters())
        for share in (0.0, 0.5, 1.0)
    )
    original = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    for name, weight in half.items():
        torch.testing.assert_close(start[name], original[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(weight, (start[name] + end[name]) / 2, rtol=0, atol=1e-6)
    assert any((end[name] - original[name]).abs().max() > 1e-3 for name in end)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a word tokenizer beside a Qwen configuration
def test_biases_of_an_adapter_are_merged_where_the_layers_have_some(base, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    options = AutoModelForCausalLM.from_pretrained(base).config.to_dict()
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**{**options, "model_type": "qwen2"})).save_pretrained(tmp_path / "qwen")
    make_word_tokenizer().save_pretrained(tmp_path / "qwen")
    live = save(tmp_path / "qwen", tmp_path / "adapter", moved=0.05, target_modules=["q_proj"], lora_bias=True)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - live).abs().max() <= 5e-5
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "qwen"), tmp_path / "adapter")
    assert (logits(adapted) - live).abs().max() == 0
