"""Inside a CUDA graph: all rows are computed, ignored ones weigh nothing, and nothing waits for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eaftdrope.loss import fused_linear_eaft, rows
from tests.loss.reference import definition, make_inputs, relative_error

# what brings a number, or a size, from the device to the host
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
NUMBERS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy")


class Recorded(TorchDispatchMode):
    """Names of the operations, and of what makes a number of a tensor."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        for name in NUMBERS:
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name, real):
        def counted(tensor, *args):
            self.names.append(name)
            return real(tensor, *args)

        return counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        # a bool mask as an index asks how many are set
        if self.names[-1] in ("index", "index_put", "index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "a mask as an index"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(rows, "_is_capturing", lambda device: True)


def step(leaves, labels, **options):
    loss, details = fused_linear_eaft(*leaves, labels, return_details=True, backend="torch", **options)
    loss.backward()
    return loss, details


@pytest.mark.parametrize("gate", ["eaft", "profit", "none"])
@pytest.mark.parametrize("tiles", [1, 5])
@pytest.mark.parametrize("gate_threshold", [0.0, 0.2])
@pytest.mark.parametrize("recompute", [False, True])
def test_equal_to_the_definition_and_never_waiting(capturing, monkeypatch, gate, tiles, gate_threshold, recompute):
    hidden, weight, labels, _ = make_inputs(50, 300)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    tile_bytes = 50 // tiles * weight.shape[0] * 4
    with Recorded(monkeypatch) as recorded:
        options = {"gate": gate, "gate_threshold": gate_threshold, "recompute": recompute}
        loss, details = step(leaves, labels, tile_bytes=tile_bytes, **options)
    assert not [name for name in recorded.names if name in (*WAITING, *NUMBERS)]
    assert torch.equal(details.trained, labels != -100)
    expected, gradients = definition(hidden, weight, labels, gate)
    assert relative_error(loss, expected) <= 2e-6
    if not gate_threshold:
        for leaf, gradient in zip(leaves, gradients):
            assert relative_error(leaf.grad, gradient) <= 2e-6


def test_weights_of_tokens(capturing, monkeypatch):
    hidden, weight, labels, _ = make_inputs(50, 300)
    leaves, values = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()], torch.linspace(-2, 2, 50)
    with Recorded(monkeypatch) as recorded:
        loss, details = step(leaves, labels, tile_bytes=10 * 300 * 4, token_weights=values)
    assert not [name for name in recorded.names if name in (*WAITING, *NUMBERS)]
    assert not details.weight[~details.trained].any()
    expected, gradients = definition(hidden, weight, labels, "eaft", token_weights=values)
    for actual, wanted in zip((loss, *(leaf.grad for leaf in leaves)), (expected, *gradients[:2]), strict=True):
        assert relative_error(actual, wanted) <= 2e-6


def test_rows_below_the_threshold_have_no_gradient(capturing):
    hidden, weight, labels, _ = make_inputs(50, 300)
    leaf = hidden.clone().requires_grad_()
    _, details = step([leaf, weight], labels, gate="dft", gate_threshold=0.1)
    assert 0 < details.closed.sum() < 50
    assert not leaf.grad[details.closed].any() and leaf.grad[~details.closed].any(1).all()


def test_the_recorder_sees_a_wait(monkeypatch):
    """The check above can fail: outside a graph the number of trained rows is asked for."""
    hidden, weight, labels, _ = make_inputs(20, 100)
    with Recorded(monkeypatch) as recorded:
        step([hidden.requires_grad_(), weight], labels)
    assert "tolist" in recorded.names


def test_a_gate_that_compares_tokens_is_refused(capturing):
    hidden, weight, labels, _ = make_inputs(20, 100)
    with pytest.raises(RuntimeError, match="compares tokens with each other and cannot be captured"):
        step([hidden.requires_grad_(), weight], labels, gate="conflict-mask")
