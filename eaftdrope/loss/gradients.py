"""The gradients of the loss sum with respect to hidden, weight and bias, added up piece by piece: which GEMM, into what,
in which precision.

`Gradients` adds tiles of rows, `ColumnGradients` slices of the vocabulary over all rows.

Legend: N rows, R rows of a tile, O open rows, D hidden size, V vocabulary, C columns of a slice of it, B rows of a block
of the weight gradient; grad_RV is the gradient with respect to a tile's raw projections.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .backends import Backend
from .products import is_widened, multiply, multiply_for_sum, multiply_into

# A bfloat16 sum over up to four tiles adds nothing measurable to the rounding of its GEMMs (2.4e-3 over two tiles
# against 2.1e-3 in one); the error grows like the square root of their number, so beyond that it is kept in float32.
_LOW_PRECISION_TILES = 4

# Rows of the weight gradient formed at a time when it is summed in float32: the product stays in a CPU's cache. A device
# is faster with fewer launches.
_ACCUMULATE_ROWS = {"cpu": 2048}
_ACCUMULATE_ROWS_DEVICE = 16_384

NeedsGrad: TypeAlias = tuple[bool, bool, bool]
"""Which gradients are needed: with respect to hidden, weight and bias."""

ThreeGradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients with respect to hidden `[N, D]`, weight `[V, D]` and bias `[V]`; None where not needed."""


def sum_dtype(dtype: torch.dtype, pieces: int) -> torch.dtype:
    """Return the dtype in which a weight gradient of `dtype` is summed over so many tiles."""
    # float16 always in float32: a sum over rows can leave its range
    low_precision = dtype == torch.bfloat16 and pieces <= _LOW_PRECISION_TILES
    return dtype if low_precision or dtype == torch.float64 else torch.float32


class Gradients:
    """The three gradients, from tiles of rows; one that is not needed is never formed.

    Args:
        dtype (`torch.dtype`): of the sum of weight gradients; see [`sum_dtype`].
    """

    def __init__(self, hidden_ND: Tensor, head_VD: Tensor, needs_grad: NeedsGrad, backend: Backend, dtype: torch.dtype):
        needs_hidden, needs_weight, needs_bias = needs_grad
        self._head_VD = head_VD
        self._backend = backend
        self._first = True
        self.hidden = torch.zeros_like(hidden_ND) if needs_hidden else None
        self.weight = head_VD.new_empty(head_VD.shape, dtype=dtype) if needs_weight else None
        self.bias = _bias_sum(head_VD) if needs_bias else None

    def add(self, rows: Tensor | slice, hidden_RD: Tensor, grad_RV: Tensor) -> None:
        """Add one tile. `rows` are the indices of its rows among the N."""
        if self.hidden is not None:
            self.hidden[rows] = multiply(grad_RV, self._head_VD)
        if self.weight is not None:
            self._add_weight(self.weight, grad_RV, hidden_RD)
        if self.bias is not None:
            self.bias += grad_RV.sum(0, dtype=self.bias.dtype)
        self._first = False

    def finish(self) -> ThreeGradients:
        """Return the three gradients; zeros where no tile was added."""
        if self.weight is not None and self._first:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias

    def _add_weight(self, sum_VD: Tensor, grad_RV: Tensor, hidden_RD: Tensor) -> None:
        if sum_VD.dtype == hidden_RD.dtype or is_widened(hidden_RD):
            # the first tile writes: no zero fill, no read of fresh memory
            multiply_into(sum_VD, grad_RV.t(), hidden_RD, add=not self._first)
            return
        step = _ACCUMULATE_ROWS.get(grad_RV.device.type, _ACCUMULATE_ROWS_DEVICE)
        for start in range(0, sum_VD.shape[0], step):
            block = slice(start, start + step)
            product_BD = multiply_for_sum(grad_RV[:, block].t(), hidden_RD)
            self._backend.accumulate(sum_VD[block], product_BD, not self._first)


class ColumnGradients:
    """The three gradients, from slices of the vocabulary, each over all open rows at once.

    A slice of the weight gradient is one GEMM, written once, so nothing is accumulated; the gradient with respect to the
    hidden states is summed in float32.

    Args:
        rows_O (`Tensor` `[O]`): the indices of the open rows among the N.
        dtype (`torch.dtype`): of the weight gradient; float32 for float16.
    """

    def __init__(self, hidden_ND: Tensor, head_VD: Tensor, needs_grad: NeedsGrad, rows_O: Tensor, dtype: torch.dtype):
        needs_hidden, needs_weight, needs_bias = needs_grad
        self._head_VD, self._hidden_ND, self._rows_O = head_VD, hidden_ND, rows_O
        self._single = torch.promote_types(head_VD.dtype, torch.float32)
        dtype = torch.float32 if dtype == torch.float16 else dtype
        shape = len(rows_O), hidden_ND.shape[1]
        self._sum_OD = hidden_ND.new_zeros(shape, dtype=self._single) if needs_hidden else None
        self._weight = head_VD.new_empty(head_VD.shape, dtype=dtype) if needs_weight else None
        self._bias = _bias_sum(head_VD) if needs_bias else None

    def add(self, columns: slice, hidden_OD: Tensor, grad_OC: Tensor) -> None:
        """Add one slice."""
        if self._sum_OD is not None:
            self._sum_OD += multiply(grad_OC, self._head_VD[columns])
        if self._weight is not None and self._weight.dtype == grad_OC.dtype:
            multiply_into(self._weight[columns], grad_OC.t(), hidden_OD)
        elif self._weight is not None:
            self._weight[columns] = multiply_for_sum(grad_OC.t(), hidden_OD)
        if self._bias is not None:
            self._bias[columns] = grad_OC.sum(0, dtype=self._single)

    def finish(self) -> ThreeGradients:
        """Return the three gradients; zeros where no row was open."""
        grad_ND = None
        if self._sum_OD is not None:
            grad_ND = torch.zeros_like(self._hidden_ND)
            grad_ND[self._rows_O] = self._sum_OD.to(grad_ND.dtype)
        return grad_ND, self._weight, self._bias


def _bias_sum(head_VD: Tensor) -> Tensor:
    return head_VD.new_zeros(head_VD.shape[0], dtype=torch.promote_types(head_VD.dtype, torch.float32))
