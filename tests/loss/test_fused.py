"""The fused operator against the float64 definition: value and every gradient."""

import pytest
import torch

from eaftdrope.loss import eaft_loss, fused_linear_eaft, gates
from eaftdrope.loss.gradients import Gradients
from tests.loss.reference import assert_equal_to_definition, definition, make_inputs, relative_error, run

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
ROW_LOCAL = ["eaft", "eaft-vocab", "eaft-exact", "eaft-sigmoid", "dft", "focal", "profit", "constant", "none"]
BATCH = ["eaft-mask", "conflict-mask", "talr", "mile"]


def rows_a_tile(rows: int, weight: torch.Tensor) -> int:
    return rows * weight.shape[0] * weight.element_size()


# V below, at and above the column block (64); a prime; above K blocks of it, so that top-K skips blocks
@pytest.mark.parametrize("vocab", [7, 63, 64, 65, 257, 1408, 5003])
@pytest.mark.parametrize("gate", ROW_LOCAL + BATCH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_gate_over_ragged_shapes(vocab, gate, dtype):
    hidden, weight, labels, bias = make_inputs(37, vocab, dtype=dtype, bias=True)
    tile = rows_a_tile(6, weight)
    assert_equal_to_definition(hidden, weight, labels, TOLERANCE[dtype], gate, bias=bias, tile_bytes=tile)


@pytest.mark.parametrize("vocab", [257, 5003])
@pytest.mark.parametrize("gate", ["eaft", "eaft-vocab", "none", "mile"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(vocab, gate, dtype):
    hidden, weight, labels, bias = make_inputs(300, vocab, 64, dtype, bias=True, spread=1.0)
    assert_equal_to_definition(hidden, weight, labels, TOLERANCE[dtype], gate, bias=bias)


def test_float16_sums_that_leave_its_range():
    """The weight gradient of a loss sum over many rows exceeds 65,504 before 1 / num_items is applied."""
    hidden, weight, labels, _ = make_inputs(2000, 50, 8, torch.float16, ignored=0.0, spread=0.1)
    hidden, labels = hidden.abs() * 60, torch.zeros_like(labels)
    loss, (_, actual, _) = run(hidden, weight * 0, labels, gate="none")
    expected_loss, (_, expected, _) = definition(hidden, weight * 0, labels, "none")
    assert (expected * 2000).abs().max() > 65_504
    assert relative_error(loss, expected_loss) < 1e-3 and relative_error(actual, expected) < 1e-3


# 4 tiles: the weight gradient is summed in bfloat16; 5 and more: in float32
@pytest.mark.parametrize("tiles", [1, 4, 5, 32])
def test_bfloat16_weight_gradient_on_both_sides_of_float32_accumulation(tiles):
    hidden, weight, labels, _ = make_inputs(640, 1000, 64, torch.bfloat16, ignored=0.0, spread=1.0)
    tile_bytes = rows_a_tile(640 // tiles, weight)
    _, (_, actual, _) = run(hidden, weight, labels, gate="none", tile_bytes=tile_bytes)
    _, (_, expected, _) = definition(hidden, weight, labels, "none")
    assert relative_error(actual, expected) <= (3e-3 if tiles > 4 else 5e-3)


# one row and seven: libraries have other, less exact kernels for a handful of rows
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 7, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_262144(dtype, rows):
    hidden, weight, labels, _ = make_inputs(24, 262_144, 16, dtype, spread=1.5)
    assert_equal_to_definition(hidden, weight, labels, TOLERANCE[dtype], tile_bytes=rows_a_tile(rows, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"logit_scale": 0.25}, {"logit_scale": 2.0, "softcap": 30.0}])
def test_softcap_and_scale(dtype, options):
    hidden, weight, labels, bias = make_inputs(41, 300, 64, dtype, bias=True, spread=1.0)
    assert_equal_to_definition(hidden, weight, labels, TOLERANCE[dtype], bias=bias, **options)


@pytest.mark.parametrize("num_items", [1, 17, 3.5, torch.tensor(29)])
def test_num_items_divides_loss_and_gradients(num_items):
    hidden, weight, labels, _ = make_inputs(20, 100)
    assert_equal_to_definition(hidden, weight, labels, 2e-6, num_items=num_items)


def test_a_tiny_share_of_a_huge_batch_does_not_underflow_in_bfloat16():
    hidden, weight, labels, _ = make_inputs(50, 200, 32, torch.bfloat16, spread=1.0)
    _, (small, _, _) = run(hidden, weight, labels, num_items=1e9)
    _, (large, _, _) = run(hidden, weight, labels, num_items=1)
    assert relative_error(small * 1e9, large) < 4e-3


def test_one_row():
    hidden, weight, labels, _ = make_inputs(1, 300, ignored=0.0)
    assert_equal_to_definition(hidden, weight, labels, 2e-6)


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("gate", ["eaft", *BATCH])
def test_no_trained_row_gives_a_zero_with_a_graph(rows, gate):
    hidden, weight, labels, bias = make_inputs(rows, 100, bias=True, ignored=1.1)
    loss, gradients = run(hidden, weight, labels, bias=bias, gate=gate)
    assert loss == 0
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.fixture
def projected_rows(monkeypatch):
    """Rows of every projection onto a vocabulary of 100 tokens, in order."""
    rows = []
    real = torch.mm

    def counted(left, right, **options):
        if right.shape[1] == 100:
            rows.append(left.shape[0])
        return real(left, right, **options)

    monkeypatch.setattr(torch, "mm", counted)
    return rows


def test_ignored_rows_never_reach_a_gemm(projected_rows):
    hidden, weight, labels, _ = make_inputs(64, 100)
    run(hidden, weight, labels)
    assert sum(projected_rows) == (labels != -100).sum()


def closing(stats):
    """A gate that closes about half of the rows, whatever else is in their tile."""
    return torch.where(stats.nll * 100 % 1 < 0.5, 0.0, stats.probability)


@pytest.fixture
def gradient_rows(monkeypatch):
    """Rows of every product with the head in the gradient with respect to the hidden states."""
    rows = []
    real = Gradients.add

    def counted(self, indices, hidden, grad):
        rows.append(len(grad))
        real(self, indices, hidden, grad)

    monkeypatch.setattr(Gradients, "add", counted)
    return rows


# tiles of 1 row (open or closed whole), of some, and one for all
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_rows_whose_gate_is_closed_never_reach_a_gradient_gemm(gradient_rows, rows, ignored):
    hidden, weight, labels, bias = make_inputs(64, 100, bias=True, ignored=ignored)
    gate = gates.Custom(closing, row_local=True, topk=None)
    options = {"gate": gate, "bias": bias, "tile_bytes": rows_a_tile(rows, weight)}
    _, details = fused_linear_eaft(hidden, weight, labels, return_details=True, **options)
    opened = int((details.weight != 0).sum())
    assert 0 < opened < len(details.weight) and int((~details.closed).sum()) == opened
    assert_equal_to_definition(hidden, weight, labels, 2e-6, **options)
    assert sum(gradient_rows) == opened


def test_a_gate_threshold_drops_the_rows_below_it_and_counts_them(gradient_rows):
    hidden, weight, labels, _ = make_inputs(80, 100, ignored=0.2)

    def above(stats):
        weight = stats.probability
        return torch.where(weight < 0.05, 0, weight)

    loss, gradients = run(hidden, weight, labels, gate="dft", gate_threshold=0.05)
    exact, _ = definition(hidden, weight, labels, "dft")
    _, expected = definition(hidden, weight, labels, above)
    assert relative_error(loss, exact) < 2e-6, "the loss keeps every term"
    assert all(relative_error(a, b) < 2e-6 for a, b in zip(gradients[:2], expected[:2]))
    _, details = fused_linear_eaft(hidden, weight, labels, gate="dft", gate_threshold=0.05, return_details=True)
    assert torch.equal(details.closed, details.weight < 0.05) and 0 < details.closed.sum() < len(details.closed)
    assert sum(gradient_rows) == (~details.closed).sum()


def test_a_negative_weight_is_not_a_closed_one():
    hidden, weight, labels, _ = make_inputs(30, 100)
    gate = gates.Custom(lambda stats: -stats.probability, row_local=True, topk=None)
    assert_equal_to_definition(hidden, weight, labels, 2e-6, gate=gate, gate_threshold=1e-9)


# one row, a few, and all rows in a tile; slices of the vocabulary that divide it and that do not
@pytest.mark.parametrize("rows", [1, 6, 60])
@pytest.mark.parametrize("gate", ["eaft", "conflict-mask", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_recompute(dtype, gate, rows):
    hidden, weight, labels, bias = make_inputs(60, 1003, 64, dtype, bias=True, spread=1.0)
    tile = rows_a_tile(rows, weight)
    assert_equal_to_definition(
        hidden, weight, labels, TOLERANCE[dtype], gate, bias=bias, tile_bytes=tile, recompute=True
    )  # fmt: skip


def test_recompute_writes_each_slice_of_the_weight_gradient_once(monkeypatch):
    """One GEMM over all rows rounds once: as exact as one tile, however small the tiles are."""
    hidden, weight, labels, _ = make_inputs(640, 1000, 64, torch.bfloat16, ignored=0.0, spread=1.0)
    tile = rows_a_tile(20, weight)
    _, (_, expected, _) = definition(hidden, weight, labels, "none")
    _, (_, whole, _) = run(hidden, weight, labels, gate="none")
    _, (_, sliced, _) = run(hidden, weight, labels, gate="none", tile_bytes=tile, recompute=True)
    assert relative_error(sliced, expected) <= 1.1 * relative_error(whole, expected)


@pytest.mark.parametrize("gate", ["conflict-mask", "eaft-mask"])
def test_rows_that_a_mask_closes_are_not_projected_again(projected_rows, gate):
    hidden, weight, labels, _ = make_inputs(64, 100, ignored=0.0, spread=4.0)
    _, details = fused_linear_eaft(hidden, weight, labels, gate=gate, return_details=True)
    opened = int((details.weight != 0).sum())
    assert 0 < opened < 64
    projected_rows.clear()
    run(hidden, weight, labels, gate=gate, tile_bytes=rows_a_tile(8, weight))
    assert sum(projected_rows) == 64 + opened


def test_a_frozen_head_forms_no_weight_gradient(monkeypatch):
    hidden, weight, labels, _ = make_inputs(30, 100)
    monkeypatch.setattr("eaftdrope.loss.gradients.Gradients._add_weight", lambda *_: pytest.fail("dW was formed"))
    loss = fused_linear_eaft(hidden.requires_grad_(), weight, labels)
    loss.backward()
    expected = definition(hidden, weight, labels, "eaft")[1][0]
    assert relative_error(hidden.grad, expected) < 2e-6


def test_no_grad_forms_no_gradient(monkeypatch):
    hidden, weight, labels, _ = make_inputs(30, 100)
    monkeypatch.setattr("eaftdrope.loss.backends.torch.tile_gradient_", lambda *_: pytest.fail("gradient formed"))
    with torch.no_grad():
        loss = fused_linear_eaft(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert torch.allclose(loss.double(), definition(hidden, weight, labels, "eaft")[0], rtol=2e-6)


def test_tied_embeddings_add_both_gradients():
    _, weight, labels, _ = make_inputs(12, 90, 16)
    ids = torch.arange(12)

    def total(leaf, loss):
        (loss(leaf[ids], leaf) + leaf.square().sum()).backward()
        return leaf.grad

    fused = total(weight.clone().requires_grad_(), lambda h, w: fused_linear_eaft(h, w, labels, gate="none"))
    plain = total(weight.double().requires_grad_(), lambda h, w: eaft_loss(h @ w.T, labels, "none"))
    assert relative_error(fused, plain) < 2e-6


def test_the_graph_around_the_op_scales_its_gradients():
    hidden, weight, labels, _ = make_inputs(30, 100)
    leaf = hidden.clone().requires_grad_()
    (3 * fused_linear_eaft(leaf, weight, labels) + leaf.sum()).backward()
    expected = 3 * definition(hidden, weight, labels, "eaft")[1][0] + 1
    assert relative_error(leaf.grad, expected) < 2e-6


def test_used_twice_in_one_step():
    hidden, weight, labels, _ = make_inputs(30, 100)
    leaf = weight.clone().requires_grad_()
    (fused_linear_eaft(hidden[:9], leaf, labels[:9]) + fused_linear_eaft(hidden[9:], leaf, labels[9:])).backward()
    expected = (
        definition(hidden[:9], weight, labels[:9], "eaft")[1][1]
        + definition(hidden[9:], weight, labels[9:], "eaft")[1][1]
    )
    assert relative_error(leaf.grad, expected) < 2e-6


def test_a_second_backward_says_why_not():
    hidden, weight, labels, _ = make_inputs(10, 50)
    loss = fused_linear_eaft(hidden.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run only once"):
        loss.backward()


def test_leading_dimensions_and_non_contiguous_rows():
    hidden, weight, labels, _ = make_inputs(24, 80)
    wide = torch.stack([hidden, hidden + 1], dim=-1)[..., 0].reshape(4, 6, -1)
    loss = fused_linear_eaft(wide, weight, labels.view(4, 6))
    assert torch.allclose(loss, fused_linear_eaft(hidden, weight, labels), rtol=1e-6)


def test_autocast_computes_in_its_dtype_and_returns_float32_gradients():
    hidden, weight, labels, _ = make_inputs(60, 300, 64, spread=1.0)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        loss, details = fused_linear_eaft(*leaves, labels, return_details=True)
    loss.backward()
    rounded = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    fused_linear_eaft(*rounded, labels).backward()
    assert details.stats.nll.dtype == torch.float32
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    assert torch.equal(leaves[0].grad, rounded[0].grad.float())
    # the weight gradient is never rounded to bfloat16 on its way into the float32 parameter
    _, (_, expected, _) = definition(*rounded, labels, "eaft")
    assert not torch.equal(leaves[1].grad, leaves[1].grad.bfloat16().float())
    assert relative_error(leaves[1].grad, expected) < relative_error(rounded[1].grad, expected) <= 5e-3


def test_inside_a_checkpoint():
    hidden, weight, labels, _ = make_inputs(20, 100)
    leaf = hidden.clone().requires_grad_()
    run_op = torch.utils.checkpoint.checkpoint
    run_op(lambda h: fused_linear_eaft(h * 2, weight, labels), leaf, use_reentrant=False).backward()
    expected = 2 * definition(hidden * 2, weight, labels, "eaft")[1][0]
    assert relative_error(leaf.grad, expected) < 2e-6


def test_details_are_of_the_trained_rows_in_order():
    hidden, weight, labels, _ = make_inputs(50, 130)
    _, details = fused_linear_eaft(
        hidden, weight, labels, gate=gates.EAFT(k=5), tile_bytes=rows_a_tile(7, weight), return_details=True
    )
    kept = (labels != -100).nonzero().squeeze(1)
    logits = (hidden.double() @ weight.double().T)[kept]
    nll = torch.nn.functional.cross_entropy(logits, labels[kept], reduction="none")
    assert torch.equal(details.rows, kept)
    assert torch.allclose(details.stats.nll.double(), nll, rtol=1e-5)
    assert torch.equal(details.stats.correct, logits.argmax(-1) == labels[kept])
    assert details.stats.vocab_size == 130
    top = logits.topk(5).values.log_softmax(-1)
    assert torch.allclose(details.stats.topk_entropy.double(), -(top.exp() * top).sum(-1), rtol=1e-5)


def test_a_function_is_a_gate_and_sees_all_tokens_of_the_call():
    hidden, weight, labels, _ = make_inputs(40, 100)
    sizes = []

    def gate(stats):
        sizes.append(len(stats.nll))
        return (stats.entropy > stats.entropy.median()).float()

    trained = int((labels != -100).sum())
    assert_equal_to_definition(hidden, weight, labels, 2e-6, gate=gate, tile_bytes=rows_a_tile(4, weight))
    assert sizes == [trained, trained]


def test_a_row_local_function_sees_tiles():
    hidden, weight, labels, _ = make_inputs(40, 100, ignored=0.0)
    sizes = []

    def function(stats):
        sizes.append(len(stats.nll))
        return stats.probability

    gate = gates.Custom(function, row_local=True, topk=None)
    fused_linear_eaft(hidden, weight, labels, gate=gate, tile_bytes=rows_a_tile(16, weight))
    assert sizes == [14, 14, 12]


def test_weight_gradient_is_zero_where_every_row_is_closed():
    hidden, weight, labels, bias = make_inputs(12, 60, bias=True)
    loss, gradients = run(hidden, weight, labels, bias=bias, gate=lambda stats: torch.zeros_like(stats.nll))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


REFUSALS = [
    ({"label_smoothing": 0.1}, "label_smoothing=0.1 cannot be combined"),
    ({"gate": "eatf"}, "unknown gate 'eatf'. Did you mean 'eaft'?"),
    ({"gate": lambda stats: stats.nll[:1]}, "must return one weight per token"),
    ({"backend": "cudda"}, "unknown loss backend 'cudda'"),
    ({"tail": "sparce"}, "unknown tail 'sparce'"),
    ({"tail_threshold": 0.0}, "tail_threshold=0.0"),
    ({"gate_threshold": 1.0}, "gate_threshold=1.0"),
    ({"bias": torch.zeros(3)}, "bias of shape (3,)"),
    ({"sequence_ids": torch.zeros(3, dtype=torch.long)}, "sequence_ids of shape (3,)"),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS)
def test_refusals(options, message):
    hidden, weight, labels, _ = make_inputs(10, 50)
    with pytest.raises(ValueError) as error:
        fused_linear_eaft(hidden, weight, labels, **options)
    assert message in str(error.value)


def test_refuses_operands_that_do_not_fit():
    hidden, weight, labels, _ = make_inputs(10, 50)
    with pytest.raises(ValueError, match="nothing is shifted"):
        fused_linear_eaft(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match="does not project hidden states"):
        fused_linear_eaft(hidden, weight[:, :5], labels)
    with pytest.raises(ValueError, match=r"weight is torch\.bfloat16"):
        fused_linear_eaft(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match="must be integers"):
        fused_linear_eaft(hidden, weight, labels.float())


# the first and last id of the vocabulary are labels, their neighbours are not
@pytest.mark.parametrize(("label", "valid"), [(0, True), (49, True), (50, False), (-1, False), (-100, True)])
def test_labels_outside_the_vocabulary(label, valid):
    hidden, weight, labels, _ = make_inputs(10, 50)
    labels[3] = label
    if valid:
        assert torch.isfinite(fused_linear_eaft(hidden, weight, labels))
    else:
        with pytest.raises(ValueError, match="outside the vocabulary of 50 tokens"):
            fused_linear_eaft(hidden, weight, labels)
