"""Loss by position against direct definitions, and paired errors against a computation by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from eaftdrope.evaluate.ttt.arms import ARMS, arm_config, as_reader, passage_losses
from eaftdrope.evaluate.ttt.positions import PositionLosses, bin_sums, position_edges
from eaftdrope.ttt import TTTConfig, apply_ttt, is_ttt

CONFIG = TTTConfig(window=12, sink=2, chunk=8, fast_blocks=1, lr=0.5)
IDS = [(7 * i * i + 3 * i) % 250 + 4 for i in range(41)]


def direct(model, mask=None):
    """Cross-entropy of every prediction from one stock forward, under an explicit mask."""
    row = torch.tensor([IDS])
    with torch.no_grad():
        logits = model(row, attention_mask=mask).logits[0, :-1].double()
    return F.cross_entropy(logits, row[0, 1:], reduction="none")


def window_mask(window, sink):
    i = torch.arange(len(IDS))
    return ((i[None] <= i[:, None]) & ((i[None] > i[:, None] - window) | (i[None] < sink)))[None, None]


def test_edges_double_from_128_and_include_the_window():
    assert position_edges(2048, 256) == [0, 128, 256, 512, 1024, 2048]
    assert position_edges(3000, 1000) == [0, 128, 256, 512, 1000, 1024, 2048, 3000]
    assert position_edges(41, 12) == [0, 12, 41]


def test_sums_of_bins():
    nll = torch.arange(40, dtype=torch.float64)
    assert bin_sums(nll, [0, 12, 41]) == ((66.0, 12), (sum(range(12, 40)), 28))


@pytest.mark.parametrize(
    ("arm", "mask"), [("full", None), ("window", window_mask(12, 0)), ("sink", window_mask(12, 2))]
)
def test_losses_equal_a_direct_forward(tiny_llama, arm, mask):
    expected = direct(tiny_llama, mask)
    with as_reader(tiny_llama, ARMS[arm], CONFIG) as reader:
        found = passage_losses(reader, IDS)
    assert found.dtype == torch.float64 and len(found) == len(IDS) - 1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    # the arms are different measurements
    assert arm == "full" or (found - direct(tiny_llama)).abs()[12:].max() > 0.01
    assert not is_ttt(tiny_llama)


def test_naive_ttt_learns_after_the_first_chunk_and_leaves_the_model_as_it_was(tiny_llama):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    with as_reader(tiny_llama, ARMS["sink"], CONFIG) as reader:
        still = passage_losses(reader, IDS)
    with as_reader(tiny_llama, ARMS["naive"], CONFIG, 0.5) as reader:
        assert reader.ttt.config == CONFIG
        learning = passage_losses(reader, IDS)
        assert torch.equal(passage_losses(reader, IDS), learning), "a passage begins with fresh weights"
    torch.testing.assert_close(learning[:8], still[:8], rtol=0, atol=2e-5)
    assert (learning - still)[8:].abs().max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


def test_own_ttt_and_off(tiny_llama):
    model = apply_ttt(tiny_llama, CONFIG)
    with torch.no_grad():
        model.ttt.primes[0].down.normal_(0, 0.1)
    with as_reader(model, ARMS["ttt"], CONFIG) as reader:
        on = passage_losses(reader, IDS)
    with as_reader(model, ARMS["off"], CONFIG) as reader:
        off = passage_losses(reader, IDS)
    assert model.ttt.config == CONFIG
    torch.testing.assert_close(on[:8], off[:8], rtol=0, atol=2e-5)
    assert (on - off)[8:].abs().max() > 1e-3


def test_no_learning_is_a_rate_of_zero_and_the_window_has_no_sink():
    assert arm_config(ARMS["window"], CONFIG, None).sink == 0
    assert arm_config(ARMS["sink"], TTTConfig(window=12, sink=0, chunk=8), None).sink == 4
    assert arm_config(ARMS["control"], CONFIG, None) == TTTConfig(window=12, sink=2, chunk=8, fast_blocks=1, lr=0.0)
    assert arm_config(ARMS["control-naive"], CONFIG, 0.1).lr == 0.1


def test_means_and_paired_errors_by_hand():
    first = PositionLosses((0, 2, 4), (((2.0, 2), (6.0, 2)), ((4.0, 2), (9.0, 2)), ((3.0, 2), (6.0, 2))))
    second = PositionLosses((0, 2, 4), (((2.0, 2), (5.0, 2)), ((4.0, 2), (7.0, 2)), ((3.0, 2), (6.0, 2))))
    assert [score.value for score in first.by_bin()] == [1.5, 3.5]
    assert first.mean().value == 30 / 12
    # per token and passage beyond position 2: 3, 4.5, 3 against 2.5, 3.5, 3
    found = first.minus(second, 2)
    differences = [0.5, 1.0, 0.0]
    mean = sum(differences) / 3
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    assert found.value == pytest.approx(mean) and found.stderr == pytest.approx(deviation / math.sqrt(3))
    # unpaired, the passages' own spread would hide it
    spread = math.hypot(first.mean(2).stderr, second.mean(2).stderr)
    assert spread > 1.3 * found.stderr
    # an arm that is not finished is compared over the passages that both have
    assert first.minus(PositionLosses((0, 2, 4), second.sums[:2]), 2).value == pytest.approx(0.75)
    assert first.minus(PositionLosses((0, 2, 4), second.sums[:1]), 2).stderr is None
