"""The portable backend: torch operations only, any device and floating dtype.

Notable:
- Works through the tile in blocks of rows that stay in cache, in float32 (float64 for float64 logits).
- Entropy from shifted sums with the maximum kept out of them: with x = z - max z,
      r = sum_{v not the maximum} e^x        s = sum_{v not the maximum} -x e^x
      H = log1p(r) + s / (1 + r)             -log p_y = log1p(r) - x_y
  Every term is >= 0, so nothing cancels: relative error about 2e-7 even at H = 1e-6, and H is never negative.
- Top-K by block maxima: the K blocks with the largest maxima hold the K largest logits, so only K blocks are sorted.
- p_y - 1 is formed once, as expm1(-nll): it keeps its digits where p_y is close to 1.

Legend: R rows of a tile, B rows of a block, V vocabulary, C columns of a column block, G = ceil(V / C) column blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from .tile import AnchorStats, BaseTile, LogitsTransform, TileStats

# Columns of a block, which has one maximum: small enough that sorting K of these blocks is cheap, wide enough to reduce
# with vector instructions.
_COLUMN_BLOCK = 64

# Scratch bytes of a row block. On a CPU it should stay in the shared cache; on a device a larger one saves launches.
_SCRATCH_BYTES = {"cpu": 4 << 20}
_SCRATCH_BYTES_DEVICE = 64 << 20

# Elements of a low-precision gradient that are multiplied in float32 at a time: in cache on a CPU.
_SCALED_ELEMENTS = {"cpu": 1 << 18}
_SCALED_ELEMENTS_DEVICE = 1 << 25


def unavailable(device: torch.device, dtype: torch.dtype) -> None:
    """Return None: it works on any device and floating dtype."""
    return None


def tile_statistics(logits_RV: Tensor, labels_R: Tensor, transform: LogitsTransform, topk: int | None) -> TileStats:
    """Return the statistics of every row of a tile; the tile is only read."""
    rows, vocab = logits_RV.shape
    compute_dtype = torch.float64 if logits_RV.dtype == torch.float64 else torch.float32
    columns = {
        name: torch.empty(rows, dtype=compute_dtype, device=logits_RV.device)
        for name in ("nll", "entropy", "maximum", "rest")
    }
    topk_entropy_R = torch.empty_like(columns["nll"]) if topk is not None else None
    correct_R = torch.empty(rows, dtype=torch.bool, device=logits_RV.device)

    # padded to whole column blocks with -inf, which adds nothing to any sum and is never a maximum
    padded = math.ceil(vocab / _COLUMN_BLOCK) * _COLUMN_BLOCK
    for block, x_BV in _row_blocks(logits_RV, padded, compute_dtype):
        _load(x_BV, logits_RV[block], transform)
        x_BGC = x_BV.view(x_BV.shape[0], -1, _COLUMN_BLOCK)
        block_max_BG = x_BGC.amax(-1)
        maximum_B, argmax_block_B = block_max_BG.max(-1)
        x_BV.sub_(maximum_B[:, None])
        target_B = x_BV.gather(1, labels_R[block, None].clamp(0, vocab - 1)).squeeze(1)
        if topk is not None and topk_entropy_R is not None:
            topk_entropy_R[block] = _topk_entropy(x_BGC, block_max_BG, min(topk, vocab))
        # one occurrence of the maximum is kept out; ties stay in, each adding exactly 1
        in_block_B = x_BGC[torch.arange(len(x_BGC), device=x_BV.device), argmax_block_B].argmax(-1)
        argmax_B = argmax_block_B * _COLUMN_BLOCK + in_block_B
        rest_B, spread_B = _shifted_sums(x_BV, argmax_B)

        log_rest_B = rest_B.log1p()
        columns["nll"][block] = log_rest_B - target_B
        columns["entropy"][block] = log_rest_B + spread_B / (1 + rest_B)
        if topk_entropy_R is not None:
            # a logit of +inf shows: it must not close the gate
            topk_entropy_R[block] += torch.where(columns["entropy"][block].isnan(), torch.nan, 0)
        columns["maximum"][block] = maximum_B
        columns["rest"][block] = rest_B
        correct_R[block] = target_B == 0
    return TileStats(
        nll=columns["nll"],
        entropy=columns["entropy"],
        maximum=columns["maximum"],
        rest=columns["rest"],
        topk_entropy=topk_entropy_R,
        correct=correct_R,
    )


def tile_gradient_(
    logits_RV: Tensor, labels_R: Tensor, stats: TileStats, weight_R: Tensor, transform: LogitsTransform
) -> None:
    """Overwrite the tile with the gradient of sum_t w_t nll_t with respect to its raw projections,
    `w (softmax(z) - onehot(y))` times the derivative of the transform. The tile may be a slice of the vocabulary; labels
    count from its start."""
    for block, z_BV in _row_blocks(logits_RV, logits_RV.shape[1], stats.nll.dtype):
        _load(z_BV, logits_RV[block], transform)
        slope_BV = _slope(z_BV, transform)
        weight_B1 = weight_R[block, None]
        z_BV.sub_(stats.maximum[block, None]).exp_().mul_(weight_B1 / (1 + stats.rest[block, None]))
        target_B1 = weight_B1 * torch.expm1(-stats.nll[block, None])
        _store(logits_RV, block, z_BV, labels_R, target_B1, slope_BV, transform)


def anchored_statistics(
    logits_RV: Tensor, labels_R: Tensor, transform: LogitsTransform, topk: int | None, base: BaseTile
) -> TileStats:
    """[`tile_statistics`] with the anchor's, for a tile and its base; both are only read."""
    stats = tile_statistics(logits_RV, labels_R, transform, topk)
    columns = {field.name: torch.empty_like(stats.nll) for field in fields(AnchorStats)}
    for block, z_BV, b_BV in _pairs(logits_RV, transform, base, stats.nll.dtype):
        if base.mask_target:
            for value_BV in (z_BV, b_BV):
                _put_(value_BV, labels_R[block, None], torch.full_like(value_BV[:, :1], float("-inf")))
        maximum_B, base_maximum_B = z_BV.amax(-1), b_BV.amax(-1)
        z_BV.sub_(maximum_B[:, None])
        b_BV.sub_(base_maximum_B[:, None])
        rest_B = z_BV.exp().sum(-1) - 1 if base.mask_target else stats.rest[block]
        base_rest_B = b_BV.exp().sum(-1) - 1
        first_BV, second_BV, others_B = (b_BV, z_BV, base_rest_B) if base.forward else (z_BV, b_BV, rest_B)
        # log (sum of the second / sum of the first)
        log_ratio_B = rest_B.log1p() - base_rest_B.log1p()
        exp_BV = first_BV.exp()
        # a token that the first distribution excludes adds nothing: 0 * inf would be NaN
        gap_B = torch.where(exp_BV == 0, 0, exp_BV * (first_BV - second_BV)).sum(-1)
        divergence_B = gap_B / (1 + others_B) + (log_ratio_B if base.forward else -log_ratio_B)
        # rounding can push it below zero
        columns["divergence"][block] = divergence_B.clamp_min(0)
        columns["maximum"][block], columns["base_maximum"][block] = maximum_B, base_maximum_B
        columns["rest"][block], columns["base_rest"][block] = rest_B, base_rest_B
    return replace(stats, anchor=AnchorStats(**columns))


