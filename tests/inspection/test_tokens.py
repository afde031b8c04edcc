"""What one look yields, against the full logits: statistics, gates, the gradient's norm by autograd, the tokens' places."""

import dataclasses

import pytest
import torch
from torch.nn import functional
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from eaftdrope.evaluate.likelihood import TokenRow
from eaftdrope.inspection import tokens as module
from eaftdrope.inspection.tokens import measure_tokens
from eaftdrope.loss import token_statistics
from eaftdrope.loss.backends import select_backend
from eaftdrope.loss.definition import evaluate_gate
from eaftdrope.loss.gates import resolve_gate
from tests.trainer.tiny import VOCAB, ragged_rows, tiny_model

SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    initializer_range=0.5,
)


def make(name):
    torch.manual_seed(0)
    if name == "softcap":
        return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=5.0)).eval()
    if name == "scale":
        return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.5)).eval()
    return tiny_model(scale=0.4, tie_word_embeddings=name == "tied").eval()


def some_rows():
    return [TokenRow(row["input_ids"], row["labels"]) for row in ragged_rows(7)]


def by_hand(model, rows):
    """(logits `[T, V]` float64, labels, row, position, place) of every trained token, row by row."""
    found = []
    for number, row in enumerate(rows):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
        place = 0
        for position in range(1, len(row.labels)):
            if row.labels[position] != -100:
                place += 1
                found.append((logits[position - 1], row.labels[position], number, position, place))
    logits, *rest = zip(*found)
    return torch.stack(logits), *map(torch.tensor, rest)


@pytest.mark.parametrize("gate", ["eaft", "dft", "none", "conflict-mask"])
@pytest.mark.parametrize("name", ["tied", "untied", "softcap", "scale"])
def test_against_the_full_logits(name, gate):
    # tiles of five rows
    model, rows, gate = make(name), some_rows(), resolve_gate(gate)
    seen = measure_tokens(model, rows, gate, backend="torch", tile_bytes=5 * VOCAB * 4)
    logits, labels, row, position, place = by_hand(model, rows)
    expected = token_statistics(logits, labels, k=gate.topk, sequence=row)
    for field in ("nll", "entropy"):
        assert torch.allclose(getattr(seen.stats, field).double(), getattr(expected, field), rtol=1e-4, atol=1e-5), (
            field
        )
    assert torch.equal(seen.stats.correct, expected.correct)
    assert torch.allclose(seen.weight.double(), evaluate_gate(gate, expected), atol=1e-5)
    for field, value in (("row", row), ("position", position), ("rank", place)):
        assert torch.equal(getattr(seen, field), value), field

    logits.requires_grad_()
    functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert torch.allclose(seen.gradient.double(), logits.grad.norm(dim=-1), atol=1e-5)

    conflicts = expected.conflict.nonzero().squeeze(1)
    assert torch.equal(seen.conflicts, conflicts)
    probabilities = logits.detach().softmax(-1)[conflicts]
    assert torch.equal(seen.predicted, probabilities.argmax(-1))
    assert torch.allclose(seen.predicted_probability.double(), probabilities.amax(-1), atol=1e-5)
    if name == "untied":
        assert len(conflicts) > 3


def test_no_more_logits_than_a_tile_exist(monkeypatch):
    monkeypatch.setattr(module, "default_tile_bytes", lambda *_: 5 * VOCAB * 4)
    sizes = []
    original = functional.linear

    def watched(hidden, weight, bias=None):
        if weight.shape[0] == VOCAB:
            sizes.append(len(hidden))
        return original(hidden, weight, bias)

    monkeypatch.setattr(module.functional, "linear", watched)
    seen = measure_tokens(make("tied"), some_rows(), resolve_gate("none"))
    assert max(sizes) == 5 and sum(sizes) == len(seen.row)


def test_a_sure_and_right_token_keeps_the_digits_of_its_norm():
    """Neither of the two terms is a difference of numbers close to 1."""
    model = make("untied")
    with torch.no_grad():
        model.lm_head.weight *= 4
    ids = some_rows()[-1].input_ids
    with torch.no_grad():
        likeliest = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
    # the model agrees with itself
    rows = [TokenRow(ids, [-100, *likeliest[:-1]])]
    seen = measure_tokens(model, rows, resolve_gate("none"))
    logits, labels, *_ = by_hand(model, rows)
    logits.requires_grad_()
    functional.cross_entropy(logits, labels, reduction="sum").backward()
    expected = logits.grad.norm(dim=-1)
    assert expected.min() < 1e-5
    assert torch.allclose(seen.gradient.double(), expected, rtol=1e-3, atol=0)


def test_the_backend_and_the_tile_that_were_asked_for(monkeypatch):
    taken = []

    def select(name, device, dtype):
        chosen = select_backend(name, device, dtype)

        def statistics(logits_RV, *rest):
            taken.append((name, len(logits_RV)))
            return chosen.tile_statistics(logits_RV, *rest)

        return dataclasses.replace(chosen, tile_statistics=statistics)

    monkeypatch.setattr(module, "select_backend", select)
    rows = some_rows()
    count = sum(label != -100 for row in rows for label in row.labels[1:])
    measure_tokens(make("tied"), rows, resolve_gate("none"), backend="torch", tile_bytes=7 * VOCAB * 4)
    assert taken == [("torch", 7)] * (count // 7) + ([("torch", count % 7)] if count % 7 else [])
    with pytest.raises(ValueError, match="unknown loss backend 'nosuch'"):
        measure_tokens(make("tied"), rows, resolve_gate("none"), backend="nosuch")
