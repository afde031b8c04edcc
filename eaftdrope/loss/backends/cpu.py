"""The CPU backend: a C++ kernel for the instruction set of the machine (../native/eaft_cpu.cpp), float32, bfloat16 and
float16. Each tile is read once for its statistics and once for its gradient.

It also implements the sums over tiles and the steps of the sparse backward.

Legend: R rows of a tile, V vocabulary, C some of its columns, D hidden size.
"""

from __future__ import annotations

import ctypes
from dataclasses import fields, replace

import torch
from torch import Tensor

from ..native.library import load
from .tile import AnchorStats, BaseTile, LogitsTransform, TileStats

# The numbers of eaft_cpu.cpp.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN, _SCALED, _CAPPED = range(3)

# In the order of the library's AnchorStatistics.
_ANCHOR = tuple(field.name for field in fields(AnchorStats))


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why this backend cannot work on such tensors, or None. Compiles at first use."""
    if device.type != "cpu":
        return f"the cpu backend works on CPU tensors only, not on {device}: use another backend for that device."
    if dtype not in _DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        return f"the cpu backend works on {names}, not on {dtype}: use the torch backend for it."
    library = load()
    return library if isinstance(library, str) else None


def tile_statistics(logits_RV: Tensor, labels_R: Tensor, transform: LogitsTransform, topk: int | None) -> TileStats:
    """Return the statistics of every row of a tile; the tile is only read.

    Raises:
        ValueError: a tile of the wrong dtype or layout, `topk` below 1.
        RuntimeError: no library (see [`unavailable`]), no memory.
    """
    return _statistics("eaft_tile_statistics", logits_RV, labels_R, transform, topk)


def anchored_statistics(
    logits_RV: Tensor, labels_R: Tensor, transform: LogitsTransform, topk: int | None, base: BaseTile
) -> TileStats:
    """Return the statistics of a tile and of the anchor; the tile and its base are only read.

    Raises:
        ValueError, RuntimeError: as [`tile_statistics`], or a base of another shape or dtype.
    """
    anchor_5R = torch.empty(len(_ANCHOR), len(logits_RV), dtype=torch.float32)
    arguments = (*_base(base, logits_RV), anchor_5R)
    stats = _statistics("eaft_anchored_statistics", logits_RV, labels_R, transform, topk, *arguments)
    return replace(stats, anchor=AnchorStats(*anchor_5R))


def tile_gradient_(
    logits_RV: Tensor, labels_R: Tensor, stats: TileStats, weight_R: Tensor, transform: LogitsTransform
) -> None:
    """Overwrite the tile with the gradient of sum_t w_t nll_t with respect to its raw projections. It may be a slice of
    the vocabulary with the statistics of the whole rows; labels count from its start.

    Raises:
        ValueError: a tile of the wrong dtype or layout.
        RuntimeError: no library (see [`unavailable`]).
    """
    _call("eaft_tile_gradient", *_gradient(logits_RV, labels_R, stats, weight_R, transform))


def anchored_gradient_(
    logits_RV: Tensor,
    labels_R: Tensor,
    stats: TileStats,
    weight_R: Tensor,
    transform: LogitsTransform,
    base: BaseTile,
    anchor_R: Tensor,
) -> None:
    """Overwrite the tile with the gradient of sum_t (w_t nll_t + a_t D_t), a_t in `anchor_R`; like [`tile_gradient_`].

    Raises:
        ValueError: a tile, or a base, of the wrong dtype, shape or layout.
        RuntimeError: no library (see [`unavailable`]).
    """
    arguments = _gradient(logits_RV, labels_R, stats, weight_R, transform)
    anchor, rows = stats.anchor, len(logits_RV)
    anchor_5R = torch.stack([_vector(getattr(anchor, name), torch.float32, rows, f"anchor.{name}") for name in _ANCHOR])
    anchor_R = _vector(anchor_R, torch.float32, rows, "anchor_R")
    _call("eaft_anchored_gradient", *arguments, *_base(base, logits_RV), anchor_5R, anchor_R)


def tile_columns(grad_RV: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the columns of a tile that hold an absolute value of at least `threshold` or a NaN (`[V]` bool), and the sum
    of every column (`[V]` float32), in one pass.

    Raises:
        ValueError: a tile of the wrong dtype or layout.
    """
    rows, vocab = _check_tile(grad_RV)
    keep_V = torch.empty(vocab, dtype=torch.bool)
    mass_V = torch.empty(vocab, dtype=torch.float32)
    tile = (grad_RV, _DTYPES[grad_RV.dtype], rows, vocab, grad_RV.stride(0))
    _call("eaft_tile_columns", *tile, threshold, keep_V, mass_V)
    return keep_V, mass_V


