"""The anchor against the float64 definition on full logits: value and every gradient, in both directions, masked or not."""

import math

import pytest
import torch

from eaftdrope.loss import Anchor, BaseLogits, LossSettings, anchor_divergence, eaft_loss, fused_linear_eaft, gates
from eaftdrope.loss.anchor import PRESETS, resolve_anchor
from eaftdrope.loss.buffers import release_buffers, tile_buffer
from eaftdrope.loss.gradients import Gradients
from tests.loss.anchors import (
    ANCHORS,
    anchor_id,
    anchored_definition,
    assert_anchored,
    base_logits,
    make_base,
    run_anchored,
)
from tests.loss.reference import make_inputs, relative_error, run
from tests.loss.test_fused import TOLERANCE, projected_rows, rows_a_tile  # noqa: F401  # a fixture

EVERY_ANCHOR = pytest.mark.parametrize("anchor", ANCHORS, ids=anchor_id)
BACKENDS = [(torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "cpu")]
FLOAT32 = [(torch.float32, "torch"), (torch.float32, "cpu")]


# --- the definition ---------------------------------------------------------------------------------------------------


def test_the_definition_by_hand():
    """Two tokens and three: forward puts the base first, and a masked label leaves a distribution of the others."""
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).double(), torch.tensor([[0.1, 0.6, 0.3]]).double()
    label = torch.tensor([0])

    def divergence(**options):
        return anchor_divergence(p.log() + 3, q.log() - 1, label, Anchor(**options)).item()

    def kl(first, second):
        return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))

    rows = p[0].tolist(), q[0].tolist()
    others = [0.6, 0.4], [2 / 3, 1 / 3]
    assert divergence(direction="forward") == pytest.approx(kl(rows[1], rows[0]))
    assert divergence(direction="reverse") == pytest.approx(kl(rows[0], rows[1]))
    assert divergence(direction="forward", mask_target=True) == pytest.approx(kl(others[1], others[0]))
    assert divergence(direction="reverse", mask_target=True) == pytest.approx(kl(others[0], others[1]))


def test_the_loss_is_the_gated_loss_and_the_mean_divergence():
    hidden, weight, labels, _ = make_inputs(30, 90, dtype=torch.float64)
    base, anchor = make_base(30, 90, dtype=torch.float64), Anchor(kl=0.7, direction="reverse")
    logits, kept = hidden @ weight.T, labels != -100
    divergence = anchor_divergence(logits[kept], base_logits(base)[kept], labels[kept], anchor)
    expected = eaft_loss(logits, labels) + 0.7 * divergence.mean()
    assert torch.allclose(eaft_loss(logits, labels, anchor=anchor, base_logits=base_logits(base)), expected)


@EVERY_ANCHOR
def test_no_divergence_from_itself(anchor):
    hidden, weight, labels, _ = make_inputs(20, 90)
    base = BaseLogits(hidden, weight)
    loss, gradients, details = run_anchored(hidden, weight, labels, gate="eaft", anchor=anchor, base=base)
    plain, expected = run(hidden, weight, labels, gate="eaft")
    assert details.divergence.min() >= 0 and details.divergence.max() < 1e-6
    assert relative_error(loss, plain) < 2e-6
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(gradients[:2], expected[:2], strict=True))


# --- the operator -----------------------------------------------------------------------------------------------------


# V at the edges of the blocks of every backend
@EVERY_ANCHOR
@pytest.mark.parametrize("vocab", [2, 7, 64, 257, 1408, 5003])
@pytest.mark.parametrize("gate", ["eaft", "conflict-mask"])
@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_every_anchor_over_ragged_shapes(anchor, vocab, gate, dtype, backend):
    hidden, weight, labels, bias = make_inputs(37, vocab, dtype=dtype, bias=True)
    base = make_base(37, vocab, 16, dtype, bias=True)
    options = {"bias": bias, "backend": backend, "tile_bytes": rows_a_tile(6, weight)}
    assert_anchored(hidden, weight, labels, TOLERANCE[dtype], anchor, base, gate, **options)


@EVERY_ANCHOR
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(anchor, dtype, backend):
    hidden, weight, labels, bias = make_inputs(150, 1031, 64, dtype, bias=True, spread=1.0)
    base = make_base(150, 1031, 48, dtype, spread=1.0)
    assert_anchored(hidden, weight, labels, TOLERANCE[dtype], anchor, base, bias=bias, backend=backend)


