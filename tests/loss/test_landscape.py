"""The landscape against counting by hand, on tokens that lie inside their bins and on those at the edges."""

import json
import math

import pytest
import torch

from eaftdrope.loss import TokenStats, fused_linear_eaft, token_statistics
from eaftdrope.loss.landscape import Landscape


def stats_of(entropy, probability, dtype=torch.float64):
    probability = torch.tensor(probability, dtype=dtype)
    return TokenStats(
        nll=-probability.log(),
        entropy=torch.tensor(entropy, dtype=dtype),
        topk_entropy=None,
        correct=probability > 0.5,
        vocab_size=100,
    )


def distance_to_a_border(stats):
    """In bins, of the token that is nearest to a border between two of them."""
    probability = stats.probability * 40
    inner = torch.cat([stats.entropy * 10, probability[(probability > 0.5) & (probability < 39.5)]])
    return (inner - inner.round()).abs()[inner > 0.5].min()


def counted(landscape):
    """{(entropy bin, probability bin): tokens}"""
    return {tuple(place): int(landscape.density[tuple(place)]) for place in landscape.density.nonzero().tolist()}


def test_bins_and_groups_by_hand():
    stats = stats_of([0.05, 0.05, 0.3, 2.0, 2.55, 7.95, 9.0], [0.99, 1.0, 0.01, 0.26, 0.26, 0.001, 0.001])
    weight = torch.tensor([0.0, 0.04, 0.1, 0.5, 0.5, 1.0, 1.7], dtype=torch.float64)
    landscape = Landscape.of(stats, weight)
    assert counted(landscape) == {(0, 39): 2, (3, 0): 1, (20, 10): 1, (25, 10): 1, (79, 0): 2}
    gates = {k: count for k, count in enumerate(landscape.gate.tolist()) if count}
    assert gates == {0: 2, 2: 1, 10: 2, 19: 2}
    told = landscape.to_dict()
    assert (told["tokens"], told["conflicts"]) == (7, 1)
    assert (told["entropy_width"], told["probability_width"]) == (0.1, 0.025)
    high, low = told["groups"]["high"], told["groups"]["low"]
    nll = stats.nll.tolist()
    assert high == {
        "tokens": 4.0,
        "nll": pytest.approx(sum(nll[3:])),
        "weighted": pytest.approx(sum(w * n for w, n in zip(weight.tolist()[3:], nll[3:]))),
    }
    assert low == {
        "tokens": 3.0,
        "nll": pytest.approx(sum(nll[:3])),
        "weighted": pytest.approx(0.1 * nll[2]),
    }


def test_log_values():
    landscape = Landscape.of(stats_of([0.1, 2.5, 3.0, 1.0], [0.9, 0.5, 0.25, 0.5]), torch.tensor([0.0, 0.5, 1.0, 0.55]))
    values = landscape.log_values()
    assert values["high_entropy_loss"] == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert values["low_entropy_loss"] == pytest.approx(-math.log(0.9))
    assert (values["high_entropy_share"], values["low_entropy_share"]) == (0.5, 0.25)
    assert [values[f"gate_hist_{k:02d}"] for k in range(10)] == [0.25, 0, 0, 0, 0, 0.5, 0, 0, 0, 0.25]
    alone = Landscape.of(stats_of([1.0], [0.5]), torch.ones(1)).log_values()
    assert "high_entropy_loss" not in alone and "low_entropy_loss" not in alone
    assert (alone["high_entropy_share"], alone["low_entropy_share"]) == (0, 0)


def test_a_token_that_is_not_trained_or_not_a_number_has_no_place():
    stats = stats_of([0.05, 2.5, math.nan, 0.05], [0.9, 0.9, 0.9, math.nan])
    trained = torch.tensor([True, False, True, True])
    landscape = Landscape.of(stats, torch.ones(4), trained)
    assert counted(landscape) == {(0, 36): 1}
    assert landscape.gate.tolist() == [0] * 19 + [1]
    nll = pytest.approx(-math.log(0.9))
    assert landscape.to_dict()["groups"] == {
        "high": {"tokens": 0.0, "nll": 0.0, "weighted": 0.0},
        "low": {"tokens": 1.0, "nll": nll, "weighted": nll},
    }


def test_an_impossible_label_is_null_in_json_and_nothing_where_its_gate_is_closed():
    stats = stats_of([0.05], [0.0])
    told = Landscape.of(stats, torch.zeros(1)).to_dict()
    assert told["groups"]["low"] == {"tokens": 1.0, "nll": None, "weighted": 0.0}
    json.dumps(told, allow_nan=False)
    assert told["conflicts"] == 1


def test_landscapes_add_up():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(50, 30, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 30, (50,), generator=generator)
    weight = torch.rand(50, generator=generator, dtype=torch.float64)
    stats = token_statistics(logits, labels)
    whole = Landscape.of(stats, weight)
    parts = [
        Landscape.of(token_statistics(logits[part], labels[part]), weight[part])
        for part in (slice(0, 7), slice(7, 7), slice(7, 50))
    ]
    added = parts[0] + parts[1] + parts[2]
    assert torch.equal(added.density, whole.density) and torch.equal(added.gate, whole.gate)
    assert torch.allclose(added.groups, whole.groups, rtol=1e-12)
    doubled = whole.reduced(lambda values: 2 * values)
    assert doubled.to_dict()["tokens"] == 100 and doubled.density.dtype == torch.int64


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("gate", ["eaft", "eaft-vocab", "conflict-mask", "dft", "none", "mile", "talr"])
def test_every_backend_and_gate_sees_the_landscape_of_the_full_logits(backend, gate):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(300, 16, generator=generator)
    head = 1.2 * torch.randn(70, 16, generator=generator)
    labels = torch.randint(0, 70, (300,), generator=generator)
    labels[::5] = -100
    _, details = fused_linear_eaft(
        hidden, head, labels, gate=gate, backend=backend, tile_bytes=70 * 4 * 64, return_details=True
    )
    actual = Landscape.of(details.stats, details.weight)
    trained = labels != -100
    stats = token_statistics((hidden.double() @ head.double().t())[trained], labels[trained])
    assert distance_to_a_border(stats) > 1e-5, "too near for float32"
    expected = Landscape.of(stats, details.weight.double())
    assert torch.equal(actual.density, expected.density)
    assert actual.density.sum() == trained.sum() and actual.gate.sum() == trained.sum()
    assert (actual.groups - expected.groups).abs().max() / expected.groups.abs().max() < 1e-5
