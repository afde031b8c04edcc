"""The spectrum of a change of weights, and the part of it that is more than noise.

DG-Hard (Abro and Tahir 2026, arXiv 2605.20296) regards the change of a matrix by fine-tuning as a low-rank signal in noise
and keeps the singular values above the optimal hard threshold of Gavish and Donoho (2014, arXiv 1305.5870) for noise of
unknown size:

    tau = lambda(beta) / mu(beta) * median(s)        beta = shorter side / longer side
    lambda(beta) = sqrt(2 (beta + 1) + 8 beta / (beta + 1 + sqrt(beta^2 + 14 beta + 1)))
    mu(beta)^2 = median of the Marchenko-Pastur distribution

A dense change is decomposed by the Gram matrix of its shorter side in float64, which needs one copy of the change and some
four matrices [K, K]. Its singular values are exact to about 1e-8 of the largest.

The change of a LoRA adapter has rank R, so the median of all its singular values is 0 and the paper's rule keeps everything.
Here the rule is applied to the R singular values that it has: in an orthonormal basis of the rows of its factor A, the
change is a matrix [M, R], and so beta = R / M. This is an extension of the paper.

Legend: M rows, N columns, K = min(M, N), R rank of an adapter, S singular values kept.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BLOCK_BYTES = 64 << 20
_GRID = 100_000


@dataclass(frozen=True)
class Spectrum:
    """What was kept of a change: `kept` of `total` singular values, and their share of its Frobenius norm."""

    kept: int
    total: int
    norm: float


@functools.cache
def threshold_factor(rows: int, columns: int) -> float:
    """Return the optimal hard threshold in units of the median singular value, for a matrix of this shape."""
    beta = min(rows, columns) / max(rows, columns)
    scale = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    # lambda = 1 + beta + 2 sqrt(beta) cos(angle) turns the Marchenko-Pastur density into a smooth function of the angle
    angles = (np.arange(_GRID) + 0.5) * (math.pi / _GRID)
    eigenvalues = 1 + beta + 2 * math.sqrt(beta) * np.cos(angles)
    mass = np.cumsum(np.sin(angles) ** 2 / eigenvalues)
    # the mass of each cell is complete at its end, half a cell after its middle
    angle = np.interp(mass[-1] / 2, mass, angles) + math.pi / _GRID / 2
    median = 1 + beta + 2 * math.sqrt(beta) * math.cos(angle)
    return scale / math.sqrt(median)


def signal_count(singular_K: Tensor, rows: int, columns: int) -> int:
    """Return how many singular values are above the threshold for a matrix of this shape."""
    threshold = threshold_factor(rows, columns) * singular_K.double().quantile(0.5).item()
    return int((singular_K.double() > threshold).sum())


def keep_signal(change: Tensor) -> Spectrum:
    """Remove from a change, in place, what its threshold counts as noise; of a stack `[E, M, N]`, from each matrix.

    Args:
        change: float32, `[M, N]` or `[E, M, N]`.
    """
    if change.ndim == 3:
        before = change.norm().item()
        parts = [keep_signal(matrix) for matrix in change]
        norm = change.norm().item() / before if before else 1.0
        return Spectrum(sum(part.kept for part in parts), sum(part.total for part in parts), norm)
    rows, columns = change.shape
    squares_K, vectors_KK = torch.linalg.eigh(_gram(change))
    singular_K = squares_K.clamp_(min=0).sqrt()
    kept = signal_count(singular_K, rows, columns)
    # eigh sorts them in ascending order
    norm = _share(singular_K[len(singular_K) - kept :], singular_K)
    if norm < 1.0:
        _project(change, vectors_KK[:, len(singular_K) - kept :].to(change.dtype))
    return Spectrum(kept, len(singular_K), norm)


def keep_signal_of_factors(up_MR: Tensor, down_RN: Tensor) -> tuple[Tensor, Tensor, Spectrum]:
    """Return the factors of what the threshold keeps of `up @ down`, in the same shapes, without forming the product."""
    basis_MR, core_up = torch.linalg.qr(up_MR.double())
    basis_NR, core_down = torch.linalg.qr(down_RN.double().T)
    # fewer than R only where the rank exceeds a side of the matrix
    left_RR, singular_R, right_RR = torch.linalg.svd(core_up @ core_down.T, full_matrices=False)
    kept = signal_count(singular_R, up_MR.shape[0], len(singular_R))
    # each factor gets the root of a singular value; the rank stays, filled up with zeros
    root_S = singular_R[:kept].sqrt()
    up, down = torch.zeros_like(up_MR), torch.zeros_like(down_RN)
    up[:, :kept] = (basis_MR @ (left_RR[:, :kept] * root_S)).to(up)
    down[:kept] = ((root_S[:, None] * right_RR[:kept]) @ basis_NR.T).to(down)
    return up, down, Spectrum(kept, len(singular_R), _share(singular_R[:kept], singular_R))


def _share(kept: Tensor, every: Tensor) -> float:
    """Return the share of the Frobenius norm; 1 for a matrix that is zero."""
    return (kept.norm() / every.norm()).item() if every.any() else 1.0


def _gram(change_MN: Tensor) -> Tensor:
    """Return the Gram matrix [K, K] of the shorter side, summed in float64 over blocks of the longer one."""
    along = 0 if change_MN.shape[0] >= change_MN.shape[1] else 1
    short = change_MN.shape[1 - along]
    gram_KK = change_MN.new_zeros(short, short, dtype=torch.float64)
    for block in change_MN.split(_block(short), dim=along):
        block = block.double() if along == 0 else block.double().T
        gram_KK.addmm_(block.T, block)
    return gram_KK


def _project(change_MN: Tensor, vectors_KS: Tensor) -> None:
    """Project the rows or columns of the shorter side, in place, onto the span of orthonormal vectors."""
    along = 0 if change_MN.shape[0] >= change_MN.shape[1] else 1
    for block in change_MN.split(_block(len(vectors_KS)), dim=along):
        if along == 0:
            block.copy_((block @ vectors_KS) @ vectors_KS.T)
        else:
            block.copy_(vectors_KS @ (vectors_KS.T @ block))


def _block(short: int) -> int:
    return max(1, _BLOCK_BYTES // (8 * short))