@EVERY_ANCHOR
@pytest.mark.parametrize(("dtype", "backend"), FLOAT32)
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"logit_scale": 0.25}, {"logit_scale": 2.0, "softcap": 30.0}])
def test_softcap_and_scale(anchor, options, dtype, backend):
    hidden, weight, labels, bias = make_inputs(31, 300, 64, dtype, bias=True, spread=1.0)
    base = make_base(31, 300, 64, dtype, spread=1.0, **options)
    assert_anchored(hidden, weight, labels, 2e-6, anchor, base, bias=bias, backend=backend, **options)


# a base with another transform than the model's
@pytest.mark.parametrize(("dtype", "backend"), FLOAT32)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}])
@pytest.mark.parametrize("base_options", [{"logit_scale": 0.5}, {"softcap": 8.0}, {"logit_scale": 2.0, "softcap": 9.0}])
def test_a_base_with_its_own_transform(options, base_options, dtype, backend):
    hidden, weight, labels, _ = make_inputs(20, 300, 64, dtype, spread=1.0)
    base = make_base(20, 300, 64, dtype, spread=1.0, **base_options)
    for anchor in ANCHORS:
        assert_anchored(hidden, weight, labels, 2e-6, anchor, base, backend=backend, **options)


@EVERY_ANCHOR
def test_a_closed_row_still_has_the_anchor_s_gradient(anchor):
    hidden, weight, labels, bias = make_inputs(40, 120, bias=True)
    base = make_base(40, 120)

    def shut(stats):
        return torch.zeros_like(stats.nll)

    options = {"gate": gates.Custom(shut, row_local=True, topk=None), "anchor": anchor, "base": base}
    loss, gradients, details = run_anchored(hidden, weight, labels, bias=bias, **options)
    assert details.closed.all() and loss > 0
    expected, wanted = anchored_definition(hidden, weight, labels, shut, anchor, base, bias=bias)
    assert relative_error(loss, expected) < 2e-6
    assert all(relative_error(a, b) < 2e-6 for a, b in zip(gradients, wanted, strict=True))
    assert gradients[0][labels != -100].abs().sum(-1).min() > 0 and not gradients[0][labels == -100].any()


def test_a_gate_threshold_drops_the_cross_entropy_of_a_row_and_keeps_its_anchor():
    hidden, weight, labels, _ = make_inputs(80, 100)
    base, anchor = make_base(80, 100), Anchor(kl=0.4)

    def above(stats):
        weight = stats.probability
        return torch.where(weight < 0.05, 0, weight)

    options = {"anchor": anchor, "base": base}
    loss, gradients, details = run_anchored(hidden, weight, labels, gate="dft", gate_threshold=0.05, **options)
    assert 0 < details.closed.sum() < len(details.closed)
    assert relative_error(loss, anchored_definition(hidden, weight, labels, "dft", **options)[0]) < 2e-6
    _, expected = anchored_definition(hidden, weight, labels, above, **options)
    assert all(relative_error(a, b) < 2e-6 for a, b in zip(gradients[:2], expected[:2], strict=True))


# one row, a few, and all rows in a tile
@EVERY_ANCHOR
@pytest.mark.parametrize("rows", [1, 6, 60])
@pytest.mark.parametrize("gate", ["eaft", "mile"])
def test_recompute(anchor, gate, rows):
    hidden, weight, labels, bias = make_inputs(60, 1003, 32, bias=True)
    options = {"bias": bias, "recompute": True, "tile_bytes": rows_a_tile(rows, weight)}
    assert_anchored(hidden, weight, labels, 2e-6, anchor, make_base(60, 1003), gate, **options)


@pytest.mark.parametrize("num_items", [1, 17, torch.tensor(29)])
def test_num_items_divides_the_anchor_too(num_items):
    hidden, weight, labels, _ = make_inputs(20, 100)
    assert_anchored(hidden, weight, labels, 2e-6, Anchor(), make_base(20, 100), num_items=num_items)


