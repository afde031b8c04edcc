"""First use of a backend on a device and dtype: two small tiles against float64.

A driver, a compiler or a CPU that was never tested must not train a model on wrong numbers.

Legend: R rows of a tile, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .tile import PLAIN, LogitsTransform, TileStats

# Errors relative to the largest value: the rounding of the dtype, and some margin.
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}

# A vocabulary that no vector width divides, with more columns than the blocks of any backend; and a softcapped one.
_TILES = ((5, 8195, PLAIN), (3, 1000, LogitsTransform(scale=1.5, softcap=20.0)))


class TileFunctions(Protocol):
    """The functions of a backend that are checked."""

    @property
    def tile_statistics(self) -> Callable[..., TileStats]: ...

    @property
    def tile_gradient_(self) -> Callable[..., None]: ...


def check(backend: TileFunctions, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what `backend` computes wrongly, or None. Any exception that it raises counts."""
    try:
        for rows, vocab, transform in _TILES:
            wrong = _compare(backend, device, dtype, rows, vocab, transform)
            if wrong is not None:
                return wrong
    except Exception as error:
        return f"it failed with {type(error).__name__}: {error}"
    return None


def _compare(
    backend: TileFunctions, device: torch.device, dtype: torch.dtype, rows: int, vocab: int, transform: LogitsTransform
) -> str | None:
    generator = torch.Generator().manual_seed(vocab)
    logits_RV = (torch.randn(rows, vocab, generator=generator) * 4).to(dtype)
    labels_R = torch.randint(0, vocab, (rows,), generator=generator)
    weight_R = torch.rand(rows, generator=generator)
    labels_R[0], labels_R[-1] = vocab - 1, int(logits_RV[-1].argmax())
    expected = _definition(logits_RV, labels_R, weight_R, transform)
    tile_RV = logits_RV.to(device)
    stats = backend.tile_statistics(tile_RV, labels_R.to(device), transform, 20)
    backend.tile_gradient_(tile_RV, labels_R.to(device), stats, weight_R.to(device), transform)
    assert stats.topk_entropy is not None, "requested"
    actual = {"nll": stats.nll, "entropy": stats.entropy, "topk_entropy": stats.topk_entropy, "gradient": tile_RV}
    for name, value in actual.items():
        tolerance = _TOLERANCE[dtype] if name == "gradient" else 2e-5
        error = ((value.double().cpu() - expected[name]).abs().max() / expected[name].abs().max()).item()
        # not: error > tolerance, which a NaN would pass
        if not error <= tolerance:
            return f"{name} of a {rows} x {vocab} tile is off by {error:.1e}, allowed is {tolerance:.0e}"
    return None


def _definition(logits_RV: Tensor, labels_R: Tensor, weight_R: Tensor, transform: LogitsTransform) -> dict[str, Tensor]:
    """Statistics and gradient in float64, by their formulas: in inference mode there is no autograd."""
    z_RV = transform.apply(logits_RV.double())
    slope_RV = torch.full_like(z_RV, transform.scale)
    if transform.softcap is not None:
        slope_RV *= 1 - (z_RV / transform.softcap).square()
    log_p_RV = z_RV.log_softmax(-1)
    gradient_RV = log_p_RV.exp()
    gradient_RV[torch.arange(len(labels_R)), labels_R] -= 1
    return {
        "nll": -log_p_RV.gather(1, labels_R[:, None]).squeeze(1),
        "entropy": _entropy(log_p_RV),
        "topk_entropy": _entropy(z_RV.topk(20).values.log_softmax(-1)),
        "gradient": gradient_RV * slope_RV * weight_R[:, None].double(),
    }


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)
