"""Which rows of a call are trained.

Normally those alone are gathered, which a device tells the host once a call: one wait, for GEMMs over a fraction of the
rows. Inside a CUDA graph nothing can be waited for: there all rows are computed, and ignored ones weigh nothing.

Legend: N rows of the call, T of them trained (in a CUDA graph T = N).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_labels


@dataclass(frozen=True)
class TrainedRows:
    """The trained rows.

    Args:
        labels (`Tensor` `[T]`, int64): their labels, all in the vocabulary.
        sequence (`Tensor` `[T]` or `None`): their sequences.
        index (`Tensor` `[T]` or `None`): their places among the N rows; None for all of them.
        trained (`Tensor` `[N]` bool, or `None`): in a CUDA graph, which rows are really trained.
    """

    labels: Tensor
    sequence: Tensor | None
    index: Tensor | None
    trained: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def is_static(self) -> bool:
        """Whether the rows are the same whatever the labels."""
        return self.trained is not None

    def places(self, rows: Tensor | slice) -> Tensor | slice:
        """Places among the N of some of the T rows. Where every row is trained a slice stays one: nothing is gathered."""
        return rows if self.index is None else self.index[rows]

    def mask(self, weight: Tensor, rows: slice) -> Tensor:
        """Weights of some rows, 0 where a row is not trained."""
        return weight if self.trained is None else torch.where(self.trained[rows], weight, 0)


def trained_rows(labels_N: Tensor, sequence_N: Tensor | None, ignore_index: int, vocab_size: int) -> TrainedRows:
    """The rows whose label is not `ignore_index`.

    Raises:
        ValueError: a label outside the vocabulary. In a CUDA graph labels can not be looked at: there the device
            asserts.
    """
    is_trained_N = labels_N != ignore_index
    labels_N = labels_N.long()
    inside_N = is_trained_N & (labels_N >= 0) & (labels_N < vocab_size)
    if _is_capturing(labels_N.device):
        torch._assert_async((inside_N == is_trained_N).all())
        return TrainedRows(torch.where(inside_N, labels_N, 0), sequence_N, None, is_trained_N)
    # one wait of the host for both numbers
    count, inside = torch.stack([is_trained_N.sum(), inside_N.sum()]).tolist()
    if inside < count:
        check_labels(labels_N[is_trained_N], vocab_size, ignore_index)
    if count == len(labels_N):
        return TrainedRows(labels_N, sequence_N, None)
    index_T = torch.nonzero_static(is_trained_N, size=count).squeeze(1)
    return TrainedRows(labels_N[index_T], None if sequence_N is None else sequence_N[index_T], index_T)


def _is_capturing(device: torch.device) -> bool:
    """Whether what runs now is written into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