def anchored_gradient_(
    logits_RV: Tensor,
    labels_R: Tensor,
    stats: TileStats,
    weight_R: Tensor,
    transform: LogitsTransform,
    base: BaseTile,
    anchor_R: Tensor,
) -> None:
    """[`tile_gradient_`] of sum_t (w_t nll_t + a_t D_t), a_t in `anchor_R`: per logit, times the derivative of the transform,

    forward      w (p - onehot(y)) + a (p' - q')         p', q' compared distributions: without the label if masked
    reverse      w (p - onehot(y)) + a p' (log p' - log q' - D)
    """
    anchor = stats.anchor
    assert anchor is not None, "from anchored_statistics"
    for block, z_BV, b_BV in _pairs(logits_RV, transform, base, stats.nll.dtype):
        slope_BV = _slope(z_BV, transform)
        weight_B1, anchor_B1, rest_B1, base_rest_B1 = (
            value[block, None] for value in (weight_R, anchor_R, anchor.rest, anchor.base_rest)
        )
        z_BV.sub_(anchor.maximum[block, None])
        b_BV.sub_(anchor.base_maximum[block, None])
        if base.forward:
            z_BV.exp_()
            pull_BV = z_BV * (anchor_B1 / (1 + rest_B1)) - b_BV.exp_().mul_(anchor_B1 / (1 + base_rest_B1))
        else:
            offset_B1 = anchor.divergence[block, None] + rest_B1.log1p() - base_rest_B1.log1p()
            b_BV.neg_().add_(z_BV).sub_(offset_B1)
            z_BV.exp_()
            pull_BV = torch.where(z_BV == 0, 0, z_BV * b_BV).mul_(anchor_B1 / (1 + rest_B1))
        labels_B1 = labels_R[block, None].clamp(0, z_BV.shape[1] - 1)
        target_B1 = weight_B1 * torch.expm1(-stats.nll[block, None])
        if not base.mask_target:
            target_B1 = target_B1 + pull_BV.gather(1, labels_B1)
        # from e^(z - maximum of the compared distribution) to p
        scale_B = (anchor.maximum - stats.maximum)[block].exp() / (1 + stats.rest[block])
        z_BV.mul_(weight_B1 * scale_B[:, None]).add_(pull_BV)
        _store(logits_RV, block, z_BV, labels_R, target_B1, slope_BV, transform)


