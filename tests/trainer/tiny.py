"""Small random models and batches shared by the trainer tests."""

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from tests.tiny_models import tiny_llama

VOCAB = 128


def tiny_model(seed: int = 0, *, scale: float = 0.15, dtype=torch.float32, **overrides) -> LlamaForCausalLM:
    """A two-layer Llama whose logits are spread enough for gates to differ between tokens."""
    options = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = tiny_llama(seed, **{**options, **overrides})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=scale)
    return model.to(dtype)


def ragged_rows(count: int = 8, seed: int = 0, masked: int = 3) -> Dataset:
    """Rows of different lengths whose first `masked` tokens are not trained."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(3, VOCAB, (6 + 3 * index,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return Dataset.from_list(rows)
