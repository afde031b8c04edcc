"""The loss sum and its gradients from the hidden states, one tile of logits at a time.

Because the gate is detached and (for most gates) local to its row, one look at a tile of logits yields the statistics of
its rows, their gate, their loss and their gradient: three GEMMs, and the N x V logits never exist. A gate that compares
tokens with each other sees all of them first, and the gradient is formed in a second look, slice by slice of the
vocabulary: one more GEMM over the rows it leaves open, but no sum of weight gradients to keep in float32. `recompute`
asks for that order under any gate.

Rows whose label is ignored never reach a GEMM; rows whose gate is closed never reach one of the gradient.

Legend: N rows (tokens), T trained rows, O open ones among them, R rows of a tile, H hidden size, V vocabulary, C columns
of a slice of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import Backend
from .backends.tile import LogitsTransform, TileStats
from .buffers import tile_buffer
from .definition import evaluate_gate
from .gates import Gate
from .gradients import ColumnGradients, Gradients, Needed, sum_dtype
from .products import multiply_into
from .rows import TrainedRows
from .statistics import TokenStats
from .tail import ROWS_A_SUM, TailSparseGradients

# Columns of a slice of the vocabulary, at least: a GEMM wants some, however many rows there are.
_SLICE_COLUMNS = 256

# Rows of a tile that are moved at a time: what moves is copied once.
_MOVED_ROWS = 8


@dataclass(frozen=True)
class Options:
    """How a call is computed.

    Args:
        tile_bytes (`int`): memory of one tile of logits.
        tail_threshold (`float` or `None`): drop gradients by a logit below it; None keeps them all.
        gate_threshold (`float`): rows whose gate is smaller take no part in the gradient; 0 leaves out closed ones.
        recompute (`bool`): statistics of all rows first, then the gradient by slices of the vocabulary.
    """

    gate: Gate
    transform: LogitsTransform
    backend: Backend
    tile_bytes: int
    tail_threshold: float | None = None
    gate_threshold: float = 0.0
    recompute: bool = False


@dataclass(frozen=True)
class Result:
    """Loss sum, its gradients by hidden, weight and bias (None where not asked for), what was seen of the T rows, and who
    did the work."""

    loss: Tensor
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]
    stats: TokenStats
    weight: Tensor
    closed: Tensor
    backend: Backend


@torch.no_grad()
def compute(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, rows: TrainedRows, options: Options, needed: Needed
) -> Result:
    """Everything there is to know of a call. Computes in the dtype of `hidden_NH`; a wider head is rounded to it, and
    its gradient then comes in float32."""
    call = _Call(hidden_NH, weight_VH, bias_V, rows, options, needed)
    # Does one look at a tile settle its gate? Else all rows are seen before any gradient is formed.
    one_look = (options.gate.row_local or call.tiles == 1) and not (options.recompute and any(needed))
    return call.one_look() if one_look else call.two_looks()


class _Call:
    """The parts of one call. One tile of logits is held at a time."""

    def __init__(self, hidden_NH, weight_VH, bias_V, rows: TrainedRows, options: Options, needed: Needed):
        self.hidden_NH, self.rows, self.options, self.needed = hidden_NH, rows, options, needed
        self.head_VH = weight_VH.to(hidden_NH.dtype)
        self.bias_V = None if bias_V is None else bias_V.to(hidden_NH.dtype)
        self.vocab = weight_VH.shape[0]
        self.weight_dtype = weight_VH.dtype
        most = max(1, options.tile_bytes // (self.vocab * self.head_VH.element_size()))
        # all tiles alike: the last one is as good for a GEMM as the others
        self.tile_rows = max(1, math.ceil(rows.count / max(1, math.ceil(rows.count / most))))
        self.tiles = max(1, math.ceil(rows.count / self.tile_rows))

    def one_look(self) -> Result:
        """Statistics, gate and gradient of each tile in turn."""
        gradients = self.row_gradients()
        seen, weights = [], []
        for tile, places, hidden_RH, logits_RV in self.projected(slice(0, self.rows.count)):
            stats = self.statistics(logits_RV, tile)
            weight_R = self.rows.mask(evaluate_gate(self.options.gate, self.token_stats([stats], tile)), tile)
            seen.append(stats)
            weights.append(weight_R)
            if any(self.needed):
                self.add_tile(gradients, places, self.rows.labels[tile], hidden_RH, logits_RV, stats, weight_R)
        return self.result(seen, torch.cat(weights), gradients.finish())

    def two_looks(self) -> Result:
        """Statistics of all rows, the gate, then the gradient of the rows that it leaves open."""
        seen = []
        every_row = slice(0, self.rows.count)
        for tile, _, _, logits_RV in self.projected(every_row):
            seen.append(self.statistics(logits_RV, tile))
        weight_T = self.rows.mask(evaluate_gate(self.options.gate, self.token_stats(seen, every_row)), every_row)
        gradients = None, None, None
        if any(self.needed):
            open_O = self.open_of_all(weight_T)
            # which columns matter is known of few rows at a time, so a sparse tail goes by tiles again
            second_look = self.rows_again if self.options.tail_threshold is not None else self.columns_again
            open_weight_T = torch.where(self.closed(weight_T), 0, weight_T)
            gradients = second_look(open_O, TileStats.concatenate(seen), open_weight_T)
        return self.result(seen, weight_T, gradients)

    def rows_again(self, open_O: Tensor, stats_T: TileStats, weight_T: Tensor):
        """Gradients of the open rows, projected once more tile by tile."""
        gradients = self.row_gradients()
        for at, places, hidden_RH, logits_RV in self.projected(open_O):
            self.add_tile(
                gradients, places, self.rows.labels[at], hidden_RH, logits_RV, stats_T.rows(at), weight_T[at]
            )  # fmt: skip
        return gradients.finish()

    def columns_again(self, open_O: Tensor, stats_T: TileStats, weight_T: Tensor):
        """Gradients of the open rows, slice by slice of the vocabulary."""
        places_O = self.rows.places(open_O)
        hidden_OH, labels_O = self.hidden_NH[places_O], self.rows.labels[open_O]
        stats_O, weight_O = stats_T.rows(open_O), weight_T[open_O]
        gradients = ColumnGradients(self.hidden_NH, self.head_VH, self.needed, places_O, self.weight_dtype)
        # as large as a tile of the first look, whose memory then serves again
        fit = self.tile_rows * self.vocab // max(1, len(open_O))
        width = min(self.vocab, max(_SLICE_COLUMNS, fit))
        for columns in _slices(self.vocab, width):
            # the last slice is narrower: asked for anew, so that its rows lie side by side too
            with tile_buffer(len(open_O), columns.stop - columns.start, self.head_VH) as logits_OC:
                self.matmul(hidden_OH, columns, logits_OC)
                self.options.backend.tile_gradient_(
                    logits_OC, labels_O - columns.start, stats_O, weight_O, self.options.transform
                )
                gradients.add(columns, hidden_OH, logits_OC)
        return gradients.finish()

    def projected(self, rows: Tensor | slice) -> Iterator[tuple[Tensor | slice, Tensor | slice, Tensor, Tensor]]:
        """For each tile of some of the T rows: which rows, their places among the N, hidden states and raw logits. The
        next tile takes the place of the logits."""
        count = len(rows) if isinstance(rows, Tensor) else rows.stop
        with tile_buffer(self.tile_rows, self.vocab, self.head_VH) as buffer_RV:
            for tile in _slices(count, self.tile_rows):
                at = rows[tile] if isinstance(rows, Tensor) else tile
                places = self.rows.places(at)
                hidden_RH = self.hidden_NH[places]
                logits_RV = buffer_RV[: hidden_RH.shape[0]]
                self.matmul(hidden_RH, slice(None), logits_RV)
                yield at, places, hidden_RH, logits_RV

    def matmul(self, hidden_RH: Tensor, columns: slice, out_RC: Tensor) -> None:
        bias_C = None if self.bias_V is None else self.bias_V[columns]
        multiply_into(out_RC, hidden_RH, self.head_VH[columns].t(), bias_C=bias_C)

    def statistics(self, logits_RV: Tensor, tile: slice) -> TileStats:
        options = self.options
        return options.backend.tile_statistics(
            logits_RV, self.rows.labels[tile], options.transform, options.gate.topk
        )  # fmt: skip

    def add_tile(self, gradients: Gradients, places, labels_R, hidden_RH, logits_RV, stats: TileStats, weight_R):
        """Forms the gradient of a tile whose gate is known, and adds it; closed rows are moved out of the way first."""
        order_R = self.open_rows(weight_R, logits_RV)
        if order_R is not None:
            logits_RV, hidden_RH = logits_RV[: len(order_R)], hidden_RH[order_R]
            labels_R, stats, weight_R = labels_R[order_R], stats.rows(order_R), weight_R[order_R]
            places = order_R + places.start if isinstance(places, slice) else places[order_R]
        elif self.options.gate_threshold:
            weight_R = torch.where(self.closed(weight_R), 0, weight_R)
        if len(logits_RV):
            self.options.backend.tile_gradient_(logits_RV, labels_R, stats, weight_R, self.options.transform)
            gradients.add(places, hidden_RH, logits_RV)

    def open_of_all(self, weight_T: Tensor) -> Tensor:
        """Which of the T rows are open; all of them where the device can not be asked."""
        if self.rows.is_static:
            return torch.arange(self.rows.count, device=weight_T.device)
        return (~self.closed(weight_T)).nonzero().squeeze(1)

    def open_rows(self, weight_R: Tensor, logits_RV: Tensor) -> Tensor | None:
        """Moves the open rows of a tile to its top and returns which they are, or None where nothing is to be left out.

        On a device this waits for the gate, so it is done only where the gate can close a row.
        """
        is_waiting = logits_RV.device.type != "cpu"
        if self.rows.is_static or (is_waiting and not (self.options.gate.closes or self.options.gate_threshold)):
            return None
        open_R = ~self.closed(weight_R)
        order = open_R.nonzero().squeeze(1)
        count = len(order)
        if count == len(open_R):
            return None
        # open rows from below fill the gaps above: as few copies as there are gaps
        gaps = (~open_R[:count]).nonzero().squeeze(1)
        movers = order[order >= count]
        for into, source in zip(gaps.split(_MOVED_ROWS), movers.split(_MOVED_ROWS), strict=True):
            logits_RV[into] = logits_RV[source]
        taken = torch.arange(count, device=order.device)
        taken[gaps] = movers
        return taken

    def closed(self, weight: Tensor) -> Tensor:
        """Rows that take no part in the gradient. A gate may be negative; one that is NaN must be seen."""
        return (weight == 0) | (weight.abs() < self.options.gate_threshold)

    def row_gradients(self) -> Gradients:
        options = self.options
        # what an untold number of closed rows would leave is not known yet: the tiles decide
        pieces = self.tiles if options.tail_threshold is None else math.ceil(self.rows.count / ROWS_A_SUM)
        rounded = self.weight_dtype != self.head_VH.dtype
        dtype = torch.float32 if rounded else sum_dtype(self.head_VH.dtype, pieces)
        common = (self.hidden_NH, self.head_VH, self.needed, options.backend, dtype)
        if options.tail_threshold is None:
            return Gradients(*common)
        return TailSparseGradients(*common, options.tail_threshold, options.transform.softcap is None)

    def token_stats(self, seen: list[TileStats], tile: slice) -> TokenStats:
        whole = TileStats.concatenate(seen)
        return TokenStats(
            nll=whole.nll,
            entropy=whole.entropy,
            topk_entropy=whole.topk_entropy,
            correct=whole.correct,
            vocab_size=self.vocab,
            sequence=None if self.rows.sequence is None else self.rows.sequence[tile],
        )

    def result(self, seen: list[TileStats], weight_T: Tensor, gradients) -> Result:
        stats = self.token_stats(seen, slice(0, self.rows.count))
        # a row the gate has closed stays out even if its label is impossible (0 * inf)
        loss = torch.where(weight_T == 0, 0, weight_T * stats.nll).sum()
        return Result(loss, gradients, stats, weight_T, self.closed(weight_T), self.options.backend)


def _slices(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size`; one empty slice for nothing."""
    return (slice(start, min(start + size, count)) for start in range(0, max(count, 1), size))