def accumulate(sum_VD: Tensor, product_VD: Tensor, add: bool) -> None:
    """Compute `sum += product` in float32, or `sum = product`."""
    if add:
        sum_VD += product_VD
    else:
        sum_VD.copy_(product_VD)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `gradient * factor` in `dtype`, multiplied in float32 and rounded once; in place where the dtype stays. A factor
    rounded to bfloat16 would scale every gradient by up to 0.4 % too much or too little."""
    if gradient.dtype in (torch.float32, torch.float64):
        return gradient.mul_(factor).to(dtype)
    result = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    step = _SCALED_ELEMENTS.get(gradient.device.type, _SCALED_ELEMENTS_DEVICE)
    for part, scaled_part in zip(gradient.view(-1).split(step), result.view(-1).split(step)):
        scaled_part.copy_(part.float().mul_(factor))
    return result


def tile_columns(grad_RV: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the columns that hold an absolute gradient of at least `threshold` or a NaN (`[V]` bool), and the sums of all
    columns (`[V]` float32)."""
    # tests for small values, which a NaN is not
    keep_V = ~((grad_RV.amax(0) < threshold) & (grad_RV.amin(0) > -threshold))
    return keep_V, grad_RV.sum(0, dtype=torch.promote_types(grad_RV.dtype, torch.float32))


def gather_columns(grad_RV: Tensor, columns_C: Tensor) -> Tensor:
    """Return the given columns, `[R, C]` contiguous."""
    return grad_RV.index_select(1, columns_C)


def add_rows_(sum_VD: Tensor, rows_C: Tensor, product_CD: Tensor) -> None:
    """Compute `sum[rows] += product`; every row occurs once."""
    sum_VD.index_add_(0, rows_C, product_CD.to(sum_VD.dtype))


