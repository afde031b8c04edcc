"""Reading: any pieces give one result, nothing leaks from the future, and it is the definition's."""

import dataclasses

import pytest
import torch

from eaftdrope import apply_ttt
from eaftdrope.ttt import TTTConfig, TTTState, sequence_nll
from tests.ttt.definition import read_row
from tests.ttt.tiny import (
    CHUNK,
    CLASSES,
    LENGTH,
    VOCAB,
    WINDOWS,
    nll_of,
    random_ids,
    read,
    stock_model,
    tiny,
)


def off(model):
    """The same model with a rate of 0: the window model with W0."""
    model.ttt.config = dataclasses.replace(model.ttt.config, lr=0.0)
    return model


@pytest.mark.parametrize("layout", ["prime", "in_place"])
@pytest.mark.parametrize(("kind", "window"), [*((kind, "sink") for kind in CLASSES), *(("qwen3", w) for w in WINDOWS)])
def test_equal_to_the_definition(kind, layout, window):
    model, ids = WINDOWS[window](kind, layout=layout), random_ids(1)
    expected, _ = read_row(model, ids[0])
    with torch.no_grad():
        actual = model(ids).logits[0]
    assert (actual - expected).abs().max() < 1e-12
    assert (off(model)(ids).logits[0] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_every_way_of_cutting_the_text_gives_one_result(kind, window):
    model, ids = WINDOWS[window](kind), random_ids()
    with torch.no_grad():
        expected = model(ids).logits
    for piece in (1, 2, 3, 5, 7, 10, 23):
        assert (read(model, ids, piece) - expected).abs().max() < 1e-12, piece


def test_in_place_weights_are_learned_in_pieces_too():
    model, ids = tiny(layout="in_place"), random_ids()
    with torch.no_grad():
        expected = model(ids).logits
    for piece in (1, 3, 7, 23):
        assert (read(model, ids, piece) - expected).abs().max() < 1e-12, piece


def test_training_and_no_grad_read_the_same():
    model, ids = tiny(), random_ids()
    with torch.no_grad():
        expected = model(ids).logits
    assert (model(ids).logits - expected).abs().max() < 1e-13
    hidden = model.base_model(ids).last_hidden_state
    assert (model.lm_head(hidden) - expected).abs().max() < 1e-13


def test_sequence_nll_is_the_loss_of_each_token():
    model, ids = tiny(), random_ids()
    found = sequence_nll(model, ids)
    assert found.dtype == torch.float64 and not found.requires_grad and found.shape == (2, LENGTH - 1)
    with torch.no_grad():
        assert (found - nll_of(model(ids).logits, ids)).abs().max() < 1e-13
    assert sequence_nll(tiny(dtype=torch.bfloat16), ids).dtype == torch.float32


def test_nothing_changes_before_the_first_update_and_something_after():
    ids = random_ids()
    with torch.no_grad():
        learning = tiny()(ids).logits
        # the same arithmetic with steps of 0; with a rate of 0 no weight is one row's, and products round differently
        frozen = tiny(clip=0.0)(ids).logits
        assert (off(tiny())(ids).logits - frozen).abs().max() < 1e-13
    change = (learning - frozen).abs().amax((0, 2))
    assert change[:CHUNK].max() == 0
    assert change[CHUNK:].min() > 1e-3


@pytest.mark.parametrize("window", WINDOWS)
def test_no_token_reaches_a_position_before_it(window):
    """Row t of a batch has another token at t; it is compared with the same row of a batch of equal rows."""
    model = WINDOWS[window]()
    ids = random_ids(1).expand(LENGTH, -1)
    other = torch.where(torch.eye(LENGTH).bool(), 3 + (ids + 4) % (VOCAB - 3), ids)
    with torch.no_grad():
        changes = [model(other).logits - model(ids).logits, read(model, other, 7) - read(model, ids, 7)]
    for change in changes:
        for t, row in enumerate(change.abs().amax(2)):
            assert not row[:t].any(), t
            assert row[t] > 1e-6, t
            # what was learned from it reaches all that follows the update
            assert row[t - t % CHUNK + CHUNK :].gt(0).all(), t


def test_gradients_reach_all_that_came_before_and_nothing_after():
    model, ids = tiny(), random_ids(1)
    embedded = {}

    def keep(module, arguments, output):
        embedded["ids"] = output.detach().requires_grad_()
        return embedded["ids"]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    logits = model(ids).logits
    hook.remove()
    for t in (3, 4, 5, 11, 21):
        (slope,) = torch.autograd.grad(logits[0, t].sum(), embedded["ids"], retain_graph=True)
        assert slope[0, t + 1 :].abs().max() == 0, t
        # of what came before, all reaches it: through attention, or through what was learned
        assert slope[0, : t + 1].abs().amax(1).min() > 0, t


@pytest.mark.parametrize(("length", "updates"), [(3, 0), (5, 0), (6, 1), (10, 1), (11, 2), (12, 2)])
def test_a_chunk_is_learned_when_the_token_after_it_arrives(length, updates):
    model, ids = tiny(), random_ids()[:, :length]
    state = TTTState(model)
    for piece in (1, 4, length):
        state.reset()
        read(model, ids, piece, state)
        assert (state.position, state.updates, state.pending) == (length, updates, length - CHUNK * updates)


def test_the_last_token_of_a_chunk_is_part_of_its_loss():
    """Rows that differ only in the token after the chunk learn different weights from it."""
    model, ids = tiny(), random_ids(1, CHUNK + 1)
    other = ids.clone()
    other[0, CHUNK] = 3 + (other[0, CHUNK] + 4) % (VOCAB - 3)
    deltas = [read_row(model, row)[1][1] for row in (ids[0], other[0])]
    assert all((one - two).abs().max() > 1e-6 for one, two in zip(*deltas))
    for row in (ids, other):
        assert (read(model, row, 1)[0] - read_row(model, row[0])[0]).abs().max() < 1e-12


@pytest.mark.parametrize("gate", ["eaft", "eaft-exact", "dft"])
def test_a_gate_weights_the_inner_loss_by_its_definition(gate):
    model, ids = tiny(inner_gate=gate), random_ids(1)
    expected, _ = read_row(model, ids[0])
    with torch.no_grad():
        assert (model(ids).logits[0] - expected).abs().max() < 1e-12
        assert (read(model, ids, 3)[0] - expected).abs().max() < 1e-12
        ungated = tiny()(ids).logits[0]
    assert (ungated - expected).abs().max() > 1e-3


def test_steps_come_from_the_rule():
    """A rule that is plain SGD without a clip is a clip that never acts."""
    ids = random_ids(1)
    model = tiny(lr=0.1, clip=1e9)
    with torch.no_grad():
        expected = model(ids).logits
    other = tiny(lr=0.1, clip=1e-9)
    seen = []

    def plain(gradients, config):
        seen.append([gradient.shape for gradient in gradients])
        return gradients

    other.ttt.rule = plain
    with torch.no_grad():
        assert (other(ids).logits - expected).abs().max() < 1e-13
        assert (read(other, ids, 4) - expected).abs().max() < 1e-12
    assert seen[0] == [(1, *weight.shape) for weight in model.ttt.w0()]


@pytest.mark.parametrize("warmup", [1, 2, 9])
def test_the_rate_warms_up_over_chunks(warmup):
    model, ids = tiny(warmup=warmup), random_ids(1)
    expected, deltas = read_row(model, ids[0])
    assert deltas[1][0].norm() > 0
    with torch.no_grad():
        assert (model(ids).logits[0] - expected).abs().max() < 1e-12
        assert (read(model, ids, 4)[0] - expected).abs().max() < 1e-12
        assert (tiny()(ids).logits[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_new_model_reads_as_before_where_the_window_holds_everything(kind, dtype):
    """Primes start as zero: until the first update a converted model is the original, to the last bit."""
    ids = random_ids(length=CHUNK)
    stock = stock_model(kind, dtype=dtype)
    with torch.no_grad():
        expected = stock(ids).logits
        model = apply_ttt(stock_model(kind, dtype=dtype), TTTConfig(window=64, sink=4, chunk=CHUNK, fast_blocks=2))
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(read(model, ids, CHUNK), expected)
