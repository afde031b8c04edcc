"""First use of a backend on a device and dtype: small tiles against float64.

A driver, a compiler or a CPU that was never tested must not train a model on wrong numbers.

Legend: R rows of a tile, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .tile import PLAIN, BaseTile, LogitsTransform, TileStats

# Errors relative to the largest value: the rounding of the dtype, and some margin.
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}

# A vocabulary that no vector width divides, with more columns than the blocks of any backend; and a softcapped one.
_TILES = ((5, 8195, PLAIN), (3, 1000, LogitsTransform(scale=1.5, softcap=20.0)))


# An anchor's settings: (forward, mask_target).
_ANCHORS = ((True, False), (False, False), (True, True), (False, True))


class TileFunctions(Protocol):
    """The functions of a backend that are checked."""

    @property
    def tile_statistics(self) -> Callable[..., TileStats]: ...

    @property
    def tile_gradient_(self) -> Callable[..., None]: ...

    @property
    def anchored_statistics(self) -> Callable[..., TileStats]: ...

    @property
    def anchored_gradient_(self) -> Callable[..., None]: ...


def check(backend: TileFunctions, device: torch.device, dtype: torch.dtype, *, anchored: bool = False) -> str | None:
    """Return what `backend` computes wrongly, or None. Any exception that it raises counts. With `anchored` its functions
    for an anchor are checked as well."""
    try:
        for tile in _TILES:
            wrong = _compare(backend, device, dtype, *tile)
            for anchor in _ANCHORS if anchored else ():
                wrong = wrong or _compare_anchored(backend, device, dtype, *tile, *anchor)
            if wrong is not None:
                return wrong
    except Exception as error:
        return f"it failed with {type(error).__name__}: {error}"
    return None


def _compare(
    backend: TileFunctions, device: torch.device, dtype: torch.dtype, rows: int, vocab: int, transform: LogitsTransform
) -> str | None:
    logits_RV, _, labels_R, weight_R = _inputs(rows, vocab, dtype)
    expected = _definition(logits_RV, labels_R, weight_R, transform)
    tile_RV = logits_RV.to(device)
    stats = backend.tile_statistics(tile_RV, labels_R.to(device), transform, 20)
    backend.tile_gradient_(tile_RV, labels_R.to(device), stats, weight_R.to(device), transform)
    assert stats.topk_entropy is not None, "requested"
    actual = {"nll": stats.nll, "entropy": stats.entropy, "topk_entropy": stats.topk_entropy, "gradient": tile_RV}
    return _worst(actual, expected, dtype)


def _compare_anchored(
    backend: TileFunctions,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    vocab: int,
    transform: LogitsTransform,
    forward: bool,
    mask_target: bool,
) -> str | None:
    logits_RV, base_RV, labels_R, weight_R = _inputs(rows, vocab, dtype)
    # one row whose gate is closed
    weight_R[1] = 0
    anchor_R = weight_R.flip(0)
    expected = _anchored_definition(logits_RV, base_RV, labels_R, weight_R, anchor_R, transform, forward, mask_target)
    tile_RV, labels_R = logits_RV.to(device), labels_R.to(device)
    base = BaseTile(base_RV.to(device), transform, forward, mask_target)
    stats = backend.anchored_statistics(tile_RV, labels_R, transform, None, base)
    backend.anchored_gradient_(tile_RV, labels_R, stats, weight_R.to(device), transform, base, anchor_R.to(device))
    assert stats.anchor is not None, "requested"
    return _worst({"divergence": stats.anchor.divergence, "anchored gradient": tile_RV}, expected, dtype)


def _inputs(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Projections of model and base, labels and weights: the last token of the vocabulary and the most likely one are among
    the labels."""
    generator = torch.Generator().manual_seed(vocab)
    logits_RV = (torch.randn(rows, vocab, generator=generator) * 4).to(dtype)
    labels_R = torch.randint(0, vocab, (rows,), generator=generator)
    weight_R = torch.rand(rows, generator=generator)
    labels_R[0], labels_R[-1] = vocab - 1, int(logits_RV[-1].argmax())
    base_RV = (logits_RV.float() + torch.randn(rows, vocab, generator=generator)).to(dtype)
    return logits_RV, base_RV, labels_R, weight_R


def _worst(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> str | None:
    """Return the first value that is off, or None."""
    for name, value in actual.items():
        tolerance = _TOLERANCE[dtype] if name.endswith("gradient") else 2e-5
        error = ((value.double().cpu() - expected[name]).abs().max() / expected[name].abs().max()).item()
        # not: error > tolerance, which a NaN would pass
        if not error <= tolerance:
            rows, vocab = expected["gradient"].shape
            return f"{name} of a {rows} x {vocab} tile is off by {error:.1e}, allowed is {tolerance:.0e}"
    return None


def _definition(logits_RV: Tensor, labels_R: Tensor, weight_R: Tensor, transform: LogitsTransform) -> dict[str, Tensor]:
    """Statistics and gradient in float64, by their formulas: in inference mode there is no autograd."""
    z_RV = transform.apply(logits_RV.double())
    slope_RV = _slope(z_RV, transform)
    log_p_RV = z_RV.log_softmax(-1)
    gradient_RV = log_p_RV.exp()
    gradient_RV[torch.arange(len(labels_R)), labels_R] -= 1
    return {
        "nll": -log_p_RV.gather(1, labels_R[:, None]).squeeze(1),
        "entropy": _entropy(log_p_RV),
        "topk_entropy": _entropy(z_RV.topk(20).values.log_softmax(-1)),
        "gradient": gradient_RV * slope_RV * weight_R[:, None].double(),
    }


def _anchored_definition(
    logits_RV: Tensor,
    base_RV: Tensor,
    labels_R: Tensor,
    weight_R: Tensor,
    anchor_R: Tensor,
    transform: LogitsTransform,
    forward: bool,
    mask_target: bool,
) -> dict[str, Tensor]:
    """The same of an anchor; where the label is masked its difference of logarithms is 0."""
    z_RV, b_RV = transform.apply(logits_RV.double()), transform.apply(base_RV.double())
    gradient_RV = _definition(logits_RV, labels_R, weight_R, transform)["gradient"]
    rows_R = torch.arange(len(labels_R))
    log_p_RV, log_q_RV = (
        (value.index_put((rows_R, labels_R), torch.tensor(-torch.inf).double()) if mask_target else value).log_softmax(
            -1
        )
        for value in (z_RV, b_RV)
    )
    p_RV, q_RV = log_p_RV.exp(), log_q_RV.exp()
    difference_RV = (log_q_RV - log_p_RV).nan_to_num(0)
    divergence_R = (q_RV * difference_RV).sum(-1) if forward else -(p_RV * difference_RV).sum(-1)
    pull_RV = p_RV - q_RV if forward else -p_RV * (difference_RV + divergence_R[:, None])
    anchored_RV = gradient_RV + anchor_R[:, None].double() * pull_RV * _slope(z_RV, transform)
    return {"divergence": divergence_R, "gradient": gradient_RV, "anchored gradient": anchored_RV}


def _slope(z_RV: Tensor, transform: LogitsTransform) -> Tensor:
    """Derivative of the transform at its results z."""
    slope_RV = torch.full_like(z_RV, transform.scale)
    if transform.softcap is not None:
        slope_RV *= 1 - (z_RV / transform.softcap).square()
    return slope_RV


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)
