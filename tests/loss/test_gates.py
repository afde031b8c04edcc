"""Every gate against its formula, golden values of other toolkits, and what gates refuse."""

import math

import pytest
import torch
from torch.nn import functional

from eaftdrope.loss import TokenStats, eaft_loss, fused_linear_eaft, gates, token_statistics
from tests.loss.reference import definition, make_inputs, relative_error


def stats_of(seed=0, rows=200, vocab=500, spread=3.0, k=20):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * spread
    return token_statistics(logits, torch.randint(0, vocab, (rows,), generator=generator), k=k), logits


def test_formulas():
    s, _ = stats_of()
    h = s.topk_entropy / math.log(20)
    p = s.probability
    expected = {
        gates.EAFT(): h,
        gates.EAFT(alpha=2.0): h**2,
        gates.EAFT(divisor=3.0): s.topk_entropy / 3.0,
        gates.EAFTVocab(alpha=0.5): (s.entropy / math.log(500)) ** 0.5,
        gates.EAFTExact(): (s.entropy / math.log(20)).clamp(max=1),
        gates.EAFTSigmoid(): 1 / (1 + torch.exp(-30 * (h - 0.17))),
        gates.EAFTMask(): (h > h.quantile(0.15)).double(),
        gates.DFT(): p,
        gates.Focal(gamma=2.0): (1 - p) ** 2,
        gates.TALR(): (p ** (1 / s.nll.mean())).clamp(min=0.01),
        gates.MiLe(gamma=1.0): (1 + s.entropy) / (1 + s.entropy).mean(),
        gates.ProFit(threshold=0.1): (p > 0.1).double(),
        gates.ProFit(threshold=0.1, keep="lower"): (p <= 0.1).double(),
        gates.Constant(weight=0.3): torch.full_like(p, 0.3),
        gates.NoGate(): torch.ones_like(p),
    }
    for gate, weight in expected.items():
        assert torch.allclose(gate(s), weight, rtol=1e-12), gate.formula


def test_conflict_mask_closes_exactly_the_low_corner():
    nll = torch.arange(20.0)
    entropy = torch.tensor([float(i % 10) for i in range(20)])
    stats = TokenStats(nll, entropy, None, torch.zeros(20, dtype=torch.bool), 100)
    weight = gates.ConflictMask(quantile=0.15)(stats)
    # entropy <= its 15 % quantile: rows 0, 1, 10, 11 (quantile 1.0); nll >= its 85 % quantile (16.15): rows 17-19
    assert weight.tolist() == [1.0] * 20
    entropy[18] = 0.0
    weight = gates.ConflictMask(quantile=0.15)(TokenStats(nll, entropy, None, stats.correct, 100))
    assert weight.tolist() == [0.0 if row == 18 else 1.0 for row in range(20)]


