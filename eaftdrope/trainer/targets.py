"""The target of each position in a batch of labels: the label of the next token, its weight, and its sequence.

Legend: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eaftdrope.errors import UserError


def shift_left(values: Tensor, last: float = -100) -> Tensor:
    """Return the values (labels) of the next token, `[B, T]`: position t gets that of t + 1, and the last one `last`."""
    return nn.functional.pad(values[..., 1:], (0, 1), value=last)


def sequence_ids(labels: Tensor, position_ids: Tensor | None) -> Tensor:
    """Return the number of the sequence of each position, `[B, T]`; in packed rows a sequence starts where position_ids
    are 0."""
    if position_ids is None:
        return torch.arange(labels.shape[0], device=labels.device)[:, None].expand_as(labels)
    starts = (position_ids.expand_as(labels) == 0).flatten()
    return starts.cumsum(0).view_as(labels)


def shifted_targets(
    labels: Tensor | None, shift_labels: Tensor | None, token_weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the label of the next token at each position, and its weight."""
    if shift_labels is None:
        assert labels is not None
        return shift_left(labels), None if token_weights is None else shift_left(token_weights, 1)
    if token_weights is not None:
        raise UserError("token_weights belong to labels, not to shift_labels: pass labels, which are shifted here.")
    return shift_labels, None
