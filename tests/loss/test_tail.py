"""The tail-sparse backward: exact where nothing is dropped, close where the tail is, and fewer columns."""

import pytest
import torch

from eaftdrope.loss import fused_linear_eaft
from eaftdrope.loss.tail import GROUP_ROWS, TailSparseGradients
from tests.loss.reference import definition, make_inputs, relative_error, run

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def errors(actual, expected):
    return [relative_error(a, b) for a, b in zip(actual, expected, strict=True) if b is not None]


@pytest.fixture
def kept(monkeypatch):
    """Columns that each group of rows kept."""
    found = []
    real = TailSparseGradients.finish

    def finish(self):
        found.extend(self.kept_columns)
        return real(self)

    monkeypatch.setattr(TailSparseGradients, "finish", finish)
    return found


# rows of one group and of several; one look and two
@pytest.mark.parametrize("rows", [5, GROUP_ROWS - 1, GROUP_ROWS + 1, 3 * GROUP_ROWS])
@pytest.mark.parametrize("gate", ["eaft", "conflict-mask"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_nothing_is_dropped_at_a_vanishing_threshold(dtype, gate, rows, kept):
    hidden, weight, labels, bias = make_inputs(rows, 300, 64, dtype, bias=True, spread=1.0)
    tile_bytes = 2 * GROUP_ROWS * weight.shape[0] * weight.element_size()
    loss, gradients = run(
        hidden, weight, labels, bias=bias, gate=gate, tail="sparse", tail_threshold=1e-30, tile_bytes=tile_bytes
    )
    expected_loss, expected = definition(hidden, weight, labels, gate, bias=bias)
    assert relative_error(loss, expected_loss) <= TOLERANCE[dtype]
    assert max(errors(gradients, expected)) <= TOLERANCE[dtype]
    assert min(kept) == 300


def text_like(rows=700, vocab=4000, hidden_size=96, dtype=torch.float32):
    """Peaked rows with a long thin tail around a common direction, as a language model has them."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(vocab, hidden_size, generator=generator, dtype=torch.float64) + 0.4
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    hidden = weight[labels] / weight[labels].norm(dim=-1, keepdim=True)
    hidden += torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64) * 0.02
    labels[::7] = torch.randint(0, vocab, (len(labels[::7]),), generator=generator)
    return hidden.to(dtype), weight.to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_the_rank_one_tail_brings_the_gradient_back(dtype, softcap, kept, monkeypatch):
    hidden, weight, labels = text_like(dtype=dtype)
    options = {"gate": "eaft", "softcap": softcap}
    _, expected = definition(hidden, weight, labels, **options)
    _, gradients = run(hidden, weight, labels, tail="sparse", tail_threshold=2**-11, **options)
    assert max(kept) < 0.5 * weight.shape[0]
    with_tail = errors(gradients, expected)
    monkeypatch.setattr(TailSparseGradients, "_add_tails", lambda self: None)
    _, gradients = run(hidden, weight, labels, tail="sparse", tail_threshold=2**-11, **options)
    without = errors(gradients, expected)
    assert with_tail[0] < 0.5 * without[0], (with_tail, without)
    assert max(with_tail) < 0.12, with_tail


def test_the_threshold_is_applied_after_the_gate(kept):
    """A gate that all but closes every row leaves nothing but what it weighs."""
    hidden, weight, labels = text_like()
    run(hidden, weight, labels, gate=lambda stats: torch.full_like(stats.nll, 1e-6), tail="sparse")
    assert max(kept) == 0
    kept.clear()
    run(hidden, weight, labels, gate="none", tail="sparse")
    assert min(kept) > 0


def test_the_bias_gradient_is_exact_whatever_is_dropped():
    hidden, weight, labels = text_like()
    bias = torch.zeros(weight.shape[0])
    _, gradients = run(hidden, weight, labels, bias=bias, gate="none", tail="sparse", tail_threshold=0.5)
    _, expected = definition(hidden, weight, labels, "none", bias=bias)
    assert relative_error(gradients[2], expected[2]) < 1e-5


def test_a_frozen_head_and_no_rows():
    hidden, weight, labels = text_like()
    leaf = hidden.clone().requires_grad_()
    fused_linear_eaft(leaf, weight, labels, tail="sparse", tail_threshold=1e-30).backward()
    assert relative_error(leaf.grad, definition(hidden, weight, labels, "eaft")[1][0]) < 5e-6
    loss, gradients = run(hidden, weight, torch.full_like(labels, -100), tail="sparse")
    assert loss == 0 and not any(gradient.any() for gradient in gradients[:2])


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_nan_is_not_hidden(backend):
    """Neither by the columns that are dropped nor by their mean."""
    hidden, weight, labels = text_like(rows=40)
    hidden[3] = float("nan")
    loss, gradients = run(hidden, weight, labels, gate="none", tail="sparse", backend=backend)
    assert loss.isnan() and gradients[0][3].isnan().all() and gradients[1].isnan().any()
