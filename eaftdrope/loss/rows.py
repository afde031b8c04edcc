"""The trained rows of a call.

Normally only they are gathered. Their number has to reach the host, which waits for the device once per call; the GEMMs
then cover a fraction of the rows. Inside a CUDA graph the host cannot wait: there all rows are computed, and ignored ones
have weight 0.

Legend: N rows of the call, T of them trained (in a CUDA graph T = N).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_labels
from .definition import weigh


@dataclass(frozen=True)
class TrainedRows:
    """The trained rows.

    Args:
        labels (`Tensor` `[T]`, int64): their labels, all in the vocabulary.
        sequence (`Tensor` `[T]` or `None`): their sequences.
        token_weight (`Tensor` `[T]` or `None`): their own weights (`definition.weigh`).
        index (`Tensor` `[T]` or `None`): their indices among the N rows; None for all of them.
        trained (`Tensor` `[N]` bool, or `None`): in a CUDA graph, the mask of the rows that are really trained.
    """

    labels: Tensor
    sequence: Tensor | None
    token_weight: Tensor | None
    index: Tensor | None
    trained: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def is_static(self) -> bool:
        """True if the rows do not depend on the labels (in a CUDA graph)."""
        return self.trained is not None

    def indices(self, rows: Tensor | slice) -> Tensor | slice:
        """Return the indices among the N of some of the T rows. If every row is trained a slice stays a slice, and nothing
        is gathered."""
        return rows if self.index is None else self.index[rows]

    def weigh(self, gate: Tensor, rows: Tensor | slice) -> Tensor:
        """Return the weights of some rows from their gates, 0 where a row is not trained."""
        return self.mask(weigh(gate, None if self.token_weight is None else self.token_weight[rows]), rows)

    def mask(self, value: Tensor, rows: Tensor | slice) -> Tensor:
        """Return values of some rows, 0 where a row is not trained."""
        return value if self.trained is None else torch.where(self.trained[rows], value, 0)


def trained_rows(
    labels_N: Tensor, sequence_N: Tensor | None, token_weight_N: Tensor | None, ignore_index: int, vocab_size: int
) -> TrainedRows:
    """Return the rows whose label is not `ignore_index`.

    Raises:
        ValueError: a label outside the vocabulary. In a CUDA graph the host cannot read labels: there the device asserts.
    """
    is_trained_N = labels_N != ignore_index
    labels_N = labels_N.long()
    inside_N = is_trained_N & (labels_N >= 0) & (labels_N < vocab_size)
    if _is_capturing(labels_N.device):
        torch._assert_async((inside_N == is_trained_N).all())
        return TrainedRows(torch.where(inside_N, labels_N, 0), sequence_N, token_weight_N, None, is_trained_N)
    # the host waits once for both numbers
    count, inside = torch.stack([is_trained_N.sum(), inside_N.sum()]).tolist()
    if inside < count:
        check_labels(labels_N[is_trained_N], vocab_size, ignore_index)
    if count == len(labels_N):
        return TrainedRows(labels_N, sequence_N, token_weight_N, None)
    index_T = torch.nonzero_static(is_trained_N, size=count).squeeze(1)
    sequence_T, token_weight_T = (
        None if values is None else values[index_T] for values in (sequence_N, token_weight_N)
    )
    return TrainedRows(labels_N[index_T], sequence_T, token_weight_T, index_T)


def _is_capturing(device: torch.device) -> bool:
    """True while a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
