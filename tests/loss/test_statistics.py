"""Entropy, top-K entropy and nll over their whole range, and rows that are not ordinary."""

import math

import pytest
import torch

from eaftdrope.loss import token_statistics
from eaftdrope.loss.backends.tile import LogitsTransform
from eaftdrope.loss.backends.torch import tile_gradient_, tile_statistics

PLAIN = LogitsTransform()


def peaked_row(vocab: int, gap: float) -> torch.Tensor:
    """A winner `gap` above noise: entropy from ln V (no gap) down to 1e-7 and less."""
    generator = torch.Generator().manual_seed(vocab)
    row = torch.randn(vocab, generator=generator, dtype=torch.float64)
    row[vocab // 2] = row.max() + gap
    return row


# ln V, then down through H = 1e-6 and beyond
@pytest.mark.parametrize("gap", [0.0, 2.0, 8.0, 12.0, 18.0, 24.0, 30.0, 34.0])
@pytest.mark.parametrize("vocab", [31, 4096, 151_936])
def test_entropy_keeps_its_digits_in_float32(vocab, gap):
    logits = peaked_row(vocab, gap)[None].float()
    label = torch.tensor([vocab // 3])
    actual = tile_statistics(logits, label, PLAIN, 20)
    exact = token_statistics(logits.double(), label, k=20)
    # float64 itself loses the last digits of an entropy near zero: compare with shifted sums in float64
    shifted = (logits - logits.max()).double()[0]
    others = shifted[torch.arange(vocab) != shifted.argmax()]
    rest = others.exp().sum()
    entropy = torch.log1p(rest) + (-others * others.exp()).sum() / (1 + rest)
    assert actual.entropy.item() == pytest.approx(entropy.item(), rel=1e-5)
    assert actual.entropy.item() >= 0
    assert actual.nll.item() == pytest.approx(exact.nll.item(), rel=1e-5)
    assert actual.topk_entropy.item() == pytest.approx(exact.topk_entropy.item(), rel=1e-5, abs=1e-12)


def test_the_range_the_entropy_test_covers():
    entropies = [
        tile_statistics(peaked_row(151_936, gap)[None].float(), torch.tensor([0]), PLAIN, None).entropy.item()
        for gap in (0.0, 34.0)
    ]
    assert entropies[0] > 11 and entropies[1] < 1e-6
    flat = tile_statistics(torch.zeros(1, 151_936), torch.tensor([0]), PLAIN, None)
    assert flat.entropy.item() == pytest.approx(math.log(151_936), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_topk_equals_a_plain_topk(dtype):
    # bfloat16 makes many ties, within blocks and across their borders
    logits = (torch.randn(50, 3000, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    labels = torch.arange(50)
    actual = tile_statistics(logits, labels, PLAIN, 20).topk_entropy
    top = logits.double().topk(20).values.log_softmax(-1)
    assert torch.allclose(actual.double(), -(top.exp() * top).sum(-1), rtol=1e-5)


def test_ties_of_the_maximum():
    logits = torch.full((1, 200), -30.0)
    logits[0, [3, 70, 71, 199]] = 5.0
    stats = tile_statistics(logits, torch.tensor([199]), PLAIN, 20)
    assert stats.entropy.item() == pytest.approx(math.log(4), rel=1e-6)
    assert stats.nll.item() == pytest.approx(math.log(4), rel=1e-6)
    assert stats.correct.item()


def test_masked_vocabulary():
    """-inf logits (masked or padded tokens) have no probability and no part in any entropy, top-K included."""
    logits = torch.randn(6, 130, generator=torch.Generator().manual_seed(1))
    logits[:, 5:125] = float("-inf")
    labels = torch.tensor([0, 1, 2, 3, 4, 129])
    kept = torch.cat([logits[:, :5], logits[:, 125:]], 1)
    expected = token_statistics(kept.double(), torch.tensor([0, 1, 2, 3, 4, 9]), k=20)
    actual = tile_statistics(logits, labels, PLAIN, 20)
    for name in ("nll", "entropy", "topk_entropy"):
        assert torch.allclose(getattr(actual, name).double(), getattr(expected, name), rtol=1e-5), name
    # the definition says the same of the row with its -inf logits
    defined = token_statistics(logits, labels, k=20)
    assert torch.allclose(actual.entropy, defined.entropy, rtol=1e-5)
    assert torch.allclose(actual.topk_entropy, defined.topk_entropy, rtol=1e-5)
    tile_gradient_(logits, labels, actual, torch.ones(6), PLAIN)
    assert torch.isfinite(logits).all() and not logits[:, 5:125].any()


def test_an_impossible_label_costs_infinity_unless_its_gate_is_closed():
    from eaftdrope.loss import eaft_loss, fused_linear_eaft

    # hidden (1, 1) gives logits (2, -inf, 0): weight rows carry the -inf
    weight = torch.tensor([[1.0, 1.0], [float("-inf"), 0.0], [0.0, 0.0]])
    hidden, label = torch.ones(1, 2), torch.tensor([1])

    def closed(stats):
        return torch.zeros_like(stats.nll)

    assert fused_linear_eaft(hidden, weight, label, gate="none") == float("inf")
    assert fused_linear_eaft(hidden, weight, label, gate=closed) == 0
    assert eaft_loss(torch.tensor([[2.0, float("-inf"), 0.0]]), label, closed) == 0


def test_a_certain_label_has_a_gradient_of_full_precision():
    """p close to 1: p - 1 must not be rounded to 0 nor to the spacing of floats around 1."""
    logits = torch.tensor([[20.0, 0.0, -1.0]])
    expected = torch.tensor([[20.0, 0.0, -1.0]], dtype=torch.float64).softmax(-1)
    expected[0, 0] -= 1
    stats = tile_statistics(logits, torch.tensor([0]), PLAIN, None)
    tile_gradient_(logits, torch.tensor([0]), stats, torch.ones(1), PLAIN)
    assert torch.allclose(logits.double(), expected, rtol=1e-6, atol=0)


def test_v_smaller_than_k():
    logits = torch.randn(5, 7)
    stats = tile_statistics(logits, torch.arange(5), PLAIN, 20)
    assert torch.allclose(stats.topk_entropy, stats.entropy, rtol=1e-6)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[3e4, 2.9e4, -3e4]])
    stats = tile_statistics(logits, torch.tensor([1]), PLAIN, 3)
    assert stats.nll.item() == pytest.approx(1e3) and stats.entropy.item() == 0