@EVERY_ANCHOR
def test_ignored_rows_reach_no_gemm_and_no_gradient(projected_rows, anchor):  # noqa: F811
    hidden, weight, labels, _ = make_inputs(64, 100)
    base = make_base(64, 100)
    # of an ignored row, whose hidden states must not be read
    base.hidden[labels == -100] = float("nan")
    loss, gradients, details = run_anchored(hidden, weight, labels, anchor=anchor, base=base)
    trained = int((labels != -100).sum())
    assert sum(projected_rows) == 2 * trained and len(details.divergence) == trained
    assert loss.isfinite() and not gradients[0][labels == -100].any()


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("gate", ["eaft", "conflict-mask"])
def test_no_trained_row_gives_a_zero_with_a_graph(rows, gate):
    hidden, weight, labels, bias = make_inputs(rows, 100, bias=True, ignored=1.1)
    options = {"gate": gate, "anchor": Anchor(), "base": make_base(rows, 100)}
    loss, gradients, details = run_anchored(hidden, weight, labels, bias=bias, **options)
    assert loss == 0 and details.divergence.shape == (0,)
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@EVERY_ANCHOR
def test_a_frozen_head_shares_one_weight_with_the_base(anchor, monkeypatch):
    """As with adapters: other hidden states, the same head, which has no gradient."""
    hidden, weight, labels, _ = make_inputs(30, 100)
    monkeypatch.setattr(Gradients, "_add_weight", lambda *_: pytest.fail("dW was formed"))
    base = BaseLogits(hidden + 0.1 * torch.randn(30, 24, generator=torch.Generator().manual_seed(3)), weight)
    leaf = hidden.clone().requires_grad_()
    loss = fused_linear_eaft(leaf, weight, labels, anchor=anchor, base=base)
    loss.backward()
    expected, wanted = anchored_definition(hidden, weight, labels, "eaft", anchor, base)
    assert relative_error(loss, expected) < 2e-6 and relative_error(leaf.grad, wanted[0]) < 2e-6


def test_a_tied_head_gets_no_gradient_as_the_base_s():
    """The base is a constant, also where it shares the head that is trained."""
    hidden, weight, labels, _ = make_inputs(12, 90, 16)
    leaf = weight.clone().requires_grad_()
    base = BaseLogits(hidden.flip(0), leaf)
    fused_linear_eaft(leaf[torch.arange(12)], leaf, labels, anchor=Anchor(), base=base).backward()
    plain = weight.double().requires_grad_()
    logits, of_base = plain[torch.arange(12)] @ plain.T, hidden.flip(0).double() @ weight.double().T
    eaft_loss(logits, labels, anchor=Anchor(), base_logits=of_base).backward()
    assert relative_error(leaf.grad, plain.grad) < 2e-6


def test_a_wider_base_is_rounded_to_the_model_s_dtype():
    hidden, weight, labels, _ = make_inputs(40, 300, 64, torch.bfloat16, spread=1.0)
    wide = make_base(40, 300, 64, torch.float32, spread=1.0)
    rounded = BaseLogits(wide.hidden.bfloat16(), wide.weight.bfloat16())
    results = [run_anchored(hidden, weight, labels, anchor=Anchor(), base=base)[:2] for base in (wide, rounded)]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1][0], results[1][1][0])


def test_autocast():
    hidden, weight, labels, _ = make_inputs(60, 300, 64, spread=1.0)
    base, anchor = make_base(60, 300, 64, spread=1.0), Anchor(mask_target=True)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        loss, details = fused_linear_eaft(*leaves, labels, anchor=anchor, base=base, return_details=True)
    loss.backward()
    rounded = BaseLogits(base.hidden.bfloat16(), base.weight.bfloat16())
    expected, wanted = anchored_definition(hidden.bfloat16(), weight.bfloat16(), labels, "eaft", anchor, rounded)
    assert details.divergence.dtype == leaves[0].grad.dtype == leaves[1].grad.dtype == torch.float32
    assert relative_error(loss, expected) < 5e-3
    assert all(relative_error(leaf.grad, truth) < 5e-3 for leaf, truth in zip(leaves, wanted[:2], strict=True))


