"""Who works on a tile of logits. Every backend is a module with the same two functions:

    tile_statistics(logits_RV, labels_R, transform, topk)            -> TileStats
    tile_gradient_(logits_RV, labels_R, stats, weight_R, transform)  -> None; the logits become their gradient

A tile is the output of one GEMM, R rows of raw logits in the model's dtype; `transform` says what still separates them
from the logits of the model (scale, softcap). GEMMs are the caller's. Columns lie side by side, rows may be further apart
than V. For the gradient the tile may be a slice of the vocabulary with the statistics of the whole rows: labels are then
counted from its start, and a label outside [0, V) has its target in another slice.
"""

from __future__ import annotations

from types import ModuleType

from . import torch as torch_backend

BACKENDS = ("auto", "torch")


def select_backend(name: str) -> ModuleType:
    """The backend of that name; `"auto"` takes the best one there is.

    Raises:
        ValueError: no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown loss backend {name!r}. Backends: {', '.join(BACKENDS)}.")
    return torch_backend
