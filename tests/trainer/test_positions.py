"""The loss by position in the row, against a plain loop."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from eaftdrope import apply_eaft
from eaftdrope.trainer.meter import log_names
from eaftdrope.trainer.patch import log_positions, pop_meter
from tests.trainer.tiny import VOCAB, tiny_model

EDGES = (0, 4, 8, 16, 32)


def batch(seed, rows, length, masked):
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :masked] = -100
    # a row of another length, padded on the right
    labels[0, -3:] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("training", [True, False])
def test_the_mean_of_each_bin_over_several_batches(training):
    """A position is that of the token that predicts; bins without a trained token are left out."""
    model = apply_eaft(tiny_model().train(training), gate="none")
    log_positions(model, EDGES)
    sums, counts = [0.0] * 4, [0] * 4
    for seed, rows, length in ((0, 3, 14), (1, 2, 11)):
        inputs = batch(seed, rows, length, masked=5)
        with torch.no_grad():
            model(**inputs)
            logits = model(inputs["input_ids"]).logits
        for row in range(rows):
            for position in range(length - 1):
                label = inputs["labels"][row, position + 1]
                if label != -100:
                    bin_ = next(i for i in range(4) if position < EDGES[i + 1])
                    sums[bin_] += cross_entropy(logits[row, position], label).item()
                    counts[bin_] += 1
    # the first trained label is predicted at position 4
    assert counts[0] == counts[3] == 0 and min(counts[1:3]) > 0
    metrics = pop_meter(model, training=training)
    found = {name: value for name, value in log_names(metrics).items() if name.startswith("position/")}
    assert list(found) == ["position/nll_4_8", "position/nll_8_16"]
    assert list(found.values()) == pytest.approx([sums[1] / counts[1], sums[2] / counts[2]], rel=1e-5)
    assert metrics["nll"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    # reset
    model(**batch(2, 1, 12, masked=9))
    assert [name for name in pop_meter(model, training=training) if name.startswith("nll_")] == []


def test_sums_of_several_processes_are_added():
    model = apply_eaft(tiny_model().train(), gate="none")
    log_positions(model, EDGES)
    model(**batch(0, 3, 14, masked=0))
    twice = {name: value for name, value in pop_meter(model, training=True, reduce=lambda sums: 2 * sums).items()}
    model(**batch(0, 3, 14, masked=0))
    once = pop_meter(model, training=True)
    assert {name: twice[name] for name in once if name.startswith("nll_")} == {
        name: value for name, value in once.items() if name.startswith("nll_")
    }
    assert twice["tokens"] == 2 * once["tokens"]


def test_without_edges_it_is_not_kept():
    model = apply_eaft(tiny_model().train(), gate="none")
    model(**batch(0, 3, 14, masked=0))
    assert not [name for name in pop_meter(model, training=True) if name.startswith("nll_")]
