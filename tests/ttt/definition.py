"""TTT-E2E by its definition, one row at a time, without caches, views, hooks or batching: what eaftdrope/ttt must equal.

    h <- h + attention(norm(h))              in every block; it sees a window of keys, and the sink
    h <- h + prime(norm'(h))                 in a fast block of layout "prime"
    h <- h + mlp(norm''(h))                  whose weights are the fast ones in layout "in_place"
    after chunk i:  W_i = W_{i-1} - lr * clip(gradient of the mean inner loss of its tokens)

Keys and values of an earlier chunk stay as W_{i-1} made them: each block keeps the inputs that it got, and attends to them
again. Legend: T tokens, n tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from eaftdrope.loss.definition import evaluate_gate, token_statistics
from eaftdrope.loss.gates import resolve_gate
from tests.ttt.tiny import window_mask


def read_row(model, ids: Tensor, *, frozen: list[list[Tensor]] | None = None) -> tuple[Tensor, list[list[Tensor]]]:
    """Logits `[T, V]` of ids `[T]`, each by the fast weights of its chunk, and the delta of each chunk.

    The graph is kept over all updates. With `frozen` the deltas are these constants: the first-order gradient.
    """
    config, base = model.ttt.config, model.base_model
    window = config.window or getattr(model.config, "sliding_window", None) or len(ids)
    mask = window_mask(len(ids), window, config.sink if config.window else 0)
    inputs: list[list[Tensor]] = [[] for _ in base.layers]
    w0 = model.ttt.w0()
    deltas = [[torch.zeros_like(weight) for weight in w0]]
    rows = []
    for index, start in enumerate(range(0, len(ids), config.chunk)):
        end = min(start + config.chunk, len(ids))
        delta = deltas[index] if frozen is None else frozen[index]
        weights = [weight + step for weight, step in zip(w0, delta)]
        logits = _chunk_logits(model, ids[start:end], start, mask, inputs, weights)
        rows.append(logits)
        if frozen is None and end < len(ids):
            inner = inner_loss(logits, ids[start + 1 : end + 1], config.inner_gate)
            steps = _clip(torch.autograd.grad(inner, weights, create_graph=True), config.clip)
            rate = config.lr * min(1, (index + 1) / (config.warmup + 1))
            deltas.append([old - rate * step for old, step in zip(delta, steps)])
    return torch.cat(rows), deltas


def inner_loss(logits: Tensor, targets: Tensor, gate_name: str) -> Tensor:
    """The mean loss of a chunk's tokens, weighted by a gate."""
    gate = resolve_gate(gate_name)
    stats = token_statistics(logits, targets, k=gate.topk)
    weight = evaluate_gate(gate, stats)
    return (weight * stats.nll).sum() / weight.sum()


def _chunk_logits(model, ids, start, mask, inputs, weights):
    base, first_fast = model.base_model, len(model.base_model.layers) - len(weights) // 3
    end = start + len(ids)
    positions = _positions(model, start, end)
    hidden = base.embed_tokens(ids)[None]
    rotary = base.rotary_emb(hidden, positions)
    for index, block in enumerate(base.layers):
        inputs[index].append(hidden)
        seen = block.input_layernorm(torch.cat(inputs[index], dim=1))
        with sdpa_kernel(SDPBackend.MATH):
            attended = block.self_attn(seen, position_embeddings=rotary, attention_mask=mask[None, None, :end, :end])[0]
        hidden = hidden + attended[:, start:]
        own = [block.mlp.gate_proj.weight, block.mlp.up_proj.weight, block.mlp.down_proj.weight]
        if index >= first_fast:
            fast = weights[3 * (index - first_fast) :][:3]
            if model.ttt.config.layout == "in_place":
                own = fast
            else:
                norm = model.ttt.primes[index - first_fast].norm
                hidden = hidden + _swiglu(norm(hidden), *fast, block.mlp.act_fn)
        # not a call of the norm, which would run the hooks
        hidden = hidden + _swiglu(block.post_attention_layernorm.forward(hidden), *own, block.mlp.act_fn)
    return model.lm_head(base.norm(hidden))[0]


def _positions(model, start: int, end: int) -> Tensor:
    """`[1, end]`: beyond the trained length the sink's keys follow the chunk, so that none is further away than that."""
    config, trained = model.ttt.config, model.config.max_position_embeddings
    positions = torch.arange(end)[None]
    if config.window:
        positions[:, : config.sink] += max(0, start + config.chunk - trained)
    return positions


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation) -> Tensor:
    return functional.linear(activation(functional.linear(x, gate)) * functional.linear(x, up), down)


def _clip(gradients, clip: float) -> list[Tensor]:
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    return [gradient * (clip / norm).clamp(max=1.0) for gradient in gradients]
