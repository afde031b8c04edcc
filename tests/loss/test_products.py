"""The products of the loss against float64, where the processor has instructions for the dtype and where it has none."""

import pytest
import torch

from eaftdrope.loss import fused_linear_eaft, products
from eaftdrope.loss.definition import eaft_loss

LOW = [torch.bfloat16, torch.float16]
# rows, inner, columns: each of the three the longest, alone and beside an equal one; ragged; one row; none
SHAPES = [
    (300, 7, 5),
    (7, 300, 5),
    (7, 5, 300),
    (64, 64, 64),
    (300, 300, 3),
    (1, 257, 3),
    (33, 1, 65),
    (0, 4, 9),
    (4, 0, 9),
]


@pytest.fixture
def no_instructions(monkeypatch):
    """A processor that knows neither bfloat16 nor float16, and blocks of a few hundred bytes."""
    monkeypatch.setattr(products, "has_instructions", lambda dtype: False)
    monkeypatch.setattr(products, "_BLOCK_BYTES", 700)


def operands(shape, dtype):
    rows, inner, columns = shape
    random = torch.Generator().manual_seed(0)
    left, right = torch.randn(rows, inner, generator=random), torch.randn(columns, inner, generator=random)
    return left.to(dtype), right.to(dtype).t(), torch.randn(columns, generator=random).to(dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_widened_products_are_rounded_once(shape, dtype, no_instructions):
    left, right, bias = operands(shape, dtype)
    exact = left.double() @ right.double()
    out = torch.full(exact.shape, float("nan"), dtype=dtype)

    products.multiply_into(out, left, right)
    assert_rounded_once(out, exact)
    products.multiply_into(out, left, right, bias_C=bias)
    assert_rounded_once(out, exact + bias.double())
    before = torch.ones_like(out)
    products.multiply_into(before, left, right, add=True)
    assert_rounded_once(before, exact + 1)
    assert_rounded_once(products.multiply(left, right), exact)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_float32_sum_gets_what_was_never_rounded(shape, dtype, no_instructions):
    left, right, _ = operands(shape, dtype)
    exact = left.double() @ right.double()
    total = torch.zeros(exact.shape)
    products.multiply_into(total, left, right, add=True)
    for found in (total, products.multiply_for_sum(left, right)):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_wider_matrix_is_written_and_nothing_beside_it(no_instructions):
    left, right, _ = operands((5, 40, 200), torch.bfloat16)
    wide = torch.full((9, 300), 7.0, dtype=torch.bfloat16)
    products.multiply_into(wide[2:7, 50:250], left, right)
    assert_rounded_once(wide[2:7, 50:250], left.double() @ right.double())
    wide[2:7, 50:250] = 7
    assert (wide == 7).all()


def test_no_operand_of_the_size_of_a_head_is_widened_whole(no_instructions, monkeypatch):
    """The largest side goes by blocks in each of the three products of a loss."""
    rows, hidden, vocab = 8, 16, 1000
    widened = []
    genuine = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: widened.append(self.numel()) or genuine(self))
    head, states, grad = (torch.randn(shape).bfloat16() for shape in ((vocab, hidden), (rows, hidden), (rows, vocab)))
    products.multiply_into(torch.empty(rows, vocab).bfloat16(), states, head.t())
    products.multiply_into(torch.empty(rows, hidden).bfloat16(), grad, head)
    products.multiply_into(torch.empty(vocab, hidden).bfloat16(), grad.t(), states)
    assert max(widened) == 160 < rows * vocab


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, {"gate": "conflict-mask"}, {"recompute": True}, {"tail": "sparse"}, {"tile_bytes": 1}]
)
def test_the_loss_is_the_same_either_way(dtype, instructions, settings, monkeypatch):
    monkeypatch.setattr(products, "has_instructions", lambda dtype: instructions)
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(40, 24, generator=random).to(dtype).requires_grad_()
    weight = (torch.randn(600, 24, generator=random) * 0.3).to(dtype).requires_grad_()
    labels = torch.randint(0, 600, (40,), generator=random)
    labels[::5] = -100
    loss = fused_linear_eaft(hidden, weight, labels, **settings)
    loss.backward()

    exact_hidden, exact_weight = (value.detach().double().requires_grad_() for value in (hidden, weight))
    exact = eaft_loss(exact_hidden @ exact_weight.t(), labels, gate=settings.get("gate", "eaft"))
    exact.backward()
    torch.testing.assert_close(loss.double(), exact, rtol=2e-2, atol=0)
    for found, expected in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert (found.double() - expected).norm() <= 2e-2 * expected.norm()


def test_float32_and_float64_are_never_widened(no_instructions):
    assert not any(products.is_widened(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert all(products.is_widened(torch.ones(2, dtype=dtype)) for dtype in LOW)


def assert_rounded_once(found, exact):
    """Within half a unit in the last place of the dtype, and what float32 sums leave."""
    half_a_unit = torch.finfo(found.dtype).eps / 2
    torch.testing.assert_close(found.double(), exact, rtol=half_a_unit * 1.01, atol=2e-5)
