"""Weights of single tokens: a factor on the gate, or in its place where negative. Against the definition in float64."""

import pytest
import torch

from eaftdrope.loss import anchor_divergence, eaft_loss, fused_linear_eaft, gates, token_statistics
from eaftdrope.loss.definition import evaluate_gate
from tests.loss.anchors import (
    ANCHORS,
    anchor_id,
    anchored_definition,
    assert_anchored,
    base_logits,
    make_base,
    run_anchored,
)
from tests.loss.reference import assert_equal_to_definition, definition, make_inputs, relative_error, run

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3}
BACKENDS = {torch.float64: "torch", torch.float32: "auto", torch.bfloat16: "auto"}


def weights_of(rows, seed=1):
    """Weights above and below 1, some of them 0, and a third of the tokens without a gate."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, generator=generator) * 3
    values[torch.rand(rows, generator=generator) < 0.1] = 0
    return torch.where(torch.rand(rows, generator=generator) < 0.3, -values, values)


def test_the_definition_in_plain_sums():
    hidden, weight, labels, _ = make_inputs(30, 50, dtype=torch.float64, ignored=0.0)
    values = weights_of(30).double()
    stats = token_statistics(hidden @ weight.T, labels)
    gate = evaluate_gate(gates.EAFT(), stats)
    expected = sum(
        (abs(u) if u < 0 else u * g) * nll for u, g, nll in zip(values.tolist(), gate.tolist(), stats.nll.tolist())
    )
    assert eaft_loss(hidden @ weight.T, labels, token_weights=values).item() == pytest.approx(expected / 30, rel=1e-12)


# tiles of some rows and one for all; a gate that compares tokens; both orders of the gradient; a sparse tail
@pytest.mark.parametrize("vocab", [7, 257, 1408])
@pytest.mark.parametrize("gate", ["eaft", "none", "profit", "mile", "conflict-mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"tile_bytes": 257 * 8 * 5}, {"recompute": True}], ids=["", "tiles", "recompute"]
)
def test_equal_to_the_definition_over_ragged_shapes(vocab, gate, dtype, options):
    hidden, weight, labels, bias = make_inputs(37, vocab, dtype=dtype, bias=True, spread=1.0)
    options = {**options, "token_weights": weights_of(37), "backend": BACKENDS[dtype]}
    actual = run(hidden, weight, labels, bias=bias, gate=gate, **options)
    expected = definition(hidden, weight, labels, gate, bias=bias, token_weights=options["token_weights"])
    assert relative_error(actual[0], expected[0]) <= TOLERANCE[dtype]
    for own, true in zip(actual[1], expected[1], strict=True):
        assert relative_error(own, true) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_each_backend_of_a_cpu(backend):
    hidden, weight, labels, _ = make_inputs(60, 300)
    plain = run(hidden, weight, labels, backend=backend)
    assert_equal_to_definition(hidden, weight, labels, 2e-6, token_weights=torch.ones(60))
    ones = run(hidden, weight, labels, backend=backend, token_weights=torch.ones(60))
    for own, same in zip((plain[0], *plain[1][:2]), (ones[0], *ones[1][:2]), strict=True):
        assert torch.equal(own, same), "a weight of 1 changes no bit"
    exempt = run(hidden, weight, labels, backend=backend, token_weights=-torch.ones(60))
    ungated = run(hidden, weight, labels, backend=backend, gate="none")
    for own, same in zip((exempt[0], *exempt[1][:2]), (ungated[0], *ungated[1][:2]), strict=True):
        assert torch.equal(own, same), "without their gate all tokens train as under the gate none"


def test_rows_of_a_batch_in_any_shape_and_a_sum_over_pieces():
    """What the trainer relies on: with one divisor, the sum over pieces of a batch is the loss of the batch."""
    hidden, weight, labels, _ = make_inputs(48, 100, dtype=torch.float64)
    values = weights_of(48)
    whole, gradients = run(hidden, weight, labels, token_weights=values, num_items=31)
    shaped, _ = run(hidden.view(4, 12, -1), weight, labels.view(4, 12), token_weights=values.view(4, 12), num_items=31)
    assert shaped == whole
    pieces = [
        run(hidden[part], weight, labels[part], token_weights=values[part], num_items=31)
        for part in (slice(0, 5), slice(5, 30), slice(30, 48))
    ]
    assert sum(loss for loss, _ in pieces).item() == pytest.approx(whole.item(), rel=1e-12)
    assert relative_error(sum(found[1] for _, found in pieces), gradients[1]) < 1e-12


def test_an_exempt_conflict_trains_where_the_gate_would_silence_it():
    hidden, weight, labels, _ = make_inputs(20, 50, dtype=torch.float64, ignored=0.0, spread=30.0)
    gated, (silent, _, _) = run(hidden, weight, labels)
    loss, (loud, _, _) = run(hidden, weight, labels, token_weights=-torch.ones(20))
    assert loss > 10 * gated and loud.norm() > 10 * silent.norm()


def test_the_divisor_is_the_number_of_trained_tokens_whatever_their_weights():
    hidden, weight, labels, _ = make_inputs(20, 50, dtype=torch.float64)
    single, _ = run(hidden, weight, labels)
    double, _ = run(hidden, weight, labels, token_weights=torch.full((20,), 2.0))
    assert double.item() == pytest.approx(2 * single.item(), rel=1e-12)


def test_details_carry_the_weights_of_the_trained_rows():
    hidden, weight, labels, _ = make_inputs(40, 100)
    values = weights_of(40)
    _, details = fused_linear_eaft(hidden, weight, labels, token_weights=values, return_details=True)
    assert torch.equal(details.token_weight, values[labels != -100])
    exempt = details.token_weight < 0
    assert torch.equal(details.weight[exempt], -details.token_weight[exempt])
    assert torch.equal(details.closed, details.weight == 0)


def test_inside_torch_compile():
    torch._dynamo.reset()
    hidden, weight, labels, _ = make_inputs(40, 300, 64, spread=1.0)
    values = weights_of(40)
    step = torch.compile(fused_linear_eaft, fullgraph=True, backend="aot_eager")
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss, details = step(*leaves, labels, token_weights=values, return_details=True)
    loss.backward()
    expected_loss, expected = definition(hidden, weight, labels, "eaft", token_weights=values)
    assert relative_error(loss, expected_loss) < 2e-6
    for leaf, gradient in zip(leaves, expected[:2], strict=True):
        assert relative_error(leaf.grad, gradient) < 2e-6
    assert torch.equal(details.token_weight, values)
    torch._dynamo.reset()


# one tile and several, a gate that compares tokens, and the second pass
@pytest.mark.parametrize("anchor", ANCHORS, ids=anchor_id)
@pytest.mark.parametrize("gate", ["eaft", "mile"])
@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "cpu")]
)
@pytest.mark.parametrize(
    "options", [{}, {"tile_bytes": 257 * 8 * 5}, {"recompute": True}], ids=["", "tiles", "recompute"]
)
def test_beside_an_anchor(anchor, gate, dtype, backend, options):
    hidden, weight, labels, bias = make_inputs(37, 257, dtype=dtype, bias=True, spread=1.0)
    options = {**options, "token_weights": weights_of(37), "backend": backend, "bias": bias}
    assert_anchored(hidden, weight, labels, TOLERANCE[dtype], anchor, make_base(37, 257, dtype=dtype), gate, **options)


def test_an_anchor_is_not_weighted():
    """A token of weight 0 keeps its divergence and the gradient of it."""
    hidden, weight, labels, _ = make_inputs(40, 90, dtype=torch.float64)
    base, anchor, kept = make_base(40, 90, dtype=torch.float64), ANCHORS[1], labels != -100
    options = {"anchor": anchor, "base": base, "token_weights": torch.zeros(40)}
    loss, gradients, details = run_anchored(hidden, weight, labels, **options)
    divergence = anchor_divergence((hidden @ weight.T)[kept], base_logits(base)[kept], labels[kept], anchor)
    assert loss.item() == pytest.approx(anchor.kl * divergence.mean().item(), rel=1e-12)
    assert relative_error(details.divergence, divergence) < 1e-12 and details.closed.all()
    assert gradients[0][kept].abs().sum(-1).min() > 0


def test_inside_torch_compile_beside_an_anchor():
    torch._dynamo.reset()
    hidden, weight, labels, _ = make_inputs(40, 300, 64, spread=1.0)
    values, base, anchor = weights_of(40), make_base(40, 300), ANCHORS[3]
    step = torch.compile(fused_linear_eaft, fullgraph=True, backend="aot_eager")
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    options = {"token_weights": values, "anchor": anchor, "base": base}
    loss, details = step(*leaves, labels, return_details=True, **options)
    loss.backward()
    expected_loss, expected = anchored_definition(hidden, weight, labels, "eaft", anchor, base, token_weights=values)
    assert relative_error(loss, expected_loss) < 2e-6
    for leaf, gradient in zip(leaves, expected[:2], strict=True):
        assert relative_error(leaf.grad, gradient) < 2e-6
    assert torch.equal(details.token_weight, values) and details.divergence.shape == (40,)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("values", "message"),
    [(torch.ones(4), r"token_weights of shape \(4,\)"), (torch.ones(5).long(), "must be floating-point numbers")],
)
def test_refused(values, message):
    hidden, weight, labels, _ = make_inputs(5, 50)
    with pytest.raises(ValueError, match=message):
        fused_linear_eaft(hidden, weight, labels, token_weights=values)
    with pytest.raises(ValueError, match=message):
        eaft_loss(hidden @ weight.T, labels, token_weights=values)
