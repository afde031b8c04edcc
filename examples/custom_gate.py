# /// script
# requires-python = ">=3.11"
# dependencies = ["eaftdrope"]
#
# [tool.uv]
# constraint-dependencies = ["torch==2.13.0"]
#
# [tool.uv.sources]
# eaftdrope = { path = "..", editable = true }
# ///
"""A custom gate: three lines from the statistics of a token to its weight.

uv run examples/custom_gate.py        seconds on a CPU
"""

import torch

from eaftdrope import TokenStats, eaft_loss, fused_linear_eaft, gates


def trust_the_unsure(stats: TokenStats) -> torch.Tensor:
    """Return full weight where the model is uncertain (more than 1 nat) or agrees, else the label's probability."""
    agrees = stats.correct | (stats.entropy > 1.0)
    return torch.where(agrees, 1.0, stats.probability)


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(512, 64, requires_grad=True)
    weight = torch.randn(8000, 64, requires_grad=True)
    labels = torch.randint(0, 8000, (512,))
    labels[::4] = -100

    loss, details = fused_linear_eaft(hidden, weight, labels, gate=trust_the_unsure, return_details=True)
    loss.backward()
    print(f"loss {loss:.4f}, mean gate {details.weight.mean():.3f} over {len(details.weight)} trained tokens")

    # The gate depends on one token only, so the operator may form the gradient in its first pass over a tile.
    faster = gates.Custom(trust_the_unsure, row_local=True, topk=None)
    assert torch.allclose(fused_linear_eaft(hidden, weight, labels, gate=faster), loss)

    # The definition on full logits gives the same number.
    assert torch.allclose(eaft_loss(hidden @ weight.T, labels, trust_the_unsure), loss, rtol=1e-5)


if __name__ == "__main__":
    main()
