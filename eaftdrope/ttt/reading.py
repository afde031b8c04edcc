"""Reading a text with a state: in pieces of whole chunks, with the loss and the speed of each.

    for piece in read_pieces(model, TTTState(model), ids):
        piece.state, piece.nll, piece.tokens_per_second        # the state is complete up to here, whatever happens next

Legend: n tokens of a piece, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eaftdrope.errors import UserError
from eaftdrope.files import usable_path
from eaftdrope.models.references import nearest
from eaftdrope.versions import cache_argument

from .chunk import token_losses
from .fast_mlps import causal_lm, fast_mlps
from .state import TTTState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# tokens; long enough that the work on a piece is long beside printing a line
_LEAST_PIECE = 2048
_FIRST_BIN = 128


@dataclass(frozen=True)
class Piece:
    """What reading one piece gave.

    Attributes:
        state: the state after the piece; reading the next one does not change it.
        nll: losses in nats of the piece's tokens, each from before the update that it is part of: float32 [n] on the CPU.
            The first token of the first piece has none: there it is [n - 1].
        start: position of the token that predicts the first of them; positions count from the beginning of the state.
        tokens: n.
        seconds: wall time.
    """

    state: TTTState
    nll: Tensor
    start: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the piece per second of wall time."""
        return self.tokens / self.seconds


def read_text(file: str | Path) -> str:
    """Return the text of a file.

    Raises:
        UserError: no such file, a folder, an empty file, or one that is not text in UTF-8.
    """
    path = usable_path(file)
    if not path.exists():
        raise UserError(f"{path}: no such file.{nearest(path)}")
    if not path.is_file():
        raise UserError(f"{path} is a folder, and one text is read at a time. Pass a file.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text in UTF-8 (byte {error.start:,}). Convert it to a text file first."
        ) from None
    if "\0" in text:
        raise UserError(f"{path} is not text: it has a zero byte. Convert it to a text file first.")
    if not text.strip():
        raise UserError(f"{path} is empty: there is nothing to read.")
    return text


def read_pieces(model: PreTrainedModel, state: TTTState, ids: list[int]) -> Iterator[Piece]:
    """Read `ids` after what `state` has read, and yield after each piece; `state` itself stays as it is.

    A piece ends with the token after a chunk, with which that chunk is learned.

    Args:
        model (`PreTrainedModel`): with test-time training.
        state (`TTTState`): of one row; a fresh one for a text of its own.
        ids (`list[int]`): token ids.

    Raises:
        UserError: a token that the model's embedding has no row for.
    """
    model = causal_lm(model)
    _check_tokens(model, ids)
    chunk, before, done = fast_mlps(model).config.chunk, None, 0
    size = chunk * max(2, -(-_LEAST_PIECE // chunk))
    while done < len(ids):
        started = time.perf_counter()
        state, first = state.fork(), state.position
        count = size + 1 if first == 0 else size - (first - 1) % size
        piece_n = torch.tensor(ids[done : done + count], device=model.device)
        with torch.no_grad():
            hidden_nD = model.base_model(piece_n[None], **cache_argument(state), use_cache=True).last_hidden_state[0]
            targets_n = piece_n[1:] if before is None else piece_n
            predicting_nD = hidden_nD[:-1] if before is None else torch.cat([before, hidden_nD[:-1]])
            nll_n = token_losses(model, predicting_nD, targets_n)
        start = first if before is None else first - 1
        before = hidden_nD[-1:].clone()
        done += len(piece_n)
        yield Piece(state, nll_n.cpu(), start, len(piece_n), time.perf_counter() - started)


def _check_tokens(model: PreTrainedModel, ids: list[int]) -> None:
    embedding: Any = model.get_input_embeddings()
    size = embedding.weight.shape[0]
    if (largest := max(ids)) >= size:
        raise UserError(
            f"the text has token {largest}, and the model's embedding has {size} rows: the tokenizer has more tokens than "
            "the model. Use the tokenizer that belongs to the model."
        )


def loss_by_position(nll: Tensor, start: int) -> list[tuple[int, int, float]]:
    """Return (first, end, mean loss in nats) for positions 0 to 128, to 256, to 512 and so on, as far as `nll` goes.

    Args:
        nll (`Tensor`): losses [N] at positions `start`, `start + 1`, ...
    """
    found, first, end = [], 0, _FIRST_BIN
    while first < start + len(nll):
        part = nll[max(0, first - start) : max(0, end - start)]
        if len(part):
            found.append((max(first, start), min(end, start + len(nll)), part.mean().item()))
        first, end = end, 2 * end
    return found
