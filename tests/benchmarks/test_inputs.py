"""The inputs of a case, and the float64 gradients that every method is compared with."""

import pytest
import torch

from benchmarks.loss import inputs
from benchmarks.loss.cases import Case, Shape, make_cases
from eaftdrope.errors import UserError
from tests.benchmarks.test_methods import formula

CASE = Case("tiny", "tiny", 64, 16, 300, "float32")


def with_trains(trains):
    return Case(CASE.shape, CASE.title, 64, 16, 300, "float32", trains=trains)


def test_the_same_case_has_the_same_inputs():
    first, second = inputs.make_inputs(CASE), inputs.make_inputs(CASE)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    hidden, weight, labels = first
    assert (hidden.shape, weight.shape, labels.shape) == ((64, 16), (300, 16), (64,))


def test_random_rows_are_half_diffuse_and_half_sure():
    hidden, weight, labels = inputs.make_inputs(Case("s", "s", 64, 576, 3000, "float32"))
    log_p = (hidden @ weight.T).double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    nll = -log_p[torch.arange(64), labels]
    assert (entropy[::2] > 5).all()
    assert (entropy[1::2] < 1e-3).all()
    # of the sure ones, every second is sure of another token
    assert (nll[1::4] < 1e-3).all() and (nll[3::4] > 10).all()


def test_half_of_the_labels_are_ignored_in_spans():
    labels = inputs.make_inputs(with_trains("half-ignored"))[2]
    assert (labels[:32] == -100).all() and (labels[32:] >= 0).all()


def test_the_frozen_head_shares_its_inputs():
    assert with_trains("frozen-head").inputs == CASE.inputs != with_trains("half-ignored").inputs


@pytest.mark.parametrize("trains", ["all", "half-ignored"])
@pytest.mark.parametrize("gate", inputs.GATES)
def test_the_reference_is_the_formula(gate, trains, monkeypatch):
    monkeypatch.setattr(inputs, "REFERENCE_ROWS", 10)
    monkeypatch.setattr(inputs, "REFERENCE_ENTRIES", 40)
    # blocks of 7 rows: rows that are checked lie in several, and in some none
    monkeypatch.setattr(inputs, "_BLOCK_BYTES", 7 * 8 * 300)
    hidden, weight, labels = inputs.make_inputs(with_trains(trains))
    truth = inputs.reference(hidden, weight, labels)
    loss, by_hidden, by_weight = formula(hidden, weight, labels, gate)
    found = truth["gates"][gate]
    assert len(truth["rows"]) == 10 and 20 <= len(truth["entries"]) <= 40
    assert found["loss"] == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(found["hidden"], by_hidden[truth["rows"]], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(found["weight"], by_weight[truth["entries"]], rtol=1e-9, atol=1e-15)

    exact = inputs.errors(loss, by_hidden, by_weight, truth, gate)
    assert all(error < 1e-9 for error in exact.values())
    off = inputs.errors(loss * 1.01, by_hidden * 1.02, by_weight * 1.03, truth, gate)
    assert [round(error, 6) for error in off.values()] == [0.01, 0.02, 0.03]
    assert inputs.errors(loss, by_hidden, None, truth, gate)["weight_error"] is None


def test_labels_are_among_the_entries_that_are_checked():
    hidden, weight, labels = inputs.make_inputs(CASE)
    assert torch.isin(labels, inputs.reference(hidden, weight, labels)["entries"]).all()


def test_a_text_that_is_too_short(tmp_path, word_tokenizer):
    text = tmp_path / "short.txt"
    text.write_text("w4 w5 w6")
    assert inputs._tokens(word_tokenizer, text, 3).tolist() == [4, 5, 6]
    with pytest.raises(UserError, match=r"short.txt has 3 tokens, fewer than 4. Use another --text"):
        inputs._tokens(word_tokenizer, text, 4)


def test_only_the_first_shape_is_measured_in_all_ways():
    shapes = [Shape("a", "A", 8, 100, 16), Shape("smollm2", "S", 8, 100, 16)]
    cases = make_cases(shapes, ["bfloat16"], ["random", "real"])
    assert [(case.shape, case.logits, case.trains) for case in cases] == [
        ("a", "random", "all"),
        ("a", "random", "frozen-head"),
        ("a", "random", "half-ignored"),
        ("smollm2", "random", "all"),
        ("smollm2", "real", "all"),
    ]
    assert [case.products for case in cases] == [3, 2, 3, 3, 3]
    named = make_cases(shapes, ["bfloat16", "float32"], ["random"], ["frozen-head"], rows=7)
    assert [(case.shape, case.dtype, case.trains, case.rows) for case in named] == [
        ("a", "bfloat16", "frozen-head", 7),
        ("smollm2", "bfloat16", "frozen-head", 7),
        ("a", "float32", "frozen-head", 7),
        ("smollm2", "float32", "frozen-head", 7),
    ]
    with pytest.raises(UserError, match="real logits exist for --shape smollm2 only"):
        make_cases(shapes[:1], ["bfloat16"], ["real"])


def test_cases_of_the_same_inputs_are_next_to_each_other():
    keys = [case.inputs for case in make_cases([Shape("a", "A", 8, 100, 16)], ["bfloat16"], ["random"])]
    assert keys[0] == keys[1] != keys[2]