def gather_columns(grad_RV: Tensor, columns_C: Tensor) -> Tensor:
    """Return `grad_RV[:, columns_C]`, contiguous. Columns are int64 and in [0, V): they are not checked.

    Raises:
        ValueError: a tile of the wrong dtype or layout.
    """
    rows, _ = _check_tile(grad_RV)
    columns_C = _vector(columns_C, torch.int64, columns_C.numel(), "columns_C")
    grad_RC = grad_RV.new_empty(rows, columns_C.numel())
    tile = (grad_RV, grad_RV.element_size(), rows, grad_RV.stride(0))
    _call("eaft_gather_columns", *tile, columns_C, columns_C.numel(), grad_RC)
    return grad_RC


def accumulate(sum_VD: Tensor, product_VD: Tensor, add: bool) -> None:
    """Compute `sum_VD += product_VD`, or `=` unless `add`, in the float32 of the sum.

    Raises:
        ValueError: wrong dtypes, layouts or shapes.
    """
    if sum_VD.shape != product_VD.shape:
        raise ValueError(f"a product of shape {tuple(product_VD.shape)} for a sum of {tuple(sum_VD.shape)}.")
    _add_rows(sum_VD, None, product_VD, add)


def add_rows_(sum_VD: Tensor, rows_C: Tensor, product_CD: Tensor) -> None:
    """Compute `sum_VD[rows_C] += product_CD`, added in float32 and rounded once. Rows are int64, each at most once and in
    [0, V): they are not checked.

    Raises:
        ValueError: wrong dtypes, layouts or shapes.
    """
    if product_CD.shape != (rows_C.numel(), sum_VD.shape[1]):
        raise ValueError(
            f"a product of shape {tuple(product_CD.shape)} for {rows_C.numel()} rows of a sum of {tuple(sum_VD.shape)}."
        )
    _add_rows(sum_VD, _vector(rows_C, torch.int64, rows_C.numel(), "rows_C"), product_CD, True)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `gradient * factor` in `dtype`, multiplied in float32 and rounded once; in place where the dtype stays.

    Raises:
        ValueError: wrong dtypes or layout.
    """
    if not gradient.is_contiguous():
        raise ValueError("a gradient that is not contiguous cannot be scaled.")
    result = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    width = gradient.shape[-1] if gradient.dim() else 1
    if gradient.numel():
        _add_rows(result.view(-1, width), None, gradient.view(-1, width), False, float(factor))
    return result


def _add_rows(sum_VD: Tensor, rows_C: Tensor | None, product_CD: Tensor, add: bool, factor: float = 1.0) -> None:
    _check_tile(sum_VD)
    rows, columns = _check_tile(product_CD)
    target = (sum_VD, _DTYPES[sum_VD.dtype], sum_VD.stride(0))
    source = (product_CD, _DTYPES[product_CD.dtype], product_CD.stride(0))
    _call("eaft_add_rows", *target, *source, rows_C, rows, columns, factor, int(add))


def _statistics(
    name: str,
    logits_RV: Tensor,
    labels_R: Tensor,
    transform: LogitsTransform,
    topk: int | None,
    *further: Tensor | float,
) -> TileStats:
    rows, vocab = _check_tile(logits_RV)
    if topk is not None and topk < 1:
        raise ValueError(f"topk of {topk}: expected at least 1, or None for no top-K entropy.")
    labels_R = _vector(labels_R, torch.int64, rows, "labels_R")
    nll_R, entropy_R, maximum_R, rest_R, topk_R = torch.empty(5, rows, dtype=torch.float32)
    correct_R = torch.empty(rows, dtype=torch.bool)
    _call(
        name,
        *(logits_RV, _DTYPES[logits_RV.dtype], rows, vocab, logits_RV.stride(0), labels_R, *_transform(transform)),
        *(topk or 0, nll_R, entropy_R, topk_R, maximum_R, rest_R, correct_R, *further),
    )
    return TileStats(
        nll=nll_R,
        entropy=entropy_R,
        topk_entropy=None if topk is None else topk_R,
        correct=correct_R,
        maximum=maximum_R,
        rest=rest_R,
    )


def _gradient(
    logits_RV: Tensor, labels_R: Tensor, stats: TileStats, weight_R: Tensor, transform: LogitsTransform
) -> tuple[Tensor | float, ...]:
    """The library's arguments for a gradient."""
    rows, vocab = _check_tile(logits_RV)
    maximum_R, rest_R, nll_R = (
        _vector(getattr(stats, name), torch.float32, rows, f"stats.{name}") for name in ("maximum", "rest", "nll")
    )
    weight_R = _vector(weight_R, torch.float32, rows, "weight_R")
    labels_R = _vector(labels_R, torch.int64, rows, "labels_R")
    tile = (logits_RV, _DTYPES[logits_RV.dtype], rows, vocab, logits_RV.stride(0), labels_R, *_transform(transform))
    return *tile, maximum_R, rest_R, nll_R, weight_R


