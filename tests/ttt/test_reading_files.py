"""Reading a text in pieces: losses of one pass, a state that is complete after each piece, and what is no text."""

import pytest
import torch

from eaftdrope import apply_ttt
from eaftdrope.errors import UserError
from eaftdrope.ttt import TTTConfig, TTTState, reading, sequence_nll
from eaftdrope.ttt.reading import loss_by_position, read_pieces, read_text
from tests.tiny_models import tiny_llama


@pytest.fixture
def model():
    made = tiny_llama(num_hidden_layers=4, vocab_size=61, initializer_range=0.2, max_position_embeddings=256).double()
    return apply_ttt(made.eval(), TTTConfig(window=8, sink=2, chunk=5, fast_blocks=2, lr=0.5))


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(reading, "_LEAST_PIECE", 10)


def ids(count):
    return torch.randint(0, 61, (count,), generator=torch.Generator().manual_seed(3)).tolist()


def test_pieces_have_the_losses_of_one_pass(model, small_pieces):
    tokens = ids(37)
    pieces = list(read_pieces(model, TTTState(model), tokens))
    assert [piece.tokens for piece in pieces] == [11, 10, 10, 6]
    assert [piece.start for piece in pieces] == [0, 10, 20, 30]
    assert [piece.state.updates for piece in pieces] == [2, 4, 6, 7]
    found = torch.cat([piece.nll for piece in pieces])
    assert (found - sequence_nll(model, torch.tensor([tokens]))[0]).abs().max() < 1e-12
    assert all(piece.tokens_per_second > 0 for piece in pieces)


def test_a_state_stays_as_it_was_when_reading_goes_on(model, small_pieces):
    tokens, beginning = ids(37), TTTState(model)
    first, *_, last = read_pieces(model, beginning, tokens)
    assert (beginning.position, first.state.position, last.state.position) == (0, 11, 37)
    rest = list(read_pieces(model, first.state, tokens[11:]))
    # it continues from the first piece: the same losses, but for the token whose prediction no state holds
    assert rest[0].start == 11
    whole = sequence_nll(model, torch.tensor([tokens]))[0]
    assert (torch.cat([piece.nll for piece in rest]) - whole[11:]).abs().max() < 1e-12
    for one, other in zip(rest[-1].state.delta, last.state.delta, strict=True):
        assert (one - other).abs().max() < 1e-12


def test_after_a_part_of_a_piece_the_next_one_ends_where_it_would_have(model, small_pieces):
    state = TTTState(model)
    with torch.no_grad():
        model(torch.tensor([ids(3)]), past_key_values=state, use_cache=True)
    assert [piece.state.position for piece in read_pieces(model, state, ids(20))] == [11, 21, 23]


def test_a_single_token_has_no_loss(model):
    (piece,) = read_pieces(model, TTTState(model), ids(1))
    assert (piece.tokens, len(piece.nll)) == (1, 0)


def test_a_token_that_the_model_does_not_have(model):
    with pytest.raises(UserError, match="token 61, and the model's embedding has 61 rows"):
        next(read_pieces(model, TTTState(model), [3, 61]))


def test_loss_by_position_has_bins_that_double():
    nll = torch.arange(300.0)
    assert loss_by_position(nll, 0) == [(0, 128, 63.5), (128, 256, 191.5), (256, 300, 277.5)]
    assert loss_by_position(nll[:100], 200) == [(200, 256, 27.5), (256, 300, 77.5)]
    assert loss_by_position(nll[:0], 0) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: there is nothing to read"),
        (b" \n\t", "is empty: there is nothing to read"),
        (b"text \xff\xfe text", "is not text in UTF-8 (byte 5)"),
        (b"text\0text", "is not text: it has a zero byte"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, message):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_text(file)
    assert message in str(caught.value) and str(file) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    (tmp_path / "novel.txt").write_text("text")
    with pytest.raises(UserError, match=r"no such file\. Did you mean `.*novel\.txt`"):
        read_text(tmp_path / "novl.txt")
    with pytest.raises(UserError, match="is a folder"):
        read_text(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfW\xc3\xb6rter")
    assert read_text(tmp_path / "text.txt") == "Wörter"
