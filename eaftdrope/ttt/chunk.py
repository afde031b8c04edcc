"""Reading in chunks: `chunk_step` is one chunk, `scan` the rows of a batch, `sequence_nll` their losses by position.

    W_i = W_0 + delta_i        delta_0 = 0, delta_i = delta_{i-1} + step(inner gradient of chunk i at W_{i-1})

The hidden states of chunk i are those of W_{i-1}, so a loss on them is the loss before the update, as the paper's outer
loss is (arXiv 2512.23675, section 2). delta is carried and not W: where the gradient through earlier steps is cut, that
with respect to W_0 itself stays. One function serves training, evaluation and reading.

Legend: B rows, T tokens of a row, n tokens of a chunk, D hidden size.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from eaftdrope.loaded_model import evaluating
from eaftdrope.loss.fused import linear_loss
from eaftdrope.loss.gates import NoGate
from eaftdrope.loss.settings import LossSettings
from eaftdrope.trainer.head import Head, backbone, gathered_head

from .fast_mlps import FastMLPs, causal_lm, fast_mlps
from .inner import inner_gradients, inner_head, stepped
from .recompute import recomputed
from .views import run_first, run_last
from .window import KeysValues, make_layer, trained_limit

# least number of tokens of a row that the first blocks take at once
_PIECE = 256


@dataclass(frozen=True)
class Chunk:
    """What one chunk is read with.

    Args:
        hidden (`Tensor` `[B, n, D]`): outputs of the blocks without fast MLPs.
        kept (`list[KeysValues]`): keys and values of the blocks with fast MLPs, before this chunk.
        delta (`list[Tensor]` or `None`): what was learned, float32 at least, `[B, ...]` each.
        start (`int`): position of its first token.
    """

    hidden: Tensor
    kept: list[KeysValues]
    delta: list[Tensor] | None
    start: int


def chunk_step(
    model: PreTrainedModel,
    chunk: Chunk,
    targets_Bn: Tensor | None,
    learns_B: Tensor | None = None,
    *,
    head: Head | None = None,
    second_order: bool = False,
    per_row: bool = False,
) -> tuple[Tensor, list[KeysValues], list[Tensor] | None]:
    """Read one chunk and learn from it.

    Args:
        targets_Bn: the next tokens; None: read without learning.
        learns_B: rows that learn; None: all of them.
        head: of `inner_head`, so that chunks in first order share it.
        second_order: keep the graph of the step, so that the gradient of a later loss runs through it.
        per_row: compute as a chunk that learns, with weights per row, even if this one does not.

    Returns:
        The final hidden states `[B, n, D]` before the step, the keys and values, and delta after the step. Without
        gradients enabled they have no graph.
    """
    fast, outer, rows = fast_mlps(model), torch.is_grad_enabled(), chunk.hidden.shape[0]
    config, learn = fast.config, targets_Bn is not None
    with torch.set_grad_enabled(outer or learn):
        weights = fast.weights(rows, chunk.delta, per_row=learn or per_row)
        if learn and not (outer and all(weight.requires_grad for weight in weights)):
            # a leaf of its own: an expanded parameter made without gradients cannot be differentiated by
            weights = [w if outer and w.requires_grad else _leaf(w, chunk.delta is None) for w in weights]
        layers: list[Any] = [make_layer(model, config, kept, chunk.start) for kept in chunk.kept]
        # attention has a second derivative in its plain form only
        plain = sdpa_kernel(SDPBackend.MATH) if second_order else nullcontext()
        with fast.using(weights), plain:
            hidden_BnD = run_last(model, chunk.hidden, layers, chunk.start)
        kept = [(layer.keys, layer.values) for layer in layers]
        if targets_Bn is None:
            return hidden_BnD, kept, chunk.delta
        if learns_B is not None:
            targets_Bn = targets_Bn.masked_fill(~learns_B[:, None], -100)
        gradients = inner_gradients(
            model, config, hidden_BnD, targets_Bn, weights, head=head, second_order=second_order, retain_graph=outer
        )
        if not second_order:
            gradients = [gradient.detach() for gradient in gradients]
        delta = _step(fast, gradients, chunk, second_order=second_order)
    if outer:
        return hidden_BnD, kept, delta
    detached: list[KeysValues] = [(keys.detach(), values.detach()) for keys, values in kept]
    return hidden_BnD.detach(), detached, [change.detach() for change in delta]


def _leaf(weight: Tensor, shared: bool) -> Tensor:
    weight = weight.detach()
    return (weight.clone() if shared else weight).requires_grad_()


def _step(fast: FastMLPs, gradients: list[Tensor], chunk: Chunk, *, second_order: bool) -> list[Tensor]:
    config, delta = fast.config, chunk.delta
    rate = config.rate(chunk.start // config.chunk)
    if fast.rule is None:
        return stepped(delta, gradients, rate, config, second_order=second_order)
    steps = fast.rule(gradients, config)
    if delta is None:
        return [-rate * step for step in steps]
    return [change - rate * step for change, step in zip(delta, steps, strict=True)]


def scan(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Read rows from the beginning, learning from every complete chunk that a further token follows.

    Args:
        ids_BT: token ids.
        mask_BT: 1 for tokens, 0 for padding at the right or at the left of a row.

    Returns:
        Final hidden states `[B, T, D]`, those of a token under the weights before its own chunk was learned.
    """
    # an inference tensor could not take part in the gradient of a chunk
    outer = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(outer):
        if mask_BT is None:
            return _scan(model, ids_BT.clone(), None)
        lengths_B = mask_BT.sum(1)
        if bool(mask_BT[:, 0].all()):
            return _scan(model, ids_BT.clone(), lengths_B.clone())
        # tokens to the front, in order, and their states back to their places
        order_BT = torch.argsort(mask_BT.long(), dim=1, descending=True, stable=True)
        hidden_BTD = _scan(model, ids_BT.gather(1, order_BT), lengths_B.clone())
        back_BT = torch.argsort(order_BT, dim=1)
        return hidden_BTD.gather(1, back_BT[:, :, None].expand_as(hidden_BTD))


