"""Who works on a tile of logits. Every backend is a module with the same three functions:

    unavailable(device, dtype)                                       -> None, or why it can not work there
    tile_statistics(logits_RV, labels_R, transform, topk)            -> TileStats
    tile_gradient_(logits_RV, labels_R, stats, weight_R, transform)  -> None; the logits become their gradient

A tile is the output of one GEMM, R rows of raw logits in the model's dtype; `transform` says what still separates them
from the logits of the model (scale, softcap). GEMMs are the caller's. Columns lie side by side, rows may be further apart
than V. For the gradient the tile may be a slice of the vocabulary with the statistics of the whole rows: labels are then
counted from its start, and a label outside [0, V) has its target in another slice.

What stands between the GEMMs of the gradients a backend may do as well; what it lacks is torch's:

    accumulate(sum_VH, product_VH, add)       sum (+)= product, in float32
    tile_columns(grad_RV, threshold)          -> (columns any row of which reaches the threshold [V], column sums [V])
    gather_columns(grad_RV, columns_C)        -> grad_RC
    add_rows_(sum_VH, rows_C, product_CH)     sum[rows] += product
    scaled(gradient, factor, dtype)           -> gradient * factor, in place where the dtype stays
"""

from .select import (
    BACKENDS,
    VARIABLE,
    Backend,
    check_backend,
    check_backend_name,
    load_backend,
    select_backend,
    unavailable,
)

__all__ = [
    "BACKENDS",
    "VARIABLE",
    "Backend",
    "check_backend",
    "check_backend_name",
    "load_backend",
    "select_backend",
    "unavailable",
]
