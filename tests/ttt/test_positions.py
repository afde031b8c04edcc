"""Beyond the length that the model was trained on: the sink stays within it, and nothing else changes."""

import pytest
import torch

from tests.ttt.definition import read_row
from tests.ttt.tiny import CHUNK, LENGTH, assert_same_gradients, gradients, nll_of, random_ids, read, tiny, tiny_sliding

# the third of five chunks ends beyond it
TRAINED = 12
SHORT = {"max_position_embeddings": TRAINED}


@pytest.mark.parametrize("kind", ["qwen3", "llama", "smollm3"])
@pytest.mark.parametrize("sink", [1, 2])
def test_the_sink_is_rotated_after_the_text(kind, sink):
    """The tables of rotations are float32 in every model, and the definition rotates once where the product rotates twice."""
    model, ids = tiny(kind, shape=SHORT, sink=sink), random_ids(1)
    expected, _ = read_row(model, ids[0])
    with torch.no_grad():
        actual = model(ids).logits[0]
        far = tiny(kind, sink=sink)(ids).logits[0]
    assert (actual - expected).abs().max() < 1e-5
    change = (actual - far).abs().amax(1)
    # the third chunk is the first that ends beyond the trained length
    assert change[: 2 * CHUNK].max() < 1e-13
    assert change[2 * CHUNK :].min() > 1e-4


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_pieces_are_one_pass_there_too(kind):
    model, ids = tiny(kind, shape=SHORT), random_ids()
    with torch.no_grad():
        expected = model(ids).logits
    for piece in (1, 2, 3, 5, 7, 10, 23):
        assert (read(model, ids, piece) - expected).abs().max() < 1e-12, piece


def test_gradients_flow_through_the_rotation():
    model, ids = tiny(shape=SHORT), random_ids(1)
    actual = gradients(model, nll_of(model(ids).logits, ids).mean())
    logits, _ = read_row(model, ids[0])
    assert_same_gradients(actual, gradients(model, nll_of(logits[None], ids).mean()), 1e-5)


def test_no_key_is_further_away_than_the_trained_length(monkeypatch):
    """The same text after a long one gives the same logits: all that attention sees are distances that stay the same."""
    model = tiny(shape=SHORT, lr=0.0, window=6)
    text = random_ids(1, 40)
    text[:, 20:] = text[:, 0:20]
    repeated = torch.cat([text[:, :20]] * 20, dim=1)
    with torch.no_grad():
        logits = model(repeated).logits
    # from the third repetition on, the window and the sink hold the same keys at the same distances
    late = logits[0, -20:]
    assert (late - logits[0, -40:-20]).abs().max() < 1e-4
    with torch.no_grad():
        drifting = tiny(lr=0.0, window=6)(repeated).logits
    assert (drifting[0, -20:] - drifting[0, -40:-20]).abs().max() > 1e-3


def test_without_a_sink_nothing_is_rotated():
    ids = random_ids()
    with torch.no_grad():
        for make in (lambda **options: tiny(sink=0, **options), tiny_sliding_of):
            assert torch.equal(make(shape=SHORT)(ids).logits, make(shape={})(ids).logits)


def tiny_sliding_of(shape):
    model = tiny_sliding()
    for name, value in dict(shape).items():
        setattr(model.config, name, value)
    return model


def test_uneven_rows_there():
    model = tiny(shape=SHORT)
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        assert (logits[0] - model(ids[:1]).logits[0]).abs().max() < 1e-12
        assert (logits[1, :17] - model(ids[1:, :17]).logits[0]).abs().max() < 1e-12
    assert LENGTH > TRAINED
