"""transformers computes RMSNorm in float32 even in a float64 model, through which finite differences cannot see."""

import pytest
import torch

from tests.ttt.tiny import NORMS


def _norm_in_float64(stock):
    def forward(self, hidden):
        if hidden.dtype != torch.float64:
            return stock(self, hidden)
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    return forward


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """RMSNorm of a float64 model in float64, for every test of this folder; other dtypes are computed as before."""
    for norm in NORMS:
        monkeypatch.setattr(norm, "forward", _norm_in_float64(norm.forward))
