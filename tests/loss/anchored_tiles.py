"""Tiles with a base model's beside them: an anchor's statistics and gradient against autograd in float64.

Legend: R rows of a tile, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eaftdrope.loss import Anchor, anchor_divergence
from eaftdrope.loss.backends.tile import BaseTile, LogitsTransform
from tests.loss.anchors import ANCHORS, anchor_id
from tests.loss.tile_cases import GRADIENT_ERROR, TileCase


def base_of(case: TileCase) -> Tensor:
    """`[R, V]` raw projections of a base model near the model's, in the layout of the tile; what is -inf stays it."""
    generator = torch.Generator().manual_seed(case.logits.shape[1] + 1)
    noise = torch.randn(case.logits.shape, generator=generator, dtype=torch.float64)
    base = case.logits.clone(memory_format=torch.contiguous_format).double() + 0.7 * noise
    return torch.empty_strided(case.logits.shape, case.logits.stride(), dtype=case.logits.dtype).copy_(base)


def check_anchored(backend, case: TileCase, base_transform: LogitsTransform | None = None) -> None:
    """Both functions of a backend for every kind of anchor: divergence to 1e-5, each value of the gradient within the
    rounding of the dtype, the statistics of the gated loss bit-equal to those without an anchor, the base unchanged."""
    base_RV, transform = base_of(case), base_transform or case.transform
    anchor_R = case.weight.flip(0) + 0.1
    plain = backend.tile_statistics(case.logits, case.labels, case.transform, case.topk)
    for anchor in ANCHORS:
        base = BaseTile(base_RV.clone(), transform, anchor.direction == "forward", anchor.mask_target)
        stats = backend.anchored_statistics(case.logits, case.labels, case.transform, case.topk, base)
        for name in ("nll", "entropy", "maximum", "rest"):
            assert torch.equal(getattr(stats, name), getattr(plain, name)), name
        divergence_R, gradient_RV, size_RV = _truth(case, base_RV, transform, anchor, anchor_R)
        largest = case.transform.apply(case.logits.double()).nan_to_num(neginf=0).abs().max().item()
        torch.testing.assert_close(
            stats.anchor.divergence.double(),
            divergence_R,
            rtol=1e-5,
            atol=1e-6 * (1 + largest),
            msg=lambda m: f"D: {m}",
        )
        assert (stats.anchor.divergence >= 0).all(), "D is negative"
        actual_RV = case.logits.clone(memory_format=torch.contiguous_format)
        backend.anchored_gradient_(actual_RV, case.labels, stats, case.weight, case.transform, base, anchor_R)
        relative, absolute = GRADIENT_ERROR[case.logits.dtype]
        # p, q and the divergence are exact to float32's rounding of logits of this size
        allowed_RV = relative * gradient_RV.abs() + absolute + 2e-6 * (1 + largest) * size_RV
        wrong = ~((actual_RV.double() - gradient_RV).abs() <= allowed_RV)
        assert not wrong.any(), (anchor_id(anchor), str(case), wrong.nonzero()[:5].tolist())
        assert torch.equal(base.logits.nan_to_num(), base_RV.nan_to_num()), "the base was changed"


def _truth(
    case: TileCase, base_RV: Tensor, base_transform: LogitsTransform, anchor: Anchor, anchor_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence `[R]`, gradient `[R, V]` of sum_t (w_t nll_t + a_t D_t), the sizes of the terms that it is made of)"""
    raw_RV = case.logits.clone(memory_format=torch.contiguous_format).double().requires_grad_()
    z_RV, b_RV = case.transform.apply(raw_RV), base_transform.apply(base_RV.double())
    divergence_R = anchor_divergence(z_RV, b_RV, case.labels, anchor)
    nll_R = torch.nn.functional.cross_entropy(z_RV, case.labels, reduction="none")
    (case.weight.double() * nll_R + anchor_R.double() * divergence_R).sum().backward()
    with torch.no_grad():
        mask = anchor.mask_target
        compared = [t.scatter(1, case.labels[:, None], -torch.inf) if mask else t for t in (z_RV, b_RV)]
        p_RV, q_RV = (value.softmax(-1) for value in compared)
        gap_RV = (p_RV.log() - q_RV.log()).nan_to_num(0, 0, 0).abs() + divergence_R[:, None]
        pull_RV = q_RV + p_RV if anchor.direction == "forward" else p_RV * (1 + gap_RV)
        size_RV = case.weight[:, None] * z_RV.softmax(-1) + anchor_R[:, None] * pull_RV
        size_RV *= abs(case.transform.scale)
    assert raw_RV.grad is not None
    return divergence_R.detach(), raw_RV.grad.nan_to_num(0), size_RV
