"""The benchmark of the anchor: every method computes what it claims, and the results have their keys."""

import pytest
import torch

from benchmarks.loss.anchored import GATED, KL, METHODS, gradients, largest_error, make_base, measure
from benchmarks.loss.cases import Case
from benchmarks.loss.inputs import make_inputs
from eaftdrope.loss import Anchor, anchor_divergence

TRAINED, FROZEN = (Case("tiny", "tiny", 64, 16, 1024, "float32", "random", trains) for trains in ("all", "frozen-head"))


@pytest.mark.parametrize("case", [TRAINED, FROZEN], ids=["trained", "frozen"])
def test_every_anchored_method_equals_the_definition(case):
    inputs, frozen = make_inputs(case), case is FROZEN
    base = make_base(case, *inputs[:2], frozen)
    for name, (loss, anchor) in METHODS.items():
        if anchor:
            found = gradients(loss, *inputs, base, frozen)
            assert largest_error(found, inputs, base, anchor, frozen) < 2e-5, name


def test_trl_s_divergence_is_the_same_divergence():
    hidden, weight, labels = make_inputs(TRAINED)
    base = make_base(TRAINED, hidden, weight, False)
    loss, _ = METHODS["TRL's chunked divergence, no cross-entropy"]
    value = loss(hidden, weight, labels, base)
    logits, of_base = (h.double() @ w.double().T for h, w in ((hidden, weight), (base.hidden, base.weight)))
    assert torch.allclose(value.double(), KL * anchor_divergence(logits, of_base, labels, Anchor()).mean(), rtol=1e-4)


def test_results():
    rows = measure(FROZEN, [GATED, "anchored, forward"], 2)
    assert [row["method"] for row in rows] == [GATED, "anchored, forward"]
    assert rows[0]["ratio"] == 1.0 and rows[0]["largest_error"] is None and rows[1]["largest_error"] < 2e-5
    assert all(row["cpu_seconds"] > 0 and row["rounds"] == 2 for row in rows)
