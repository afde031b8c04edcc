"""The three gradients of the loss sum, added up tile by tile: which GEMM, into what, in which precision.

Legend: N rows, R rows of a tile, H hidden size, V vocabulary; grad_RV is the gradient by a tile's raw projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A bfloat16 sum over up to four tiles adds nothing measurable to the rounding of its GEMMs (2.4e-3 over two tiles
# against 2.1e-3 in one); the error grows like the square root of their number, so beyond that it is kept in float32.
_LOW_PRECISION_TILES = 4

# Rows of the weight gradient formed at a time when it is summed in float32, so that the product stays in cache.
_ACCUMULATE_ROWS = 2048

# A tile of fewer rows is padded for the product that sums over the vocabulary: the matrix-vector kernels that libraries
# take for a handful of rows add in one running sum (relative error 1e-5 over 262,144 tokens, 7e-7 from here on).
_FEW_ROWS = 16

# Elements scaled at a time when a low-precision gradient is multiplied in float32.
_SCALE_ELEMENTS = 1 << 22


class Gradients:
    """Gradients by hidden `[N, H]`, weight `[V, H]` and bias `[V]`; one that is not needed is never formed."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, needed: tuple[bool, bool, bool], tiles: int):
        need_hidden, need_weight, need_bias = needed
        # float16 in float32 whatever the number: a sum over rows can leave its range
        low_precision = weight_VH.dtype == torch.bfloat16 and tiles <= _LOW_PRECISION_TILES
        sum_dtype = weight_VH.dtype if low_precision or weight_VH.dtype == torch.float64 else torch.float32
        vocab = weight_VH.shape[0]
        self._head_VH = weight_VH
        self._first = True
        self.hidden = torch.zeros_like(hidden_NH) if need_hidden else None
        self.weight = weight_VH.new_empty(weight_VH.shape, dtype=sum_dtype) if need_weight else None
        self.bias = (
            weight_VH.new_zeros(vocab, dtype=torch.promote_types(sum_dtype, torch.float32)) if need_bias else None
        )

    @property
    def needed(self) -> bool:
        return any(gradient is not None for gradient in (self.hidden, self.weight, self.bias))

    def add(self, rows: Tensor | slice, hidden_RH: Tensor, grad_RV: Tensor) -> None:
        """Adds one tile. `rows` are the places of its rows among the N."""
        if self.hidden is not None:
            if len(grad_RV) < _FEW_ROWS:
                padding = grad_RV.new_zeros(_FEW_ROWS - len(grad_RV), grad_RV.shape[1])
                self.hidden[rows] = (torch.cat([grad_RV, padding]) @ self._head_VH)[: len(grad_RV)]
            elif isinstance(rows, slice):
                torch.mm(grad_RV, self._head_VH, out=self.hidden[rows])
            else:
                self.hidden[rows] = grad_RV @ self._head_VH
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
        if self.weight.dtype == hidden_RH.dtype:
            # the first tile writes: no zero fill, no read of fresh memory
            if self._first:
                torch.mm(grad_RV.t(), hidden_RH, out=self.weight)
            else:
                self.weight.addmm_(grad_RV.t(), hidden_RH)
            return
        for start in range(0, self.weight.shape[0], _ACCUMULATE_ROWS):
            block = slice(start, start + _ACCUMULATE_ROWS)
            product = _product_float32(grad_RV[:, block].t(), hidden_RH)
            if self._first:
                self.weight[block] = product
            else:
                self.weight[block] += product


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiplies in place by a float32 scalar, in float32: a scalar rounded to bfloat16 would scale every gradient by
    up to 0.4 % too much or too little."""
    if gradient.dtype in (torch.float32, torch.float64):
        return gradient.mul_(factor)
    for part in gradient.view(-1).split(_SCALE_ELEMENTS):
        part.copy_(part.float().mul_(factor))
    return gradient


def _product_float32(left: Tensor, right: Tensor) -> Tensor:
    """A product of low-precision matrices for a float32 sum, not rounded on the way where the device can do so. A float16
    one must not be: it can leave the range of float16 within a single tile."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype == torch.float16:
        return torch.mm(left.float(), right.float())
    return torch.mm(left, right)
