"""`TTTState`: everything that reading has changed, as a transformers cache, so stock `generate` drives it.

It holds the window of keys and values of every block, what the fast MLPs have learned, and the chunk under way. A chunk is
learned when the token after it arrives, before that token is read: its last position needs that target. Tensors are never
written in place, so a fork shares them.

Legend: B rows, n tokens of a piece, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .chunk import Chunk, chunk_step
from .fast_mlps import causal_lm, fast_mlps
from .saved import read_state, write_state
from .views import run_first, run_last
from .window import KeysValues, make_layer


class TTTState(Cache):
    """What a model with TTT has read, and learned from it.

        state = TTTState(model)
        model(ids, past_key_values=state)               reads and learns
        model.generate(ids, past_key_values=state)      continues; `ids` begins with the tokens that the state has read

    All rows of a state have the same length. A state of one row serves a batch: its row is repeated. It holds what was read,
    so it is as private as the text.

    Args:
        model ([`~transformers.PreTrainedModel`]): a model with TTT, or a PEFT model around one.

    Attributes:
        delta (`list[Tensor]` or `None`): what was learned: the difference to the initial fast weights, per row.
    """

    def __init__(self, model: Any) -> None:
        model = causal_lm(model)
        fast = fast_mlps(model)
        blocks = fast.first + fast.fast_blocks
        super().__init__(layers=[make_layer(model, fast.config) for _ in range(blocks)])
        self.layers: list[Any]
        self.model: PreTrainedModel = model
        self.first, self.chunk, self.settings = fast.first, fast.config.chunk, fast.settings
        self.delta: list[Tensor] | None = None
        # the chunk under way: outputs of the first blocks [B, n, D], tokens [B, n], and what the last blocks kept before it
        self.hidden: Tensor | None = None
        self.ids: Tensor | None = None
        self.kept: list[KeysValues] = [(None, None)] * fast.fast_blocks
        self._weights: list[Tensor] | None = None

    @property
    def position(self) -> int:
        """Tokens read."""
        return self.get_seq_length()

    @property
    def pending(self) -> int:
        """Tokens of the chunk under way, which is not learned yet."""
        return 0 if self.ids is None else self.ids.shape[1]

    @property
    def updates(self) -> int:
        """Chunks learned."""
        return (self.position - self.pending) // self.chunk

    @property
    def rows(self) -> int | None:
        """Rows; None before anything was read."""
        keys = self.layers[-1].keys
        return None if keys is None else keys.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of its tensors, each counted once."""
        tensors = [self.hidden, self.ids, *(self.delta or [])]
        tensors += [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]
        tensors += [tensor for pair in self.kept for tensor in pair]
        return sum({id(t): t.nbytes for t in tensors if t is not None}.values())

    def fork(self) -> TTTState:
        """A copy that reads on independently; tensors are shared until one of the two changes."""
        new = copy.copy(self)
        new.layers = [copy.copy(layer) for layer in self.layers]
        return new

    def reset(self) -> None:
        """Forget everything: as a new state."""
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = 0
        self.delta = self.hidden = self.ids = self._weights = None
        self.kept = [(None, None)] * len(self.kept)

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file, atomically.

        The file contains what was read: keep it as private as the text.
        """
        write_state(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: Any) -> TTTState:
        """Read a state that `save` wrote.

        Raises:
            ValueError: the file is not a state, or is damaged, of another version, or of another model: its architecture,
                its weights, its initial fast weights and the settings that shape a state must be the same.
        """
        return read_state(cls(model), Path(path), causal_lm(model))

    # Rows, as generation reorders them

    def _change_rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else pick(tensor)

        self.delta = None if self.delta is None else [pick(change) for change in self.delta]
        self.hidden, self.ids, self._weights = some(self.hidden), some(self.ids), None
        self.kept = [(some(keys), some(values)) for keys, values in self.kept]

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._change_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_rows(lambda tensor: tensor[indices])

    def crop(self, *arguments: Any, **named: Any) -> None:
        raise ValueError("what was learned cannot be unlearned: fork the state before, instead of cropping it after.")

    # Weights

    def weights(self, model: PreTrainedModel) -> list[Tensor]:
        """The fast weights as learned so far, computed once per update."""
        if self.delta is None:
            return fast_mlps(model).w0()
        if self._weights is None:
            assert self.rows is not None
            self._weights = [weight.to(model.dtype) for weight in fast_mlps(model).weights(self.rows, self.delta)]
        return self._weights

    def take(self, delta: list[Tensor]) -> None:
        self.delta, self._weights = delta, None


def feed(model: PreTrainedModel, state: TTTState, ids_Bn: Tensor, mask: Tensor | None = None) -> Tensor:
    """Read tokens and learn from every chunk that they complete; return their final hidden states `[B, n, D]`.

    Raises:
        ValueError: padding, a number of rows that is not the state's, or a state of another model or other settings.
    """
    if mask is not None and not bool(mask.bool().all()):
        raise ValueError(
            "the rows of a TTTState have one length, and attention_mask marks padding. Read or generate rows of different "
            "lengths one by one."
        )
    if state.model is not model:
        raise ValueError(
            "this TTTState was made for another model: make one with TTTState(model), or load it for this model."
        )
    if state.settings != fast_mlps(model).settings:
        raise ValueError("this TTTState was made with another window, sink, chunk, layout or number of fast blocks.")
    rows = state.rows
    if rows is not None and rows != ids_Bn.shape[0]:
        if rows != 1:
            raise ValueError(f"the state has {rows} rows and {ids_Bn.shape[0]} were given.")
        state.batch_repeat_interleave(ids_Bn.shape[0])
    with torch.inference_mode(False), torch.no_grad():
        return _feed(model, state, ids_Bn.clone())


def _feed(model: PreTrainedModel, state: TTTState, ids_Bn: Tensor) -> Tensor:
    fast, outputs = fast_mlps(model), []
    learns = fast.config.lr > 0
    while ids_Bn.shape[1]:
        if state.pending == state.chunk:
            _learn_pending(model, state, ids_Bn[:, :1], learns=learns)
        start, pending = state.position, state.pending
        room = state.chunk - pending
        piece_Bn, ids_Bn = ids_Bn[:, :room], ids_Bn[:, room:]
        hidden_BnD = run_first(model, piece_Bn, state.layers[: state.first], start)
        state.hidden = hidden_BnD if state.hidden is None else torch.cat([state.hidden, hidden_BnD], 1)
        state.ids = piece_Bn if state.ids is None else torch.cat([state.ids, piece_Bn], 1)
        if learns and state.pending == state.chunk and ids_Bn.shape[1]:
            # the chunk is complete, and the token after it here: one pass reads the rest of it and learns all of it
            output, kept = _learn(model, state, ids_Bn[:, :1], start - pending)
            output, end = output[:, pending:], start + room
            state.layers[state.first :] = [make_layer(model, fast.config, pair, end) for pair in kept]
            state.kept, state.hidden, state.ids = kept, None, None
        else:
            with fast.using(state.weights(model)):
                output = run_last(model, hidden_BnD, state.layers[state.first :], start)
        outputs.append(output)
    return torch.cat(outputs, 1)


def _learn_pending(model: PreTrainedModel, state: TTTState, following_B1: Tensor, *, learns: bool) -> None:
    """Learn the chunk under way, which is complete and was read to its end; `following_B1` is the token after it."""
    # as they were computed when the tokens were read: the same up to rounding
    kept: list[KeysValues] = [(layer.keys, layer.values) for layer in state.layers[state.first :]]
    if learns:
        _learn(model, state, following_B1, state.position - state.pending)
    state.kept, state.hidden, state.ids = kept, None, None


def _learn(
    model: PreTrainedModel, state: TTTState, following_B1: Tensor, start: int
) -> tuple[Tensor, list[KeysValues]]:
    """Learn the chunk under way, which began at position `start`; return its final hidden states, keys and values."""
    assert state.ids is not None and state.hidden is not None
    targets_Bn = torch.cat([state.ids[:, 1:], following_B1], 1)
    output, kept, delta = chunk_step(model, Chunk(state.hidden, state.kept, state.delta, start), targets_Bn)
    assert delta is not None
    state.take(delta)
    return output, kept


@contextmanager
def learned(model: Any, state: TTTState) -> Generator[None]:
    """Inside the block, what `state` has learned is part of the model's initial fast weights.

    To measure what reading changed in the model itself, apart from the window of what was read.

    Raises:
        ValueError: the state has several rows.
    """
    if state.rows not in (None, 1):
        raise ValueError(f"the state has {state.rows} rows, and a model has one set of initial weights.")
    w0 = fast_mlps(model).w0()
    saved = [weight.detach().clone() for weight in w0]
    with torch.no_grad():
        for weight, change in zip(w0, state.delta or [], strict=False):
            weight.add_(change[0].to(weight.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(w0, saved, strict=True):
                weight.copy_(before)
