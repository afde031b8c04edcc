"""The operator on an accelerator. Skipped, and said so, where there is none."""

import pytest
import torch

from eaftdrope.loss import fused_linear_eaft
from eaftdrope.loss.backends import BACKENDS, unavailable
from tests.loss.reference import definition, make_inputs, relative_error

DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE is None, reason="no GPU: the operator was NOT checked on a device"),
]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 2e-3}


def skip_unless_available(backend, dtype):
    reason = None if backend == "auto" else unavailable(backend, DEVICE, dtype)
    if reason:
        pytest.skip(f"the {backend} backend was NOT checked on {DEVICE}: {reason}")


# five tiles: the weight gradient is summed in float32 from products that are not rounded
@pytest.mark.parametrize("tiles", [1, 5])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gate", ["eaft", "none", "conflict-mask"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cpu"])
def test_equal_to_the_definition(backend, dtype, gate, tiles):
    skip_unless_available(backend, dtype)
    hidden, weight, labels, bias = make_inputs(500, 5003, 128, dtype, bias=True, spread=1.0)
    trained = int((labels != -100).sum())
    tile_bytes = -(-trained // tiles) * weight.shape[0] * weight.element_size()
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (hidden, weight, bias)]
    options = {"gate": gate, "tile_bytes": tile_bytes, "backend": backend}
    loss = fused_linear_eaft(leaves[0], leaves[1], labels.to(DEVICE), bias=leaves[2], **options)
    loss.backward()
    expected, gradients = definition(hidden, weight, labels, gate, bias=bias)
    assert relative_error(loss.cpu(), expected) <= TOLERANCE[dtype]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert relative_error(leaf.grad.cpu(), gradient) <= TOLERANCE[dtype]


@pytest.mark.parametrize("tail", ["exact", "sparse"])
def test_closed_rows_and_a_sparse_tail(tail):
    hidden, weight, labels, _ = make_inputs(700, 5003, 128, spread=1.0)
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (hidden, weight)]
    options = {"gate": "profit", "tail": tail, "tail_threshold": 1e-30}
    fused_linear_eaft(*leaves, labels.to(DEVICE), **options).backward()
    _, gradients = definition(hidden, weight, labels, "profit")
    for leaf, gradient in zip(leaves, gradients):
        assert relative_error(leaf.grad.cpu(), gradient) <= 5e-6


@pytest.mark.skipif(DEVICE is not None and DEVICE.type != "cuda", reason="not a CUDA device: graphs were NOT checked")
def test_a_cuda_graph_of_the_whole_step():
    """Captured with one batch, replayed with another: other rows are trained, other labels, the same graph."""
    hidden, weight, labels, _ = make_inputs(300, 5003, 128, torch.bfloat16, spread=1.0)
    static = [tensor.to(DEVICE) for tensor in (hidden, weight, labels)]
    leaves = [tensor.requires_grad_() for tensor in static[:2]]

    def step():
        loss = fused_linear_eaft(*leaves, static[2])
        return loss.detach(), torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradients = step()
    other, _, other_labels, _ = make_inputs(300, 5003, 128, torch.bfloat16, spread=1.0, seed=5, ignored=0.6)
    with torch.no_grad():
        static[0].copy_(other)
        static[2].copy_(other_labels)
    graph.replay()
    expected, wanted = definition(other, weight, other_labels, "eaft")
    assert relative_error(loss.cpu(), expected) <= 5e-3
    for gradient, truth in zip(gradients, wanted):
        assert relative_error(gradient.cpu(), truth) <= 5e-3


def test_a_call_waits_for_the_device_once():
    """To learn how many rows are trained; everything else is launched without a look."""
    if DEVICE.type != "cuda":
        pytest.skip("not a CUDA device: waits were NOT counted")
    hidden, weight, labels, _ = make_inputs(300, 5003, 128, torch.bfloat16, spread=1.0)
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (hidden, weight)]
    labels = labels.to(DEVICE)
    fused_linear_eaft(*leaves, labels).backward()
    with pytest.warns(UserWarning, match="synchronizing") as caught:
        torch.cuda.set_sync_debug_mode("warn")
        fused_linear_eaft(*leaves, labels).backward()
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in caught if "synchronizing" in str(warning.message)]) == 1
