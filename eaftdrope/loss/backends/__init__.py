"""Backends: implementations of the work on one tile of logits. Every backend is a module with the same three functions:

    unavailable(device, dtype)                                       -> None, or the reason why it cannot work there
    tile_statistics(logits_RV, labels_R, transform, topk)            -> TileStats
    tile_gradient_(logits_RV, labels_R, stats, weight_R, transform)  -> None; the logits become their gradient

A tile is the output of one GEMM, R rows of raw logits in the model's dtype; `transform` is what still separates them from
the logits of the model (scale, softcap). The caller does the GEMMs. Columns are contiguous, rows may be further apart than
V. For the gradient the tile may be a slice of the vocabulary with the statistics of the whole rows: labels are then
counted from its start, and a label outside [0, V) has its target in another slice.

For an anchor a backend may implement these two; those of torch are used for one that lacks them, on its device. A
label outside [0, V) belongs to another shard of the vocabulary: nothing is masked, and nll and correct have no meaning.

    anchored_statistics(logits_RV, labels_R, transform, topk, base)  -> TileStats with those of the anchor
    anchored_gradient_(logits_RV, labels_R, stats, weight_R, transform, base, anchor_R)  -> None; as tile_gradient_

A backend may also implement the steps between the GEMMs of the gradients; torch's are used for those it lacks:

    accumulate(sum_VD, product_VD, add)       sum (+)= product, in float32
    tile_columns(grad_RV, threshold)          -> (columns any row of which reaches the threshold [V], column sums [V])
    gather_columns(grad_RV, columns_C)        -> grad_RC
    add_rows_(sum_VD, rows_C, product_CD)     sum[rows] += product
    scaled(gradient, factor, dtype)           -> gradient * factor, in place where the dtype stays

`select` chooses one and checks it on first use (`selfcheck`); `torch`, `cpu`, `triton` and `cuda` are the backends.
"""

from ..settings import BACKENDS, check_backend_name
from .select import VARIABLE, Backend, check_backend, load_backend, select_backend, unavailable

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