@pytest.mark.parametrize("anchor", [anchor for anchor in ANCHORS if anchor.mask_target], ids=anchor_id)
@pytest.mark.parametrize(("dtype", "backend"), FLOAT32)
def test_a_certain_label_keeps_its_masked_divergence(anchor, dtype, backend):
    """Where the label's probability is 1 in float32, the distribution of the others exists all the same."""
    weight = torch.eye(6, dtype=dtype)
    hidden = torch.tensor([[200.0, 1, 2, 3, 4, 5], [90.0, 5, 4, 3, 2, 1], [0.0, 1, 50, 3, 4, 5]], dtype=dtype)
    base = BaseLogits(
        torch.tensor([[150.0, 5, 1, 2, 2, 0], [0.0, 0, 0, 0, 3, 0], [7.0, 1, 0, 2, 3, 4]], dtype=dtype), weight
    )
    labels = torch.tensor([0, 0, 2])
    assert_anchored(hidden, weight, labels, 2e-6, anchor, base, "none", backend=backend)


@EVERY_ANCHOR
@pytest.mark.parametrize(("dtype", "backend"), FLOAT32)
def test_tokens_that_both_exclude(anchor, dtype, backend):
    """A vocabulary padded with -inf, as a bias, in model and base."""
    hidden, weight, labels, bias = make_inputs(20, 5000, bias=True)
    base = make_base(20, 5000, bias=True)
    labels = torch.where(labels == -100, labels, labels % 100)
    bias[100:4990] = base.bias[100:4990] = float("-inf")
    loss, gradients, _ = run_anchored(hidden, weight, labels, bias=bias, backend=backend, anchor=anchor, base=base)
    kept = torch.cat([torch.arange(100), torch.arange(4990, 5000)])
    small = BaseLogits(base.hidden, base.weight[kept], base.bias[kept])
    expected, wanted = anchored_definition(hidden, weight[kept], labels, "eaft", anchor, small, bias=bias[kept])
    assert relative_error(loss, expected) < 2e-6 and relative_error(gradients[0], wanted[0]) < 2e-6
    assert relative_error(gradients[1][kept], wanted[1]) < 2e-6 and not gradients[1][100:4990].any()


@pytest.mark.parametrize(("dtype", "backend"), FLOAT32)
def test_a_token_that_only_one_excludes(dtype, backend):
    """KL is infinite where the second distribution excludes what the first allows; forward, the gradient is still p - q."""
    hidden, weight, labels, bias = make_inputs(5, 300, bias=True, ignored=0.0)
    labels, base = labels.clamp_max(290), make_base(5, 300, bias=True)
    bias[295] = float("-inf")
    options = {"bias": bias, "backend": backend, "base": base, "gate": "none"}
    loss, gradients, details = run_anchored(hidden, weight, labels, anchor=Anchor(), **options)
    assert loss == torch.inf and (details.divergence == torch.inf).all() and gradients[2].isfinite().all()
    q = base_logits(base).softmax(-1)[:, 295].sum()
    assert relative_error(gradients[2][295] * 5, -0.1 * q) < 2e-6
    reverse = run_anchored(hidden, weight, labels, anchor=Anchor(direction="reverse"), **options)
    assert reverse[2].divergence.isfinite().all() and reverse[1][2].isfinite().all()


def test_a_nan_of_the_base_is_not_hidden():
    for backend in ("torch", "cpu"):
        for anchor in ANCHORS:
            hidden, weight, labels, _ = make_inputs(4, 300, ignored=0.0)
            base = make_base(4, 300)
            base.hidden[1] = float("nan")
            _, gradients, details = run_anchored(hidden, weight, labels, backend=backend, anchor=anchor, base=base)
            assert details.divergence.isnan().tolist() == [False, True, False, False]
            assert gradients[0].isnan().any(-1).tolist() == [False, True, False, False]


def test_inside_a_checkpoint_and_used_twice():
    hidden, weight, labels, _ = make_inputs(20, 100)
    base, leaf = make_base(20, 100), hidden.clone().requires_grad_()

    def loss(rows):
        part = BaseLogits(base.hidden[rows], base.weight)
        return fused_linear_eaft(leaf[rows], weight, labels[rows], num_items=20, anchor=Anchor(), base=part)

    first = torch.utils.checkpoint.checkpoint(loss, slice(0, 9), use_reentrant=False)
    (first + loss(slice(9, 20))).backward()
    expected = anchored_definition(hidden, weight, labels, "eaft", Anchor(), base, num_items=20)[1][0]
    assert relative_error(leaf.grad, expected) < 2e-6


