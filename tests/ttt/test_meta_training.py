"""TTTTrainer: the outer loss, what is trained beside adapters, checkpoints, and what is refused."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

from eaftdrope import EAFTConfig, UserError, apply_ttt
from eaftdrope.ttt import TTTConfig, TTTTrainer, sequence_nll
from tests.trainer.tiny import VOCAB, tiny_model

SETTINGS = TTTConfig(window=16, sink=2, chunk=8, fast_blocks=1)


def rows(lengths=(30, 21, 30, 12)):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def trainer(folder, tokenizer, *, model=None, lora=False, data=None, **options):
    arguments = {
        "output_dir": str(folder),
        **{
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "save_steps": 1,
            "logging_steps": 1,
        },
        **{"bf16": False, "use_cpu": True, "report_to": "none", "gate": "none", "seed": 1, "save_strategy": "steps"},
        **{"dataset_kwargs": {"skip_prepare_dataset": True}, "disable_tqdm": True},
    }
    return TTTTrainer(
        apply_ttt(tiny_model(), SETTINGS) if model is None else model,
        EAFTConfig(**{**arguments, **options}),
        train_dataset=rows() if data is None else data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear") if lora else None,
    )


def test_the_loss_is_that_of_the_rows_read_one_by_one(tmp_path, word_tokenizer):
    """Uneven rows, padded on the right: the mean over all tokens before any of them was trained on."""
    data = rows()
    made = trainer(tmp_path, word_tokenizer, per_device_train_batch_size=4, max_steps=1, save_strategy="no")
    made.train()
    fresh = apply_ttt(tiny_model(), SETTINGS)
    nll = torch.cat([sequence_nll(fresh, torch.tensor([row["input_ids"]]))[0] for row in data])
    (log,) = [entry for entry in made.state.log_history if "loss" in entry]
    assert log["loss"] == pytest.approx(nll.mean().item(), abs=1e-5)
    assert log["eaft/trained_tokens"] == len(nll)
    assert {"position/nll_0_8", "position/nll_8_16", "position/nll_16_32"} <= log.keys()


def test_beside_adapters_the_fast_mlps_are_trained_whole(tmp_path, word_tokenizer):
    made = trainer(tmp_path, word_tokenizer, lora=True)
    trained = {name for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    assert {name.rsplit("ttt.", 1)[1] for name in trained if "ttt." in name} == {
        *("primes.0.gate", "primes.0.up", "primes.0.down", "primes.0.norm.weight")
    }
    assert all("lora_" in name for name in trained if "ttt." not in name)
    before = {name: value.clone() for name, value in made.model.base_model.model.ttt.state_dict().items()}
    made.train()
    after = made.model.base_model.model.ttt.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_training_ends_as_one_that_was_not_interrupted(tmp_path, word_tokenizer, lora):
    whole = trainer(tmp_path / "whole", word_tokenizer, lora=lora)
    whole.train()
    again = trainer(tmp_path / "again", word_tokenizer, lora=lora)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    saved = load_file(tmp_path / "again" / "checkpoint-2" / "ttt.safetensors")
    assert {name.rsplit("ttt.", 1)[1] for name in expected if ".ttt." in f".{name}"} == saved.keys()


def test_refusals(tmp_path, word_tokenizer):
    with pytest.raises(UserError, match="TTT is not applied to this LlamaForCausalLM"):
        trainer(tmp_path, word_tokenizer, model=tiny_model())
    with pytest.raises(ValueError, match="what was learned from one sequence would be used in the next one of the row"):
        trainer(tmp_path, word_tokenizer, padding_free=True, max_length=None)
    with pytest.raises(UserError, match="an anchor is not supported for a model that learns as it reads"):
        trainer(tmp_path, word_tokenizer, lora=True, anchor={"kl": 0.1})
