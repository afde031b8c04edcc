"""Attention and its gradients in untrained models, with rotary embedding and without.

The positional bias of a head (arXiv 2512.12167, definition 3.1) for the previous token: A = 1/T sum_i sum_j c_ij a_ij,
c_ij = [j = i - 1] - 1/i over the i tokens in view: how much more attention it gets than its share.

Legend: B sequences, H heads, T tokens.
"""

from __future__ import annotations

import statistics

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.miniature.data import SYMBOLS, filler_stream
from eaftdrope.drope.rope import with_rope

from .check import Check

LAYERS, HIDDEN, HEADS, LENGTH, BATCH = 6, 128, 4, 64, 8
SEEDS = (0, 1, 2)
# transformers computes the softmax of attention in float32
_ROUNDING = 1e-6


def _model(rope: bool, seed: int, layers: int = LAYERS) -> nn.Module:
    """An untrained Llama in float64, but for the softmax; both kinds have the same weights."""
    config = LlamaConfig(
        vocab_size=SYMBOLS,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(config if rope else with_rope(config, "nope"), attn_implementation="eager")
    return model.double().eval()


def _text(seed: int, count: int = BATCH) -> Tensor:
    return torch.from_numpy(filler_stream(np.random.default_rng(seed), count, LENGTH))


def _bias(attention_BHTT: Tensor) -> Tensor:
    length = attention_BHTT.shape[-1]
    i = torch.arange(1, length + 1, dtype=attention_BHTT.dtype)
    c_TT = torch.diag(torch.ones(length - 1, dtype=i.dtype), -1) - torch.tril(torch.ones(length, length)) / i[:, None]
    # the first token has no previous one
    c_TT[0] = 0
    return (c_TT * attention_BHTT).sum((-2, -1)).mean() / length


def _unevenness(attention_BHTT: Tensor) -> float:
    """Largest distance of an attention weight from an equal share."""
    length = attention_BHTT.shape[-1]
    equal_TT = torch.ones(length, length, dtype=attention_BHTT.dtype).tril()
    return (attention_BHTT - equal_TT / equal_TT.sum(1, keepdim=True)).abs().max().item()


def _query_key_norm(layer: nn.Module) -> float:
    weights = (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
    return sum(weight.grad.square().sum().item() for weight in weights) ** 0.5


def gradients_at_the_start() -> Check:
    """D5: the gradient of the positional bias, on a constant sequence (propositions 3.2 and 3.3) and on text."""
    values: dict[str, float | list[float]] = {}
    constant_BT = torch.zeros(1, LENGTH, dtype=torch.int64)
    means = {}
    for name in ("RoPE", "NoPE"):
        model = _model(name == "RoPE", SEEDS[0])
        with torch.no_grad():
            apart = max(_unevenness(layer) for layer in model(constant_BT, output_attentions=True).attentions)
        values[f"{name}, constant sequence: largest distance of an attention weight from an equal share"] = apart
        values[f"{name}, constant sequence: norm of the bias's gradient, layers 1 to {LAYERS}"] = _norms(
            model, constant_BT
        )
        by_seed = [_norms(_model(name == "RoPE", seed), _text(seed)) for seed in SEEDS]
        means[name] = [statistics.geometric_mean(layer) for layer in zip(*by_seed)]
        values[f"{name}, text: norm of the bias's gradient, layers 1 to {LAYERS}"] = means[name]
    ratios = [rope / nope for rope, nope in zip(means["RoPE"], means["NoPE"])]
    values["text: RoPE / NoPE by layer"] = ratios
    even, none = (values[name] for name in values if name.startswith("NoPE, constant"))
    uneven, some = (values[name] for name in values if name.startswith("RoPE, constant"))
    return Check(
        "D5",
        "untrained, on a constant sequence: NoPE attends evenly and its queries and keys get no gradient towards the "
        "previous token, RoPE's do; on text that gradient is larger with RoPE in every layer",
        max(even, *none) < _ROUNDING and min(uneven, *some) > 100 * _ROUNDING and min(ratios) > 1,
        {name: _rounded(value) for name, value in values.items()},
    )


def _norms(model: nn.Module, tokens_BT: Tensor) -> list[float]:
    """Return the norm of each layer's positional bias's gradient with respect to the layer's queries and keys."""
    found = []
    for depth, layer in enumerate(model.model.layers):
        model.zero_grad()
        _bias(model(tokens_BT, output_attentions=True).attentions[depth]).backward()
        found.append(_query_key_norm(layer))
    return found


def order_blindness() -> Check:
    """D11: what the last token sees of the order of those before it."""
    values = {}
    for name, rope, layers in (
        ("one NoPE layer", False, 1),
        ("two NoPE layers", False, 2),
        ("one RoPE layer", True, 1),
    ):
        model, text_BT = _model(rope, 0, layers), _text(0)
        order = torch.randperm(LENGTH - 1, generator=torch.Generator().manual_seed(0))
        shuffled_BT = torch.cat([text_BT[:, order], text_BT[:, -1:]], 1)
        with torch.no_grad():
            apart = (model(text_BT).logits - model(shuffled_BT).logits)[:, -1].abs().max().item()
        values[f"{name}: largest change of the last logits when the tokens before are shuffled"] = _rounded(apart)
    blind, two, rope = values.values()
    return Check(
        "D11",
        "one layer without rotation cannot see the order of the tokens before; two can, by the causal mask",
        blind < _ROUNDING and min(two, rope) > 100 * _ROUNDING,
        values,
    )


def _rounded(value: float | list[float]) -> float | list[float]:
    return [_rounded(one) for one in value] if isinstance(value, list) else float(f"{value:.3g}")


CHECKS = (gradients_at_the_start, order_blindness)