def _scan(model: PreTrainedModel, ids_BT: Tensor, lengths_B: Tensor | None) -> Tensor:
    fast, total = fast_mlps(model), ids_BT.shape[1]
    hidden_BTD = _first_blocks(model, ids_BT)
    longest = total if lengths_B is None else int(lengths_B.max())
    kept: list[KeysValues] = [(None, None)] * fast.fast_blocks
    delta, outputs = None, []
    with inner_head(model) as head:
        for index, hidden_BnD in enumerate(hidden_BTD.split(fast.config.chunk, 1)):
            start = index * fast.config.chunk
            end = start + hidden_BnD.shape[1]
            # learned if it is complete and its last token's target exists
            learns = fast.config.lr > 0 and end - start == fast.config.chunk and end < longest
            targets_Bn = ids_BT[:, start + 1 : end + 1] if learns else None
            learns_B = None if lengths_B is None or not learns else lengths_B > end
            chunk = Chunk(hidden_BnD, kept, delta, start)
            out_BnD, kept, delta = _scan_chunk(model, chunk, targets_Bn, learns_B, head)
            outputs.append(out_BnD)
    return torch.cat(outputs, 1)


def _scan_chunk(
    model: PreTrainedModel, chunk: Chunk, targets_Bn: Tensor | None, learns_B: Tensor | None, head: Head
) -> tuple[Tensor, list[KeysValues], list[Tensor] | None]:
    """`chunk_step`, with the gradient through the steps as `config.horizon` sets it."""
    config, index, grad = fast_mlps(model).config, chunk.start // fast_mlps(model).config.chunk, torch.is_grad_enabled()
    if grad and chunk.delta is not None and config.horizon and index % config.horizon == 0:
        chunk = replace(chunk, delta=[change.detach() for change in chunk.delta])
    ends_horizon = config.horizon is not None and (index + 1) % config.horizon == 0
    second_order = grad and targets_Bn is not None and not ends_horizon
    step = partial(recomputed, chunk_step) if grad and config.checkpoint else chunk_step
    return step(model, chunk, targets_Bn, learns_B, head=head, second_order=second_order)


def _first_blocks(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """The blocks without fast MLPs over whole rows: piece by piece, so that the cost grows with T and not with its square."""
    fast, total = fast_mlps(model), ids_BT.shape[1]
    config, limit = fast.config, trained_limit(model)
    beyond = config.sink > 0 and limit is not None and -(-total // config.chunk) * config.chunk > limit
    # the sink is rotated once per chunk where the row is longer than the trained length
    # else in pieces of about a window: longer ones compute scores that the window's mask then hides
    piece = config.chunk if beyond else config.chunk * max(1, max(_PIECE, config.window or total) // config.chunk)
    recomputes = (
        model.training and torch.is_grad_enabled() and getattr(backbone(model), "gradient_checkpointing", False)
    )
    if recomputes and beyond:
        raise ValueError(
            f"rows of {total:,} tokens with gradient checkpointing: the sink of a window has to stay within the {limit:,} "
            "tokens that the model was trained on, which needs the cache that gradient checkpointing drops. Use shorter "
            "rows, sink=0, or checkpoint=True without gradient checkpointing."
        )
    if total <= piece or recomputes:
        return run_first(model, ids_BT, None, 0)
    layers = [make_layer(model, config) for _ in range(fast.first)]
    pieces = [run_first(model, ids_BT[:, at : at + piece], layers, at) for at in range(0, total, piece)]
    return torch.cat(pieces, 1)


@torch.no_grad()
def sequence_nll(model: Any, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """The loss of every next token as a model with TTT reads its rows, each under the weights before its chunk was learned.

    Args:
        model: with TTT; inside a PEFT model too.
        ids_BT: token ids, int64.
        mask_BT: 1 for tokens, 0 for padding at the right or at the left of a row.

    Returns:
        `[B, T - 1]`, float32 at least, in nats; entry t is the loss of token t + 1, and 0 where there is no such token.
    """
    model = causal_lm(model)
    labels = ids_BT[:, 1:]
    if mask_BT is not None:
        labels = labels.masked_fill((mask_BT[:, 1:] * mask_BT[:, :-1]) == 0, -100)
    with evaluating(model):
        return token_losses(model, scan(model, ids_BT, mask_BT)[:, :-1], labels)


@torch.no_grad()
def token_losses(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """The loss of every token: float32 at least, of the shape of `labels`, in nats; 0 where a label is -100.

    Args:
        hidden: final hidden states `[..., D]` that predict the labels.
    """
    with gathered_head(model) as head:
        _, details = linear_loss(
            hidden, head.weight, labels, LossSettings(NoGate()), bias=head.bias, transform=head.transform
        )
    nll = torch.zeros(labels.numel(), dtype=details.stats.nll.dtype, device=labels.device)
    return nll.index_copy(0, details.rows, details.stats.nll).view(labels.shape)