def test_no_grad_gives_the_value():
    hidden, weight, labels, _ = make_inputs(30, 100)
    base = make_base(30, 100)
    with torch.no_grad():
        loss = fused_linear_eaft(hidden.requires_grad_(), weight, labels, anchor=Anchor(), base=base)
    assert relative_error(loss, anchored_definition(hidden, weight, labels, "eaft", Anchor(), base)[0]) < 2e-6


@EVERY_ANCHOR
def test_compiled(anchor):
    torch._dynamo.reset()
    hidden, weight, labels, bias = make_inputs(40, 300, bias=True)
    base = make_base(40, 300, bias=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden, weight, bias, of_base):
        loss, details = fused_linear_eaft(
            hidden, weight, labels, bias=bias, anchor=anchor, base=of_base, return_details=True
        )
        return loss, details.divergence

    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    loss, divergence = step(*leaves, base)
    loss.backward()
    expected, wanted = anchored_definition(hidden, weight, labels, "eaft", anchor, base, bias=bias)
    assert relative_error(loss, expected) < 2e-6 and not divergence[labels == -100].any()
    assert all(relative_error(leaf.grad, truth) < 2e-6 for leaf, truth in zip(leaves, wanted, strict=True))


def test_memory_is_one_more_tile(monkeypatch):
    """The buffers of a call: one of two tiles, whatever the number of rows."""
    hidden, weight, labels, _ = make_inputs(300, 500, ignored=0.0)
    asked = []

    def counted(rows, columns, like):
        asked.append(rows * columns)
        return tile_buffer(rows, columns, like)

    monkeypatch.setattr("eaftdrope.loss.compute.tile_buffer", counted)
    run(hidden, weight, labels, tile_bytes=rows_a_tile(30, weight))
    run_anchored(hidden, weight, labels, anchor=Anchor(), base=make_base(300, 500), tile_bytes=rows_a_tile(30, weight))
    release_buffers()
    assert asked == [30 * 500, 2 * 30 * 500]


# --- settings and refusals --------------------------------------------------------------------------------------------


def test_presets_are_a_gate_and_an_anchor():
    assert {name: (preset.gate, preset.anchor.formula) for name, preset in PRESETS.items()} == {
        "sft-kl": ("none", "0.5 KL(model || base)"),
        "asft": ("dft", "0.1 KL(base || model)"),
        "mask-target": ("none", "0.1 KL(base || model), without the label"),
    }
    assert all("arXiv" in preset.paper for preset in PRESETS.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": 0.0}, "kl=0.0 must be above 0"),
        ({"kl": float("nan")}, "kl=nan must be above 0"),
        ({"kl": True}, "kl=True is of the wrong type"),
        ({"direction": "foward"}, "unknown direction 'foward'. Did you mean 'forward'?"),
        ({"mask_traget": True}, "no option 'mask_traget'. Did you mean 'mask_target'? Its options: kl, direction"),
        ("asft", "expected an Anchor or its options"),
    ],
)
def test_an_anchor_from_its_options(options, message):
    assert resolve_anchor({"kl": 1, "direction": "reverse"}) == Anchor(1, "reverse")
    with pytest.raises(ValueError, match=r"^anchor: ") as error:
        resolve_anchor(options)
    assert message in str(error.value)


def test_refusals():
    hidden, weight, labels, _ = make_inputs(10, 50)
    base, anchor = make_base(10, 50), Anchor()

    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            fused_linear_eaft(hidden, weight, labels, **options)

    refused("needs the base model", anchor=anchor)
    refused("without an anchor, and nothing reads it", base=base)
    refused("those of an anchor have both", anchor=anchor, base=base, tail="sparse")
    refused("expected one hidden state per label", anchor=anchor, base=make_base(9, 50))
    refused("a vocabulary of 51 tokens, and the model has 50", anchor=anchor, base=make_base(10, 51))
    refused("does not project hidden states of size 24", anchor=anchor, base=BaseLogits(base.hidden, weight[:, :5]))
    refused(r"base: bias of shape \(3,\)", anchor=anchor, base=BaseLogits(base.hidden, base.weight, torch.zeros(3)))
    refused("base: on meta", anchor=anchor, base=BaseLogits(base.hidden.to("meta"), base.weight))
    with pytest.raises(ValueError, match="requires tail='exact'"):
        LossSettings(tail="sparse", anchor=anchor)
