"""The torch backend on an accelerator. Skipped, and said so, where there is none."""

import pytest
import torch

from eaftdrope.loss import fused_linear_eaft
from tests.loss.reference import definition, make_inputs, relative_error

DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE is None, reason="no GPU: the torch backend was NOT checked on a device"),
]


# five tiles: the weight gradient is summed in float32 from products that are not rounded
@pytest.mark.parametrize("tiles", [1, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)])
@pytest.mark.parametrize("gate", ["eaft", "none", "conflict-mask"])
def test_equal_to_the_definition(dtype, tolerance, gate, tiles):
    hidden, weight, labels, bias = make_inputs(500, 5003, 128, dtype, bias=True, spread=1.0)
    trained = int((labels != -100).sum())
    tile_bytes = -(-trained // tiles) * weight.shape[0] * weight.element_size()
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (hidden, weight, bias)]
    loss = fused_linear_eaft(leaves[0], leaves[1], labels.to(DEVICE), bias=leaves[2], gate=gate, tile_bytes=tile_bytes)
    loss.backward()
    expected, gradients = definition(hidden, weight, labels, gate, bias=bias)
    assert relative_error(loss.cpu(), expected) <= tolerance
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert relative_error(leaf.grad.cpu(), gradient) <= tolerance
