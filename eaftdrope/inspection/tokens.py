"""One look at a batch of rows: the statistics, the gate and the size of the gradient of every trained token.

The head is applied to the trained positions alone, a tile of them at a time, by the loss's own backend: no more logits
than a tile are ever held.

    gradient by the logits of a token's cross-entropy:  g = softmax(z) - onehot(y)
    ||g|| = sqrt((1 - p_y)^2 + sum_{v != y} p_v^2)      the L2 norm, from the sum of squares that the same tile yields

Legend: B rows of a batch, S their longest, T trained tokens, R tokens of a tile, C of them confident conflicts, H hidden
size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from eaftdrope.evaluate.likelihood import IGNORED, TokenRow, padded
from eaftdrope.loss import TokenStats
from eaftdrope.loss.backends import Backend, select_backend
from eaftdrope.loss.backends.tile import LogitsTransform, TileStats
from eaftdrope.loss.call import default_tile_bytes
from eaftdrope.loss.definition import evaluate_gate
from eaftdrope.loss.gates import Gate
from eaftdrope.trainer.head import backbone, gathered_head

# Float32 scratch for the squares: in cache on a CPU, few launches elsewhere.
_SCRATCH_BYTES = {"cpu": 4 << 20}
_SCRATCH_BYTES_DEVICE = 64 << 20


@dataclass(frozen=True)
class Tokens:
    """The T trained tokens of a batch, row after row.

    Args:
        stats ([`TokenStats`]): their statistics.
        weight (`Tensor` `[T]`): their gate.
        gradient (`Tensor` `[T]`): L2 norm of the gradient of their cross-entropy by their logits.
        row (`Tensor` `[T]`, int64): their row in the batch.
        position (`Tensor` `[T]`, int64): their place among the row's tokens, from 0.
        place (`Tensor` `[T]`, int64): their place among the row's trained tokens, from 1.
        conflicts (`Tensor` `[C]`, int64): which of the T are confident conflicts.
        predicted (`Tensor` `[C]`, int64): the token that the model holds most likely there.
        predicted_probability (`Tensor` `[C]`): how likely.
    """

    stats: TokenStats
    weight: Tensor
    gradient: Tensor
    row: Tensor
    position: Tensor
    place: Tensor
    conflicts: Tensor
    predicted: Tensor
    predicted_probability: Tensor


@torch.no_grad()
def measure_tokens(
    model, rows: list[TokenRow], gate: Gate, *, backend: str = "auto", tile_bytes: int | None = None
) -> Tokens:
    """The trained tokens of some rows, none of which is without one. Computes as training would under the same autocast.
    A gate that compares tokens with each other compares those of the batch.

    Args:
        backend: the loss backend, by name.
        tile_bytes: size of a tile of logits; None for what suits the device and the vocabulary.

    Raises:
        ValueError: no such backend, or it cannot work on the model's device and dtype.
    """
    input_ids, labels, mask = padded(rows, model.device)
    hidden_BSH = backbone(model)(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    trained = labels[:, 1:] != IGNORED
    row, before = trained.nonzero(as_tuple=True)
    with gathered_head(model) as head:
        device = head.weight.device
        hidden_TH, labels_T = hidden_BSH[row, before].to(device), labels[row, before + 1].to(device)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden_TH.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        with torch.autocast(device.type, enabled=False):
            transform = LogitsTransform(head.scale, head.softcap)
            weight_VH, chosen = head.weight.to(dtype), select_backend(backend, device, dtype)
            budget = default_tile_bytes(tile_bytes, device, len(weight_VH))
            rows_of_a_tile = max(1, budget // (len(weight_VH) * dtype.itemsize))
            parts = [
                _tile(chosen, hidden_RH, weight_VH, bias, labels_R, transform, gate.topk)
                for hidden_RH, labels_R in zip(
                    hidden_TH.to(dtype).split(rows_of_a_tile), labels_T.split(rows_of_a_tile), strict=True
                )
            ]
    seen = TileStats.concatenate([part[0] for part in parts])
    stats = TokenStats(
        nll=seen.nll,
        entropy=seen.entropy,
        topk_entropy=seen.topk_entropy,
        correct=seen.correct,
        vocab_size=head.weight.shape[0],
        sequence=row.to(device),
    )
    conflicts = stats.conflict.nonzero().squeeze(1)
    squares_T = torch.cat([part[1] for part in parts])
    return Tokens(
        stats=stats,
        weight=evaluate_gate(gate, stats),
        gradient=(torch.expm1(-stats.nll).square() + squares_T).sqrt(),
        row=row,
        position=before + 1,
        place=trained.cumsum(1)[row, before],
        conflicts=conflicts,
        predicted=torch.cat([part[2] for part in parts]),
        predicted_probability=1 / (1 + seen.rest[conflicts]),
    )


def _tile(
    backend: Backend,
    hidden_RH: Tensor,
    head_VH: Tensor,
    bias_V: Tensor | None,
    labels_R: Tensor,
    transform: LogitsTransform,
    topk: int | None,
) -> tuple[TileStats, Tensor, Tensor]:
    """Statistics `[R]`, squared probabilities of the other tokens `[R]`, likeliest token of the conflicts `[C]`."""
    logits_RV = functional.linear(hidden_RH, head_VH, bias_V)
    seen = backend.tile_statistics(logits_RV, labels_R, transform, topk)
    conflict_R = TokenStats(seen.nll, seen.entropy, None, seen.correct, len(head_VH)).conflict
    # scale and softcap keep the order
    return seen, _other_squares(logits_RV, labels_R, seen, transform), logits_RV[conflict_R].argmax(-1)


def _other_squares(logits_RV: Tensor, labels_R: Tensor, seen: TileStats, transform: LogitsTransform) -> Tensor:
    """`[R]`: sum of the squared probabilities of all tokens but the label. The label's is left out rather than taken off,
    which would leave nothing but rounding where it is nearly all of the sum."""
    budget = _SCRATCH_BYTES.get(logits_RV.device.type, _SCRATCH_BYTES_DEVICE)
    step = max(1, budget // (logits_RV.shape[1] * seen.nll.element_size()))
    sums = []
    for logits, labels, maximum in zip(
        logits_RV.split(step), labels_R.split(step), seen.maximum.split(step), strict=True
    ):
        # a copy, also of a tile that has this dtype already
        z = logits.to(seen.nll.dtype, copy=True)
        transform.apply_(z)
        z.sub_(maximum[:, None]).scatter_(1, labels[:, None], -torch.inf)
        sums.append(z.mul_(2).exp_().sum(-1))
    return torch.cat(sums) / (1 + seen.rest).square()