def _base(base: BaseTile, logits_RV: Tensor) -> tuple[Tensor | float, ...]:
    """The library's arguments about the base model's tile."""
    _check_tile(base.logits)
    if base.logits.shape != logits_RV.shape or base.logits.dtype != logits_RV.dtype:
        raise ValueError(
            f"a base of {base.logits.dtype} {tuple(base.logits.shape)} for a tile of {logits_RV.dtype} "
            f"{tuple(logits_RV.shape)}: expected the same."
        )
    kind = (int(base.forward), int(base.mask_target))
    return base.logits, base.logits.stride(0), *_transform(base.transform), *kind


def _transform(transform: LogitsTransform) -> tuple[int, float, float]:
    if transform.softcap is not None:
        return _CAPPED, transform.scale, transform.softcap
    return (_PLAIN if transform.scale == 1.0 else _SCALED), transform.scale, 0.0


def _check_tile(tile_RV: Tensor) -> tuple[int, int]:
    """Return (rows, columns) of a matrix with contiguous columns."""
    if tile_RV.device.type != "cpu" or tile_RV.dtype not in _DTYPES:
        raise ValueError(unavailable(tile_RV.device, tile_RV.dtype))
    shape, stride = tuple(tile_RV.shape), tile_RV.stride()
    if len(shape) != 2 or (shape[1] > 1 and stride[1] != 1) or (shape[0] > 1 and stride[0] < shape[1]):
        raise ValueError(
            f"shape {shape} with strides {stride}: expected a matrix with contiguous columns (stride 1) whose "
            "rows do not overlap. Call .contiguous() on it."
        )
    return shape


def _vector(values: Tensor, dtype: torch.dtype, count: int, name: str) -> Tensor:
    if values.dtype != dtype or values.shape != (count,) or values.device.type != "cpu":
        raise ValueError(
            f"{name} is {values.dtype} {tuple(values.shape)} on {values.device}: expected {dtype} ({count},) on the CPU."
        )
    return values.contiguous()


def _call(name: str, *arguments: Tensor | float | None) -> None:
    """Call the library with torch's number of threads as the last argument; tensors are passed as addresses."""
    library = load()
    if isinstance(library, str):
        raise RuntimeError(library)
    addresses = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    if getattr(library, name)(*addresses, torch.get_num_threads()) != 0:
        raise RuntimeError(f"{name}: out of memory.")
