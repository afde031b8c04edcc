"""Rows of a batch do not see each other, whatever their lengths and on whichever side they are padded."""

import pytest
import torch

from eaftdrope.ttt import sequence_nll
from tests.ttt.tiny import LENGTH, VOCAB, WINDOWS, assert_same_gradients, gradients, nll_of, random_ids, tiny

# of four rows padded to 23: complete chunks only, one token more, shorter than a chunk, and all of it
LENGTHS = (15, 16, 3, LENGTH)


def padded(side: str, token: int = 2):
    """ids and mask `[4, 23]` of rows of LENGTHS, and the rows themselves."""
    rows = [row[:length] for row, length in zip(random_ids(len(LENGTHS)), LENGTHS)]
    ids, mask = (torch.full((len(rows), LENGTH), value) for value in (token, 0))
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(LENGTH - len(row), LENGTH)
        ids[index, place], mask[index, place] = row, 1
    return ids, mask, rows


@pytest.mark.parametrize("window", WINDOWS)
def test_a_batch_is_its_rows(window):
    model, ids = WINDOWS[window](), random_ids(3)
    with torch.no_grad():
        together = model(ids).logits
        alone = torch.cat([model(row[None]).logits for row in ids])
    assert (together - alone).abs().max() < 1e-12


def test_no_row_reaches_another():
    model, ids = tiny(), random_ids(3)
    other = ids.clone()
    other[1] = 3 + (other[1] + 4) % (VOCAB - 3)
    with torch.no_grad():
        change = (model(other).logits - model(ids).logits).abs().amax((1, 2))
    assert change[0] == change[2] == 0 and change[1] > 0.1


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("window", WINDOWS)
def test_uneven_rows_are_read_as_each_alone(side, window):
    model = WINDOWS[window]()
    ids, mask, rows = padded(side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for index, row in enumerate(rows):
            expected = model(row[None]).logits[0]
            assert (logits[index][mask[index].bool()] - expected).abs().max() < 1e-12, index


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_pads_a_row_does_not_matter(side):
    model = tiny()
    first, mask, _ = padded(side, token=2)
    second, _, _ = padded(side, token=17)
    with torch.no_grad():
        one, two = (model(ids, attention_mask=mask).logits[mask.bool()] for ids in (first, second))
    assert torch.equal(one, two)


@pytest.mark.parametrize("side", ["right", "left"])
def test_sequence_nll_is_0_where_a_row_is_padded(side):
    model = tiny()
    ids, mask, rows = padded(side)
    found = sequence_nll(model, ids, mask)
    real = (mask[:, 1:] * mask[:, :-1]).bool()
    assert found[~real].abs().max() == 0
    for index, row in enumerate(rows):
        assert (found[index][real[index]] - sequence_nll(model, row[None])[0]).abs().max() < 1e-5, index


@pytest.mark.parametrize("horizon", [1, None])
@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients_of_uneven_rows_are_those_of_each_alone(side, horizon):
    model = tiny(horizon=horizon)
    ids, mask, rows = padded(side)
    real = mask[:, 1:] * mask[:, :-1]
    count = real.sum()
    loss = (nll_of(model(ids, attention_mask=mask).logits, ids) * real).sum() / count
    actual = gradients(model, loss)
    alone = sum(nll_of(model(row[None]).logits, row[None]).sum() for row in rows) / count
    assert abs(loss - alone) < 1e-12
    assert_same_gradients(actual, gradients(model, alone), 1e-11)


def test_a_row_shorter_than_two_tokens():
    model = tiny(horizon=None)
    ids, mask, _ = padded("right")
    mask[2, 1:] = 0
    found = gradients(model, nll_of(model(ids, attention_mask=mask).logits, ids)[mask[:, 1:].bool()].sum())
    assert all(gradient.isfinite().all() for gradient in found.values())
