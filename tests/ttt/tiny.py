"""Tiny random models that learn as they read: 4 blocks of which 2 are fast, window 6, chunk 5, rows of 23 tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

from eaftdrope import apply_ttt
from eaftdrope.ttt import TTTConfig, TTTState, sliding

VOCAB, WINDOW, CHUNK, LENGTH = 31, 6, 5, 23
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=None,
    pad_token_id=2,
)
CLASSES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    # the class's own default is a window of 4096
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {}),
}
NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm)


def stock_model(kind: str = "qwen3", *, dtype: torch.dtype = torch.float64, seed: int = 1, **config) -> PreTrainedModel:
    """A random model without TTT whose logits are spread (standard deviation about 1), in evaluation mode."""
    torch.manual_seed(seed)
    model_class, config_class, own = CLASSES[kind]
    # not `.to(dtype)`, which would round the tables of rotations too, as no checkpoint that is loaded does
    model = model_class._from_config(config_class(**{**SHAPE, **own, **config}), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    return model.eval()


def add_ttt(model: PreTrainedModel, *, zero: bool = False, **config) -> PreTrainedModel:
    """Apply TTT; unless `zero`, the primes get a random output matrix, as training would give them one."""
    defaults = dict(window=WINDOW, sink=2, chunk=CHUNK, fast_blocks=2, lr=1.0, horizon=None)
    model = apply_ttt(model, TTTConfig(**{**defaults, **config}))
    torch.manual_seed(7)
    with torch.no_grad():
        for prime in [] if zero else model.ttt.primes:
            prime.down.normal_(0, 0.1)
    return model


def tiny(kind: str = "qwen3", *, dtype: torch.dtype = torch.float64, zero: bool = False, shape=(), **config):
    """A random model with TTT. `config` changes its TTTConfig, `shape` its stock configuration."""
    return add_ttt(stock_model(kind, dtype=dtype, **dict(shape)), zero=zero, **config)


def tiny_sliding(kind: str = "qwen3", *, dtype: torch.dtype = torch.float64, zero: bool = False, **config):
    """The same with the window of a stock class and configuration, which has no sink."""
    model = sliding(stock_model(kind, dtype=dtype), window=WINDOW).eval()
    return add_ttt(model, zero=zero, window=None, sink=0, **config)


# what must hold in each: a window with a sink, without one, that of a stock class, and no window at all
WINDOWS = {
    "sink": lambda kind="qwen3", **config: tiny(kind, **config),
    "no sink": lambda kind="qwen3", **config: tiny(kind, **{"sink": 0, **config}),
    "stock": lambda kind="qwen3", **config: tiny_sliding(kind, **config),
    "full": lambda kind="qwen3", **config: tiny(kind, **{"window": None, **config}),
}


def random_ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Token ids `[rows, length]` without the special ones."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def nll_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood `[B, T - 1]` of each next token, in the dtype of the logits `[B, T, V]`."""
    return functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, piece: int, state: TTTState | None = None) -> Tensor:
    """Logits `[B, T, V]` of ids `[B, T]` that a state reads in pieces of `piece` tokens."""
    state = TTTState(model) if state is None else state
    pieces = [model(part, past_key_values=state, use_cache=True).logits for part in ids.split(piece, dim=1)]
    return torch.cat(pieces, dim=1)


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of each parameter that the loss depends on."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each gradient is the expected one, relative to its norm; 0 means bit for bit."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert error <= tolerance, (name, error.item())


def window_mask(length: int, window: int = WINDOW, sink: int = 0) -> Tensor:
    """`[length, length]`, true where a query (row) attends to a key (column)."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    return (key <= query) & ((key > query - window) | (key < sink))
