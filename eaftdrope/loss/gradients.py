"""The three gradients of the loss sum, added up piece by piece: which GEMM, into what, in which precision.

`Gradients` takes tiles of rows, `ColumnGradients` slices of the vocabulary over all rows.

Legend: N rows, R rows of a tile, H hidden size, V vocabulary, C columns of a slice of it; grad_RV is the gradient by a
tile's raw projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Backend
from .products import is_widened, multiply, multiply_for_sum, multiply_into

# A bfloat16 sum over up to four tiles adds nothing measurable to the rounding of its GEMMs (2.4e-3 over two tiles
# against 2.1e-3 in one); the error grows like the square root of their number, so beyond that it is kept in float32.
_LOW_PRECISION_TILES = 4

# Rows of the weight gradient formed at a time when it is summed in float32: the product stays in a CPU's cache. A device
# wants fewer launches.
_ACCUMULATE_ROWS = {"cpu": 2048}
_ACCUMULATE_ROWS_DEVICE = 16_384

Needed = tuple[bool, bool, bool]
"""Whether the gradients by hidden, weight and bias are asked for."""


def sum_dtype(dtype: torch.dtype, pieces: int) -> torch.dtype:
    """In what a weight gradient of this dtype is summed over so many tiles."""
    # float16 in float32 whatever the number: a sum over rows can leave its range
    low_precision = dtype == torch.bfloat16 and pieces <= _LOW_PRECISION_TILES
    return dtype if low_precision or dtype == torch.float64 else torch.float32


class Gradients:
    """Gradients by hidden `[N, H]`, weight `[V, H]` and bias `[V]`; one that is not needed is never formed.

    Args:
        dtype (`torch.dtype`): what the weight gradient is summed in; see [`sum_dtype`].
    """

    def __init__(self, hidden_NH: Tensor, head_VH: Tensor, needed: Needed, backend: Backend, dtype: torch.dtype):
        need_hidden, need_weight, need_bias = needed
        self._head_VH = head_VH
        self._backend = backend
        self._first = True
        self.hidden = torch.zeros_like(hidden_NH) if need_hidden else None
        self.weight = head_VH.new_empty(head_VH.shape, dtype=dtype) if need_weight else None
        self.bias = _bias_sum(head_VH) if need_bias else None

    def add(self, rows: Tensor | slice, hidden_RH: Tensor, grad_RV: Tensor) -> None:
        """Adds one tile. `rows` are the places of its rows among the N."""
        if self.hidden is not None:
            self.hidden[rows] = multiply(grad_RV, self._head_VH)
        if self.weight is not None:
            self._add_weight(grad_RV, hidden_RH)
        if self.bias is not None:
            self.bias += grad_RV.sum(0, dtype=self.bias.dtype)
        self._first = False

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients; a weight gradient that no tile reached is zero."""
        if self.weight is not None and self._first:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias

    def _add_weight(self, grad_RV: Tensor, hidden_RH: Tensor) -> None:
        if self.weight.dtype == hidden_RH.dtype or is_widened(hidden_RH):
            # the first tile writes: no zero fill, no read of fresh memory
            multiply_into(self.weight, grad_RV.t(), hidden_RH, add=not self._first)
            return
        step = _ACCUMULATE_ROWS.get(grad_RV.device.type, _ACCUMULATE_ROWS_DEVICE)
        for start in range(0, self.weight.shape[0], step):
            block = slice(start, start + step)
            product_BH = multiply_for_sum(grad_RV[:, block].t(), hidden_RH)
            self._backend.accumulate(self.weight[block], product_BH, not self._first)


class ColumnGradients:
    """The gradients from slices of the vocabulary, each over all open rows at once: a slice of the weight gradient is one
    GEMM, written once, so there is nothing to accumulate; the gradient by the rows is summed in float32.

    Args:
        rows_O (`Tensor` `[O]`): the places of the open rows among the N.
        dtype (`torch.dtype`): of the weight gradient; a float16 one comes in float32.
    """

    def __init__(self, hidden_NH: Tensor, head_VH: Tensor, needed: Needed, rows_O: Tensor, dtype: torch.dtype):
        need_hidden, need_weight, need_bias = needed
        self._head_VH, self._hidden_NH, self._rows_O = head_VH, hidden_NH, rows_O
        self._single = torch.promote_types(head_VH.dtype, torch.float32)
        dtype = torch.float32 if dtype == torch.float16 else dtype
        self._sum_OH = hidden_NH.new_zeros(len(rows_O), hidden_NH.shape[1], dtype=self._single) if need_hidden else None
        self._weight = head_VH.new_empty(head_VH.shape, dtype=dtype) if need_weight else None
        self._bias = _bias_sum(head_VH) if need_bias else None

    def add(self, columns: slice, hidden_OH: Tensor, grad_OC: Tensor) -> None:
        """Adds one slice."""
        if self._sum_OH is not None:
            self._sum_OH += multiply(grad_OC, self._head_VH[columns])
        if self._weight is not None and self._weight.dtype == grad_OC.dtype:
            multiply_into(self._weight[columns], grad_OC.t(), hidden_OH)
        elif self._weight is not None:
            self._weight[columns] = multiply_for_sum(grad_OC.t(), hidden_OH)
        if self._bias is not None:
            self._bias[columns] = grad_OC.sum(0, dtype=self._single)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients; zero where no row was open."""
        grad_NH = None
        if self._sum_OH is not None:
            grad_NH = torch.zeros_like(self._hidden_NH)
            grad_NH[self._rows_O] = self._sum_OH.to(grad_NH.dtype)
        return grad_NH, self._weight, self._bias


def _bias_sum(head_VH: Tensor) -> Tensor:
    return head_VH.new_zeros(head_VH.shape[0], dtype=torch.promote_types(head_VH.dtype, torch.float32))
