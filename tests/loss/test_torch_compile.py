"""The operator inside torch.compile, and its registration."""

import pytest
import torch

from eaftdrope.loss import fused_linear_eaft, gates
from eaftdrope.loss.torch_compile import _operator, gate_name, named_gate
from tests.loss.reference import definition, make_inputs, relative_error


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "gate", ["eaft", "conflict-mask", gates.EAFT(alpha=2.0), gates.Custom(lambda s: s.probability, row_local=True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_function_has_no_graph_break_and_the_same_gradients(gate, dtype):
    hidden, weight, labels, bias = make_inputs(40, 300, 64, dtype, bias=True, spread=1.0)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden, weight, bias, labels):
        return 3 * fused_linear_eaft(hidden * 2, weight, labels, bias=bias, gate=gate) + hidden.sum()

    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    step(*leaves, labels).backward()
    expected_loss, expected = definition(hidden * 2, weight, labels, gate, bias=bias)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    assert relative_error(step(hidden, weight, bias, labels) - hidden.sum(), 3 * expected_loss) <= 2 * tolerance
    wanted = (6 * expected[0] + 1, 3 * expected[1], 3 * expected[2])
    for leaf, gradient in zip(leaves, wanted, strict=True):
        assert relative_error(leaf.grad, gradient) <= tolerance


def test_one_graph_for_batches_of_every_size():
    _, weight, _, _ = make_inputs(4, 100)
    step = torch.compile(
        lambda h, y: fused_linear_eaft(h, weight, y), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    torch._dynamo.utils.counters.clear()
    for rows in (9, 17, 30):
        hidden, _, labels, _ = make_inputs(rows, 100, seed=rows)
        loss = step(hidden, labels)
        assert relative_error(loss, definition(hidden, weight, labels, "eaft")[0]) < 2e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_under_autocast_and_without_gradients():
    hidden, weight, labels, _ = make_inputs(40, 300, 64, spread=1.0)
    step = torch.compile(fused_linear_eaft, fullgraph=True, backend="aot_eager")
    leaf = weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        step(hidden, leaf, labels).backward()
        eager = weight.clone().requires_grad_()
        fused_linear_eaft(hidden, eager, labels).backward()
    assert leaf.grad.dtype == torch.float32 and torch.equal(leaf.grad, eager.grad)
    expected, _ = definition(hidden, weight, labels, "eaft")
    with torch.no_grad():
        assert relative_error(step(hidden, weight, labels), expected) < 2e-6


def test_details_of_a_compiled_call_say_which_rows_count():
    hidden, weight, labels, _ = make_inputs(40, 100)
    step = torch.compile(fused_linear_eaft, fullgraph=True, backend="aot_eager")
    _, compiled = step(hidden, weight, labels, return_details=True)
    _, eager = fused_linear_eaft(hidden, weight, labels, return_details=True)
    assert torch.equal(compiled.trained, labels != -100)
    for name in ("nll", "entropy", "topk_entropy", "correct"):
        assert torch.equal(getattr(compiled.stats, name)[compiled.trained], getattr(eager.stats, name))
    assert torch.equal(compiled.weight[eager.rows], eager.weight) and not compiled.weight[~compiled.trained].any()


def test_registration():
    """torch's own checks of the schema and of the fake implementation."""
    hidden, weight, labels, bias = make_inputs(12, 50, bias=True)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    settings = (gate_name("eaft"), 1.0, None, "auto", None, "exact", 2.0**-12, 0.0, False, -100)
    anchor = (torch.ones(12, 8), torch.ones(50, 8), None, 0.1, "forward", False, 1.0, None)
    for needed in ([False] * 3, [True] * 3, [True, False, False]):
        for token_weights, arguments in ((None, settings), (torch.ones(12), (*settings, *anchor))):
            torch.library.opcheck(
                _operator,
                (*leaves, labels, None, token_weights, needed, *arguments),
                test_utils=("test_schema", "test_faketensor"),
            )


def test_gates_as_text():
    assert named_gate(gate_name(gates.EAFT(alpha=0.5, k=7))) == gates.EAFT(alpha=0.5, k=7)
    assert named_gate(gate_name("conflict-mask")) == gates.ConflictMask()
    mine = gates.Custom(lambda stats: stats.nll)
    assert named_gate(gate_name(mine)) is mine
    assert gate_name(mine) == gate_name(mine) != gate_name(gates.Custom(lambda stats: stats.nll))


def test_the_backward_of_a_compiled_call_may_run_twice():
    hidden, weight, labels, _ = make_inputs(20, 60)
    leaf = hidden.clone().requires_grad_()
    loss = torch.compile(fused_linear_eaft, fullgraph=True, backend="aot_eager")(leaf, weight, labels)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, leaf)[0])


@pytest.mark.slow
def test_inductor():
    hidden, weight, labels, _ = make_inputs(40, 300, 64, spread=1.0)
    step = torch.compile(lambda h, w: fused_linear_eaft(torch.tanh(h), w, labels), fullgraph=True)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    step(*leaves).backward()
    eager = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    fused_linear_eaft(torch.tanh(eager[0]), eager[1], labels).backward()
    for leaf, other in zip(leaves, eager, strict=True):
        assert relative_error(leaf.grad, other.grad) < 1e-5