def test_talr_uses_the_median_of_the_sequences():
    nll = torch.tensor([1.0, 1.0, 4.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    sequence = torch.tensor([7, 7, 7, 3, 3, 9])  # means 2, 2, 2
    stats = TokenStats(nll, nll, None, nll > 0, 10, sequence)
    assert torch.allclose(gates.TALR()(stats), torch.exp(-nll / 2))


def test_sequence_ids_reach_the_gate_through_the_operator():
    hidden, weight, labels, _ = make_inputs(30, 60, ignored=0.2)
    ids = torch.arange(30) // 7
    loss = fused_linear_eaft(hidden, weight, labels, gate="talr", sequence_ids=ids)
    expected, _ = definition(hidden, weight, labels, "talr", sequence_ids=ids)
    without, _ = definition(hidden, weight, labels, "talr")
    assert relative_error(loss, expected) < 2e-6
    assert relative_error(loss, without) > 1e-4


def llama_factory_loss(logits, labels, num_items, alpha):
    """Restated from the formula: top-20 logits in float32, renormalised entropy / 3.0, to the power alpha; sum over
    trained tokens / num_items."""
    logits = logits.float()
    keep = labels != -100
    nll = functional.cross_entropy(logits[keep], labels[keep], reduction="none")
    top = logits[keep].topk(20).values
    log_p = top - top.logsumexp(-1, keepdim=True)
    weight = (-(log_p.exp() * log_p).sum(-1) / 3.0) ** alpha
    return (nll * weight.detach()).sum() / num_items


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_items", [17, 40])
def test_divisor_three_is_llama_factory(alpha, num_items):
    hidden, weight, labels, _ = make_inputs(60, 400)
    leaf = hidden.clone().requires_grad_()
    golden = llama_factory_loss(leaf @ weight.T, labels, num_items, alpha)
    golden.backward()
    ours = hidden.clone().requires_grad_()
    loss = fused_linear_eaft(ours, weight, labels, gate=gates.EAFT(alpha=alpha, divisor=3.0), num_items=num_items)
    loss.backward()
    assert relative_error(loss, golden) < 1e-6
    assert relative_error(ours.grad, leaf.grad) < 2e-6
    assert (
        relative_error(
            eaft_loss(hidden @ weight.T, labels, gates.EAFT(alpha=alpha, divisor=3.0), num_items=num_items), golden
        )
        < 1e-6
    )


def test_golden_value_of_the_llama_factory_formula():
    """A row worked out by hand: 20 equal logits and a far one; entropy ln 20, weight ln 20 / 3, nll of the label ln 20."""
    logits = torch.full((1, 21), -100.0)
    logits[0, :20] = 1.0
    loss = eaft_loss(logits, torch.tensor([4]), gates.EAFT(divisor=3.0))
    assert loss.item() == pytest.approx(math.log(20) ** 2 / 3.0, rel=1e-6)


def test_divisor_one_is_axolotl_up_to_its_epsilon():
    s, logits = stats_of()
    p = logits.topk(20).values.softmax(-1)
    assert torch.allclose(gates.EAFT(divisor=1.0)(s), -(p * (p + 1e-10).log()).sum(-1), atol=1e-7)


def test_none_is_cross_entropy_and_alpha_zero_is_none():
    hidden, weight, labels, _ = make_inputs(40, 300)
    plain = functional.cross_entropy(hidden.double() @ weight.double().T, labels)
    none = fused_linear_eaft(hidden, weight, labels, gate="none")
    assert relative_error(none, plain) < 1e-6
    assert torch.equal(fused_linear_eaft(hidden, weight, labels, gate=gates.EAFT(alpha=0.0)), none)


def test_the_gate_is_detached():
    """With a constant of the gate's values the gradient is the same: nothing flows through the weight."""
    hidden, weight, labels, _ = make_inputs(25, 80, dtype=torch.float64)
    _, details = fused_linear_eaft(hidden, weight, labels, return_details=True)
    fixed = details.weight.clone()
    leaf = hidden.clone().requires_grad_()
    fused_linear_eaft(leaf, weight, labels, gate=lambda stats: fixed).backward()
    assert relative_error(leaf.grad, definition(hidden, weight, labels, "eaft")[1][0]) < 1e-12


@pytest.mark.parametrize("gate", list(gates.GATES))
def test_weights_stay_in_their_range_even_for_extreme_rows(gate):
    nll = torch.tensor([0.0, 1e-30, 1e-6, 1.0, 90.0, 1e4])
    entropy = torch.tensor([0.0, 1e-7, 1e-3, 0.5, 3.0, 11.9])
    stats = TokenStats(nll, entropy, entropy.clamp(max=math.log(20)), nll == 0, 151_936)
    weight = gates.resolve_gate(gate)(stats)
    assert torch.isfinite(weight).all() and (weight >= 0).all()
    if gate != "mile":
        assert (weight <= 1 + 1e-6).all()


def test_fractional_alpha_of_zero_entropy_is_zero_not_nan():
    hidden = torch.tensor([[200.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    leaf = hidden.requires_grad_()
    loss = fused_linear_eaft(leaf, weight, torch.tensor([1]), gate=gates.EAFT(alpha=0.3))
    loss.backward()
    assert loss == 0 and not leaf.grad.any()


REFUSED = [
    (lambda: gates.EAFT(alpha=-1), "alpha=-1: must be >= 0"),
    (lambda: gates.EAFT(k=1), "k=1: the top-K entropy needs at least two"),
    (lambda: gates.EAFT(divisor=0), "divisor=0: must be > 0"),
    (lambda: gates.EAFTMask(quantile=1.5), "quantile=1.5: must be between 0 and 1"),
    (lambda: gates.ConflictMask(quantile=-0.1), "must be between 0 and 1"),
    (lambda: gates.ProFit(keep="both"), "keep='both'"),
    (lambda: gates.Constant(weight=-1), "weight=-1"),
    (lambda: gates.Focal(gamma=-1), "gamma=-1"),
    (
        lambda: gates.resolve_gate("eaft", alhpa=1),
        "no option 'alhpa'. Did you mean 'alpha'? Its options: alpha, k, divisor",
    ),
    (lambda: gates.resolve_gate("dft", alpha=1), "Its options: none"),
    (lambda: gates.resolve_gate("conflict_mask"), "Did you mean 'conflict-mask'?"),
    (lambda: gates.resolve_gate(gates.DFT(), alpha=1), "belong to a gate given by name"),
    (lambda: gates.resolve_gate(3), "got int"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_refusals(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
