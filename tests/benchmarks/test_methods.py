"""The loss and gradients of every method match its stated formula in float64.

The formulas are written out here once more, on full logits with autograd, without a line of eaftdrope's.
"""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.loss import methods as module
from benchmarks.loss.methods import methods
from eaftdrope.loss.backends import BACKENDS

ROWS, HIDDEN_SIZE, VOCABULARY = 41, 16, 203
METHODS = methods()
# relative, by the Frobenius norm: rounding of the dtype, and what an approximation may add to it
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
APPROXIMATION = 3e-2
CPU = torch.device("cpu")


def formula(hidden, weight, labels, gate):
    """Return the mean of gate * cross-entropy over the trained rows, and its gradients."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    kept = labels != -100
    log_p = (hidden[kept] @ weight.T).log_softmax(-1)
    nll = -log_p[torch.arange(len(log_p)), labels[kept]]
    if gate == "eaft":
        top = (hidden[kept] @ weight.T).topk(20, dim=-1).values.softmax(-1)
        gates = -(top * top.log()).sum(-1) / math.log(20)
    elif gate == "eaft-exact":
        gates = (-(log_p.exp() * log_p).sum(-1) / math.log(20)).clamp_max(1)
    else:
        assert gate == "none"
        gates = torch.ones_like(nll)
    loss = (gates.detach() * nll).sum() / kept.sum()
    loss.backward()
    return loss.item(), hidden.grad, weight.grad


def make(dtype, *, ignored, device=CPU, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, HIDDEN_SIZE, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN_SIZE, generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    # some rows sure of their label, some of another token: there the gates differ most
    hidden[::4] += 2 * weight[labels[::4]]
    hidden[1::4] += 2 * weight[labels[::4][: len(hidden[1::4])]]
    if ignored:
        labels[5:20] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


def relative(actual, expected):
    return ((actual.double().cpu() - expected.cpu()).norm() / expected.norm()).item()


def check(method, dtype, *, ignored=False, frozen=False, device=CPU):
    reason = method.unavailable(device, dtype)
    if reason is not None:
        pytest.skip(f"{method.name} was NOT checked: {reason}")
    hidden, weight, labels = make(dtype, ignored=ignored, device=device)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    loss = method.loss(hidden, weight, labels)
    loss.backward()
    expected, by_hidden, by_weight = formula(hidden, weight, labels, method.gate)
    tolerance = TOLERANCE[dtype] + (0 if method.exact else APPROXIMATION)
    assert abs(loss.item() - expected) <= TOLERANCE[dtype] * expected, "loss"
    assert relative(hidden.grad, by_hidden) <= tolerance, "gradient by hidden"
    if ignored:
        assert (hidden.grad[5:20] == 0).all(), "an ignored row has a gradient"
    if frozen:
        assert weight.grad is None
    else:
        assert relative(weight.grad, by_weight) <= tolerance, "gradient by weight"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_it_computes_what_it_says(name, dtype):
    check(METHODS[name], dtype)


@pytest.mark.parametrize("name", METHODS)
def test_ignored_labels_and_a_frozen_head(name):
    check(METHODS[name], torch.float32, ignored=True)
    check(METHODS[name], torch.float32, frozen=True)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: NOT checked that the methods of a GPU compute what they say"
)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_it_computes_what_it_says_on_a_device(name, dtype):
    check(METHODS[name], dtype, device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("name", "claim"), [("full-logits-ce", "eaft"), ("llamafactory", "eaft-exact"), ("trl", "none")]
)
def test_a_wrong_claim_is_caught(name, claim):
    with pytest.raises(AssertionError, match="loss"):
        check(replace(METHODS[name], gate=claim), torch.float32)


def test_a_wrong_gradient_is_caught():
    def doubled(hidden, weight, labels):
        return METHODS["full-logits-ce"].loss(hidden * 2 - hidden.detach(), weight, labels)

    with pytest.raises(AssertionError, match="gradient by hidden"):
        check(replace(METHODS["full-logits-ce"], loss=doubled), torch.float32)


def test_every_backend_is_a_method():
    ours = [method for method in METHODS.values() if method.family == "ours"]
    assert {f"eaftdrope-{name}" for name in BACKENDS if name != "auto"} <= {method.name for method in ours}
    assert all(method.backend in BACKENDS for method in ours)
    assert all(method.backend is None for method in METHODS.values() if method.family == "peer")
    assert {method.family for method in METHODS.values()} == {"ours", "peer"}


def test_what_cannot_run_says_why():
    assert METHODS["liger"].unavailable(CPU, torch.float32) == "its kernel is Triton, which needs a GPU"
    assert "float32" in METHODS["eaftdrope-many-tiles"].unavailable(CPU, torch.float32)
    assert METHODS["eaftdrope-torch"].unavailable(CPU, torch.float32) is None
    missing = module._package_missing("no_such_module", "no-such-package", CPU, torch.float32)
    assert missing == "not installed: pip install no-such-package"


@pytest.mark.parametrize("rows", [9, 41, 64])
def test_many_tiles_are_more_than_four(rows, monkeypatch):
    """Beyond four tiles the weight gradient is a float32 sum."""
    budgets = []
    monkeypatch.setattr(module, "fused_linear_eaft", lambda h, w, y, tile_bytes: budgets.append(tile_bytes))
    hidden, weight = torch.zeros(rows, 4, dtype=torch.bfloat16), torch.zeros(10, 4, dtype=torch.bfloat16)
    module.many_tiles(hidden, weight, torch.zeros(rows, dtype=torch.int64))
    tile_rows = budgets[0] // (10 * 2)
    assert 4 < math.ceil(rows / tile_rows) <= module.MANY_TILES
