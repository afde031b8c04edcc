"""The inner loss: its derivatives of both orders without the logits, and the clip of each row."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from eaftdrope.ttt import TTTConfig, TTTState
from eaftdrope.ttt.inner import nll_twice, stepped
from tests.ttt.tiny import random_ids, read, tiny


def tensors(tokens=7, hidden=5, vocabulary=9, dtype=torch.float64):
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(vocabulary, hidden, dtype=dtype, requires_grad=True)
    return hidden_ND, weight_VD, torch.randint(0, vocabulary, (tokens,))


@pytest.mark.parametrize("rows", [1, 3, 7, 50, None])
def test_derivatives_of_both_orders_over_ragged_tiles(rows):
    hidden, weight, targets = tensors()

    def loss(hidden, weight):
        return nll_twice(hidden, weight, targets, rows=rows)

    assert torch.allclose(
        loss(hidden, weight), functional.cross_entropy(hidden @ weight.T, targets, reduction="none"), atol=1e-14
    )
    assert torch.autograd.gradcheck(loss, (hidden, weight))
    assert torch.autograd.gradgradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("constant", ["hidden", "weight"])
def test_derivatives_where_one_input_is_constant(constant):
    hidden, weight, targets = tensors()
    (hidden if constant == "hidden" else weight).requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *inputs: nll_twice(*inputs, targets, rows=3), (hidden, weight))
    assert torch.autograd.gradgradcheck(lambda *inputs: nll_twice(*inputs, targets, rows=3), (hidden, weight))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_buffer_of_all_logits_in_any_pass():
    tokens, width, vocabulary, rows = 64, 3, 500, 4
    hidden, weight, targets = tensors(tokens, width, vocabulary, torch.float32)
    with Largest() as largest:
        nll = nll_twice(hidden, weight, targets, rows=rows)
        gradients = torch.autograd.grad(nll.sum(), (hidden, weight), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
    assert hidden.grad.any() and weight.grad.any()
    assert rows * vocabulary <= largest.elements < tokens * vocabulary / 8
    with Largest() as whole:
        functional.cross_entropy(hidden @ weight.T, targets)
    assert whole.elements == tokens * vocabulary


@pytest.mark.parametrize("second_order", [False, True])
def test_each_row_is_clipped_over_all_of_its_tensors(second_order):
    torch.manual_seed(0)
    scale = torch.tensor([10.0, 0.01, 0.0], dtype=torch.float64)
    whole = torch.randn(3, 7, dtype=torch.float64) * scale[:, None]
    before = torch.randn(3, 7, dtype=torch.float64)

    def parts(rows):
        return [rows[:, :6].reshape(3, 2, 3), rows[:, 6:]]

    def step(delta):
        found = stepped(delta, parts(whole), 2.0, TTTConfig(clip=0.5), second_order=second_order)
        return torch.cat([part.flatten(1) for part in found], dim=1)

    expected = torch.stack([-2.0 * row * min(1.0, 0.5 / max(row.norm().item(), 1e-300)) for row in whole])
    assert expected[0].norm().item() == pytest.approx(1.0) and torch.equal(expected[1], -2.0 * whole[1])
    assert (step(None) - expected).abs().max() < 1e-15
    assert (step(parts(before)) - before - expected).abs().max() < 1e-15


def test_the_clip_is_differentiable_at_a_gradient_of_0():
    gradient = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (found,) = stepped(None, [gradient], 1.0, TTTConfig(clip=0.5), second_order=True)
    (slope,) = torch.autograd.grad(found.sum(), gradient)
    assert slope.isfinite().all() and not found.any()


def test_what_a_model_in_bfloat16_learns_is_kept_in_float32():
    """A step is smaller than the precision of the weights in bfloat16."""
    model, ids = tiny(dtype=torch.bfloat16, lr=1e-4), random_ids()
    state = TTTState(model)
    read(model, ids, 5, state)
    assert {change.dtype for change in state.delta} == {torch.float32}
    lost = [weight + change.to(torch.bfloat16) == weight for weight, change in zip(model.ttt.w0(), state.delta)]
    assert torch.cat([equal.flatten() for equal in lost]).float().mean() > 0.5
    assert all(change.any() for change in state.delta)