def _row_blocks(logits_RV: Tensor, columns: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Iterate over row blocks of the tile, each with a scratch `[B, columns]` that is -inf beyond the vocabulary."""
    rows, vocab = logits_RV.shape
    budget = _SCRATCH_BYTES.get(logits_RV.device.type, _SCRATCH_BYTES_DEVICE)
    step = max(1, min(rows, budget // (columns * dtype.itemsize)))
    scratch_BV = torch.empty(step, columns, dtype=dtype, device=logits_RV.device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        scratch_BV[:, vocab:] = float("-inf")
        yield slice(start, stop), scratch_BV[: stop - start]


def _load(scratch_BV: Tensor, logits_BV: Tensor, transform: LogitsTransform) -> None:
    z_BV = scratch_BV[:, : logits_BV.shape[1]]
    z_BV.copy_(logits_BV)
    transform.apply_(z_BV)


def _pairs(
    logits_RV: Tensor, transform: LogitsTransform, base: BaseTile, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Iterate over row blocks of a tile and its base: their logits, in scratch."""
    columns = logits_RV.shape[1]
    for (block, z_BV), (_, b_BV) in zip(
        _row_blocks(logits_RV, columns, dtype), _row_blocks(base.logits, columns, dtype), strict=True
    ):
        _load(z_BV, logits_RV[block], transform)
        _load(b_BV, base.logits[block], base.transform)
        yield block, z_BV, b_BV


def _slope(z_BV: Tensor, transform: LogitsTransform) -> Tensor | None:
    """The derivative of the softcap at its result z; None without one."""
    return None if transform.softcap is None else (z_BV / transform.softcap).square_().neg_().add_(1)


def _store(
    logits_RV: Tensor,
    block: slice,
    grad_BV: Tensor,
    labels_R: Tensor,
    target_B1: Tensor,
    slope_BV: Tensor | None,
    transform: LogitsTransform,
) -> None:
    """Write the gradient with respect to the logits of some rows, with the targets at their labels, as that with respect to
    the raw projections."""
    _put_(grad_BV, labels_R[block, None], target_B1)
    if slope_BV is not None:
        grad_BV.mul_(slope_BV)
    if transform.scale != 1.0:
        grad_BV.mul_(transform.scale)
    logits_RV[block] = grad_BV


def _put_(values_BV: Tensor, labels_B1: Tensor, new_B1: Tensor) -> None:
    """Write one value per row at its label. A label of another slice has none here: the value at the clamped index is
    written back."""
    inside_B1 = (labels_B1 >= 0) & (labels_B1 < values_BV.shape[1])
    labels_B1 = labels_B1.clamp(0, values_BV.shape[1] - 1)
    values_BV.scatter_(1, labels_B1, torch.where(inside_B1, new_B1, values_BV.gather(1, labels_B1)))


def _topk_entropy(x_BGC: Tensor, block_max_BG: Tensor, k: int) -> Tensor:
    """Entropy of the K largest logits renormalised among themselves; x is already shifted by its maximum."""
    if block_max_BG.shape[1] > k:
        blocks_BK = block_max_BG.topk(k, dim=-1, sorted=False).indices
        x_BGC = x_BGC.gather(1, blocks_BK[:, :, None].expand(-1, -1, x_BGC.shape[2]))
    # the first of the K is the maximum, 0 after the shift: kept out of the sums
    top_BK = x_BGC.flatten(1).topk(k, dim=-1).values[:, 1:].clamp_min(_floor(x_BGC.dtype))
    exp_BK = top_BK.exp()
    rest_B = exp_BK.sum(-1)
    return rest_B.log1p() - (exp_BK * top_BK).sum(-1) / (1 + rest_B)


def _shifted_sums(x_BV: Tensor, argmax_B: Tensor) -> tuple[Tensor, Tensor]:
    """(r, s) of the module docstring; x is overwritten. The floor turns -inf logits into terms that are 0."""
    x_BV.clamp_min_(_floor(x_BV.dtype))
    exp_BV = x_BV.exp()
    exp_BV.scatter_(1, argmax_B[:, None], 0)
    rest_B = exp_BV.sum(-1)
    spread_B = exp_BV.mul_(x_BV).sum(-1).neg_()
    return rest_B, spread_B


def _floor(dtype: torch.dtype) -> float:
    """An exponent whose exponential is 0 in this dtype, yet finite: 0 * floor is 0 where 0 * -inf would be NaN."""
    return -800.0 if dtype == torch.float64 else -110.0
