"""Tail-sparse backward (`tail="sparse"`): only the columns of the vocabulary that matter reach the gradient GEMMs.

For a group of rows, column v is kept if any of its gradients w_t (p_v - 1[v = y_t]) reaches the threshold
(`LossSettings.tail_threshold`), *after* the gate: a row whose gate is nearly closed keeps nothing. dX and dW are formed
from the kept columns. The dropped part of a row is a small positive mass spread over many columns; its pull on dX is
restored as

    dX_t += m_t * e        m_t = dropped gradient of the row        e = mean of the dropped embedding rows, by their mass

one rank-1 term per group, without which the error of dX is ten times larger. All e of a call are one thin GEMM.

Legend: N rows, R rows of a group, D hidden size, V vocabulary, C kept columns, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Backend
from .gradients import Gradients, NeedsGrad, ThreeGradients
from .products import multiply, multiply_for_sum

# Rows that share one set of kept columns: fewer rows keep fewer columns, but need GEMMs of few rows.
GROUP_ROWS = 256

# Rows that count as one tile when the precision of the weight gradient's sum is chosen: most columns are kept by fewer than
# half of the groups, so their sums are rounded less often than there are groups.
ROWS_PER_SUM = 2 * GROUP_ROWS

# Groups whose rank-1 terms are formed by one GEMM.
_GROUPS_AT_ONCE = 16


class TailSparseGradients(Gradients):
    """[`Gradients`] from the columns that matter.

    Args:
        threshold (`float`): gradients with respect to a logit below this are dropped.
        rows_sum_to_zero (`bool`): the gradient of a row with respect to its projections sums to 0 (no softcap).
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        head_VD: Tensor,
        needs_grad: NeedsGrad,
        backend: Backend,
        dtype: torch.dtype,
        threshold: float,
        rows_sum_to_zero: bool,
    ) -> None:
        super().__init__(hidden_ND, head_VD, needs_grad, backend, dtype)
        self._threshold = threshold
        self._rows_sum_to_zero = rows_sum_to_zero
        self._tails: list[tuple[Tensor, Tensor, Tensor]] = []
        self.kept_columns: list[int] = []
        if self.weight is not None:
            self.weight.zero_()

    def add(self, rows: Tensor | slice, hidden_RD: Tensor, grad_RV: Tensor) -> None:
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=grad_RV.device)
        for group in torch.arange(len(grad_RV), device=grad_RV.device).split(GROUP_ROWS):
            part = slice(int(group[0]), int(group[-1]) + 1)
            self._add_group(rows[part], hidden_RD[part], grad_RV[part])
        self._first = False

    def finish(self) -> ThreeGradients:
        self._add_tails()
        return super().finish()

    def _add_group(self, rows_R: Tensor, hidden_RD: Tensor, grad_RV: Tensor) -> None:
        keep_V, mass_V = self._backend.tile_columns(grad_RV, self._threshold)
        columns_C = keep_V.nonzero().squeeze(1)
        self.kept_columns.append(len(columns_C))
        grad_RC = self._backend.gather_columns(grad_RV, columns_C)
        if self.hidden is not None:
            self.hidden[rows_R] = multiply(grad_RC, self._head_VD[columns_C])
            tail_R = -grad_RC.sum(1, dtype=torch.float32)
            if not self._rows_sum_to_zero:
                tail_R += grad_RV.sum(1, dtype=torch.float32)
            self._tails.append((rows_R, tail_R, mass_V.masked_fill(keep_V, 0)))
            if len(self._tails) == _GROUPS_AT_ONCE:
                self._add_tails()
        if self.weight is not None:
            product_CD = multiply_for_sum(grad_RC.t(), hidden_RD)
            self._backend.add_rows_(self.weight, columns_C, product_CD)
        if self.bias is not None:
            # exact: every column has its sum over the rows
            self.bias += mass_V

    def _add_tails(self) -> None:
        """Add the rank-1 terms of the groups since the last call."""
        if self.hidden is None or not self._tails:
            return
        mass_GV = torch.stack([mass_V for _, _, mass_V in self._tails])
        # divided by their largest first, so that float16 can hold them
        size_G1 = mass_GV.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        total_G1 = (mass_GV / size_G1).sum(1, keepdim=True)
        mean_GD = multiply((mass_GV / size_G1).to(self._head_VD.dtype), self._head_VD).float() / total_G1
        # no mass was dropped, or it cancels: no mean exists. A NaN stays visible
        mean_GD = torch.where(total_G1.abs() <= 0.5, 0, mean_GD)
        for (rows_R, tail_R, _), mean_D in zip(self._tails, mean_GD):
            self.hidden[rows_R] += (tail_R[:, None] * mean_D).to(self.hidden.dtype)
        self._tails.clear()
