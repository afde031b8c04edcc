"""One pass over a batch of rows: the statistics, the gate and the gradient norm of every trained token.

The head is applied only to the trained positions, a tile of them at a time, by the loss's own backend: no more logits
than a tile exist at once.

    gradient of a token's cross-entropy with respect to its logits:  g = softmax(z) - onehot(y)
    ||g|| = sqrt((1 - p_y)^2 + sum_{v != y} p_v^2)      the L2 norm, from the sum of squares that the same tile yields

Legend: B rows of a batch, S tokens of the longest, N trained tokens, R tokens of a tile, C of them confident conflicts,
D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from eaftdrope.evaluate.likelihood import IGNORED, TokenRow, padded
from eaftdrope.loss import TokenStats
from eaftdrope.loss.backends import Backend, select_backend
from eaftdrope.loss.backends.tile import LogitsTransform, TileStats
from eaftdrope.loss.compute import default_tile_bytes
from eaftdrope.loss.definition import evaluate_gate
from eaftdrope.loss.gates import Gate
from eaftdrope.trainer.head import backbone, gathered_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Float32 scratch for the squares: fits the cache of a CPU, few launches on other devices.
_SCRATCH_BYTES = {"cpu": 4 << 20}
_SCRATCH_BYTES_DEVICE = 64 << 20


@dataclass(frozen=True)
class Tokens:
    """The N trained tokens of a batch, row after row.

    Args:
        stats ([`TokenStats`]): their statistics.
        weight (`Tensor` `[N]`): their gate values.
        gradient (`Tensor` `[N]`): L2 norm of the gradient of their cross-entropy with respect to their logits.
        row (`Tensor` `[N]`, int64): their row in the batch.
        position (`Tensor` `[N]`, int64): their index in the row, from 0.
        rank (`Tensor` `[N]`, int64): their rank among the row's trained tokens, from 1.
        conflicts (`Tensor` `[C]`, int64): indices of those of the N that are confident conflicts.
        predicted (`Tensor` `[C]`, int64): the most probable token there.
        predicted_probability (`Tensor` `[C]`): its probability.
    """

    stats: TokenStats
    weight: Tensor
    gradient: Tensor
    row: Tensor
    position: Tensor
    rank: Tensor
    conflicts: Tensor
    predicted: Tensor
    predicted_probability: Tensor


@torch.no_grad()
def measure_tokens(
    model: PreTrainedModel, rows: list[TokenRow], gate: Gate, *, backend: str = "auto", tile_bytes: int | None = None
) -> Tokens:
    """Return the trained tokens of some rows, computed as training would under the same autocast.

    Args:
        model: in evaluation mode.
        rows: each with at least one trained token.
        gate: one that compares tokens with each other compares those of the batch.
        backend: the loss backend, by name.
        tile_bytes: size of a tile of logits; None for the default of the device and the vocabulary.

    Raises:
        ValueError: no such backend, or it does not support the model's device and dtype.
    """
    input_ids, labels, mask = padded(rows, model.device)
    hidden_BSD = backbone(model)(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    trained = labels[:, 1:] != IGNORED
    row, before = trained.nonzero(as_tuple=True)
    with gathered_head(model) as head:
        device = head.weight.device
        hidden_ND, labels_N = hidden_BSD[row, before].to(device), labels[row, before + 1].to(device)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden_ND.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        with torch.autocast(device.type, enabled=False):
            transform = head.transform
            weight_VD, chosen = head.weight.to(dtype), select_backend(backend, device, dtype)
            budget = default_tile_bytes(tile_bytes, device, len(weight_VD))
            tile_rows = max(1, budget // (len(weight_VD) * dtype.itemsize))
            parts = [
                _tile(chosen, hidden_RD, weight_VD, bias, labels_R, transform, gate.topk)
                for hidden_RD, labels_R in zip(
                    hidden_ND.to(dtype).split(tile_rows), labels_N.split(tile_rows), strict=True
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
    squares_N = torch.cat([part[1] for part in parts])
    return Tokens(
        stats=stats,
        weight=evaluate_gate(gate, stats),
        gradient=(torch.expm1(-stats.nll).square() + squares_N).sqrt(),
        row=row,
        position=before + 1,
        rank=trained.cumsum(1)[row, before],
        conflicts=conflicts,
        predicted=torch.cat([part[2] for part in parts]),
        predicted_probability=1 / (1 + seen.rest[conflicts]),
    )


def _tile(
    backend: Backend,
    hidden_RD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    labels_R: Tensor,
    transform: LogitsTransform,
    topk: int | None,
) -> tuple[TileStats, Tensor, Tensor]:
    """Return statistics `[R]`, squared probabilities of the other tokens `[R]`, best token of the conflicts `[C]`."""
    logits_RV = functional.linear(hidden_RD, head_VD, bias_V)
    seen = backend.tile_statistics(logits_RV, labels_R, transform, topk)
    conflict_R = TokenStats(seen.nll, seen.entropy, None, seen.correct, len(head_VD)).conflict
    # scale and softcap preserve the order
    return seen, _other_squares(logits_RV, labels_R, seen, transform), logits_RV[conflict_R].argmax(-1)


def _other_squares(logits_RV: Tensor, labels_R: Tensor, seen: TileStats, transform: LogitsTransform) -> Tensor:
    """Return the sum of the squared probabilities of all tokens except the label, `[R]`.

    The label's is left out rather than subtracted: where it is nearly all of the sum, only rounding would remain.
    """
    budget = _SCRATCH_BYTES.get(logits_RV.device.type, _SCRATCH_BYTES_DEVICE)
    step = max(1, budget // (logits_RV.shape[1] * seen.nll.element_size()))
    sums = []
    for logits, labels, maximum in zip(
        logits_RV.split(step), labels_R.split(step), seen.maximum.split(step), strict=True
    ):
        # a copy even if the tile has this dtype already
        z = logits.to(seen.nll.dtype, copy=True)
        transform.apply_(z)
        z.sub_(maximum[:, None]).scatter_(1, labels[:, None], -torch.inf)
        sums.append(z.mul_(2).exp_().sum(-1))
    return torch.cat(sums) / (1 + seen.rest).square()
