"""Inner steps other than clipped SGD, for `model.ttt.rule`.

Legend: B rows, M x N a fast weight, n tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eaftdrope.ttt import TTTConfig

# Newton-Schulz coefficients of Muon (Jordan et al. 2024): singular values go to about 1 in five steps
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def muon(gradients: list[Tensor], config: TTTConfig) -> list[Tensor]:
    """Orthogonalise the gradient of each matrix `[B, M, N]`, and scale all of a row's to a norm of 1 together.

    Clipped SGD takes a step of at most the same norm, so rates compare. The norm of the gradient does not enter.
    """
    directions = [orthogonalised(gradient, rank=config.chunk) for gradient in gradients]
    norm_B = sum(direction.flatten(1).square().sum(1) for direction in directions).sqrt()
    scale_B = 1 / norm_B.clamp(min=torch.finfo(norm_B.dtype).tiny)
    return [direction * scale_B[:, None, None] for direction in directions]


def orthogonalised(gradient_BMN: Tensor, rank: int) -> Tensor:
    """Five Newton-Schulz iterations on a gradient that is a sum of `rank` outer products, one for each token.

    They run on its coordinates in a basis of its columns, `[rank, N]`, which have the same singular values: ten times
    cheaper where a chunk has fewer tokens than the matrix has rows.
    """
    basis_BMr, x = None, gradient_BMN
    if rank < min(x.shape[1:]):
        generator = torch.Generator(x.device).manual_seed(0)
        sketch = torch.randn(x.shape[2], rank, generator=generator, dtype=x.dtype, device=x.device)
        basis_BMr = torch.linalg.qr(x @ sketch).Q
        x = basis_BMr.mT @ x
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.flatten(1).norm(dim=1) + 1e-12)[:, None, None]
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if tall else x
    return x if basis_BMr is None else basis_BMr @ x
