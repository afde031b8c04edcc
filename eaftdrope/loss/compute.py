"""The loss sum and its gradients from the hidden states, one tile of logits at a time.

Because the gate is detached and (for most gates) local to its row, a single pass suffices: a tile of logits yields the
statistics of its rows, their gate, their loss and their gradient. That is three GEMMs, and the N x V logits never exist.
A gate that compares tokens with each other needs the statistics of all rows first, and the gradient is formed in a second
pass, slice by slice of the vocabulary: one more GEMM over the rows it leaves open, but no float32 sum of weight gradients.
`recompute` requests that order under any gate.

With an anchor, the rows are also projected by the base model's head, into a second tile: one more GEMM. The gate does not
weight the anchor, so a row whose gate is closed still has a gradient.

Rows whose label is ignored never reach a GEMM; without an anchor, rows whose gate is closed never reach one of the gradient.

With a shard (`vocabulary.py`) the head is one rank's part of the vocabulary, and so are the columns of a tile.

Legend: N rows (tokens), T trained rows, O open rows among them, R rows of a tile, D hidden size, V vocabulary, C columns
of a slice of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import Backend, select_backend
from .backends.tile import BaseTile, LogitsTransform, TileStats
from .base_logits import BaseLogits
from .buffers import tile_buffer
from .definition import evaluate_gate
from .gradients import ColumnGradients, Gradients, NeedsGrad, ThreeGradients, sum_dtype
from .products import multiply_into
from .rows import TrainedRows, trained_rows
from .settings import LossSettings
from .statistics import TokenStats
from .tail import ROWS_PER_SUM, TailSparseGradients
from .vocabulary import VocabularyShard

# Bytes of one tile of logits. 160 MiB holds 552 bfloat16 rows of a 151,936-token vocabulary: enough rows for a GEMM to
# run at full speed on a CPU. Other devices need more rows to be filled.
_TILE_BYTES = {"cpu": 160 << 20}
_TILE_BYTES_DEVICE = 512 << 20

# And at least 512 bfloat16 rows, or 256 in float32: every tile reads and writes the whole weight gradient, which with
# fewer rows takes as long as the GEMM itself (a vocabulary of 262,144 at 256 rows: 1.3 times the cost of 512).
_TILE_BYTES_PER_TOKEN = 1024

# Fewest columns of a slice of the vocabulary, so that its GEMM is not too narrow, however many rows there are.
_SLICE_COLUMNS = 256

# Rows of a tile that are moved at a time, each copied once.
_MOVED_ROWS = 8


def default_tile_bytes(tile_bytes: int | None, device: torch.device, vocab_size: int) -> int:
    """Return the bytes of one tile: `tile_bytes`, or where it is None what suits the device and the vocabulary."""
    if tile_bytes is not None:
        return tile_bytes
    return max(_TILE_BYTES.get(device.type, _TILE_BYTES_DEVICE), _TILE_BYTES_PER_TOKEN * vocab_size)


@dataclass(frozen=True)
class LossResult:
    """The result of one call of the operator.

    Args:
        loss (`Tensor` `[]`): sum of w_t nll_t, and of the anchor.
        gradients: of the sum with respect to hidden, weight and bias; None where not needed.
        stats ([`TokenStats`]), weight (`Tensor` `[T]`), closed (`Tensor` `[T]` bool): of the T trained rows.
        divergence (`Tensor` `[T]` or `None`): the anchor's divergence of these rows; None without an anchor.
        rows ([`TrainedRows`]): which rows these are.
        backend ([`Backend`]): the backend that was used.
    """

    loss: Tensor
    gradients: ThreeGradients
    stats: TokenStats
    weight: Tensor
    closed: Tensor
    divergence: Tensor | None
    rows: TrainedRows
    backend: Backend


@torch.no_grad()
def compute_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    sequence_N: Tensor | None,
    token_weight_N: Tensor | None,
    settings: LossSettings,
    transform: LogitsTransform,
    ignore_index: int,
    needs_grad: NeedsGrad,
    base: BaseLogits | None = None,
    shard: VocabularyShard | None = None,
) -> LossResult:
    """Compute the loss sum, its gradients and the per-token statistics.

    Computes in the dtype of `hidden_ND`; a wider head is rounded to it, and its gradient is then float32. `base` has one
    hidden state `[N, D']` of that dtype per row, and belongs to `settings.anchor`. With a `shard` every head is its part.
    """
    vocab = weight_VD.shape[0] if shard is None else shard.vocab
    rows = trained_rows(labels_N, sequence_N, token_weight_N, ignore_index, vocab)
    if shard is not None:
        shard.check_rows(rows)
    if rows.is_static and not settings.gate.row_local:
        raise RuntimeError(
            f"the gate {settings.gate.formula} compares tokens with each other and cannot be captured in a CUDA graph, where "
            "ignored rows cannot be left out. Use a gate that weights each token separately, such as eaft."
        )
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return LossPass(hidden_ND, weight_VD, bias_V, rows, settings, transform, needs_grad, base, shard).run()


@dataclass(frozen=True)
class _Tile:
    """One tile: its rows among the T, their indices among the N, hidden states `[R, D]`, raw logits `[R, V]`, and the base
    model's. The memory of the logits is used again for the next tile."""

    at: Tensor | slice
    indices: Tensor | slice
    hidden: Tensor
    logits: Tensor
    base: BaseTile | None


class LossPass:
    """One call of the operator. One tile of logits is held at a time."""

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        rows: TrainedRows,
        settings: LossSettings,
        transform: LogitsTransform,
        needs_grad: NeedsGrad,
        base: BaseLogits | None,
        shard: VocabularyShard | None,
    ):
        self.hidden_ND, self.rows, self.settings, self.transform = hidden_ND, rows, settings, transform
        self.needs_grad = needs_grad
        self.anchor, self.base, self.shard = settings.anchor, base, shard
        self.backend = select_backend(
            settings.backend, hidden_ND.device, hidden_ND.dtype, anchored=self.anchor is not None
        )
        self.head_VD = weight_VD.to(hidden_ND.dtype)
        self.bias_V = None if bias_V is None else bias_V.to(hidden_ND.dtype)
        if base is not None:
            # one head for both, where adapters leave the model's own as it was
            shared = base.weight.is_set_to(weight_VD)
            self.base_VD = self.head_VD if shared else base.weight.to(hidden_ND.dtype)
            self.base_bias_V = None if base.bias is None else base.bias.to(hidden_ND.dtype)
        self.columns = widest = self.vocab = weight_VD.shape[0]
        self.labels_T = rows.labels
        if shard is not None:
            # the same tiles on every rank
            self.vocab, widest = shard.vocab, max(shard.sizes)
            self.labels_T = rows.labels - shard.start
        self.weight_dtype = weight_VD.dtype
        tile_bytes = default_tile_bytes(settings.tile_bytes, hidden_ND.device, widest)
        most = max(1, tile_bytes // (widest * self.head_VD.element_size()))
        # tiles of equal size: the last one is as efficient for a GEMM as the others
        self.tile_rows = max(1, math.ceil(rows.count / max(1, math.ceil(rows.count / most))))
        self.tiles = max(1, math.ceil(rows.count / self.tile_rows))

    def run(self) -> LossResult:
        # True if the gate can be computed from one tile only
        single = self.settings.gate.row_local or self.tiles == 1
        return self.single_pass() if single and not self.recomputes else self.two_passes()

    @property
    def recomputes(self) -> bool:
        """True if the settings request a second pass for the gradient."""
        return self.settings.recompute and any(self.needs_grad)

    def single_pass(self) -> LossResult:
        """Statistics, gate and gradient of each tile in turn."""
        gradients = self.row_gradients()
        tile_stats, weights = [], []
        for tile in self.projected(slice(0, self.rows.count)):
            stats = self.tile_statistics(tile)
            weight_R = self.gate([stats], tile.at)
            tile_stats.append(stats)
            weights.append(weight_R)
            if any(self.needs_grad):
                self.add_tile(gradients, tile, stats, weight_R)
        return self.result(tile_stats, torch.cat(weights), gradients.finish())

    def two_passes(self) -> LossResult:
        """Statistics of all rows, the gate, then the gradient of the rows that it leaves open (with an anchor, of all)."""
        every_row = slice(0, self.rows.count)
        tile_stats = [self.tile_statistics(tile) for tile in self.projected(every_row)]
        weight_T = self.gate(tile_stats, every_row)
        gradients: ThreeGradients = (None, None, None)
        if any(self.needs_grad):
            open_O = self.open_of_all(weight_T)
            stats_T, open_weight_T = TileStats.concatenate(tile_stats), torch.where(self.closed(weight_T), 0, weight_T)
            # a sparse tail chooses its columns for few rows at a time, so it needs tiles of rows again
            by_rows = self.settings.dropped_below is not None
            recompute = self.recompute_by_rows if by_rows else self.recompute_by_columns
            gradients = recompute(open_O, stats_T, open_weight_T)
        return self.result(tile_stats, weight_T, gradients)

    def recompute_by_rows(self, open_O: Tensor, stats_T: TileStats, weight_T: Tensor) -> ThreeGradients:
        """Gradients of the open rows, projected once more tile by tile."""
        gradients = self.row_gradients()
        for tile in self.projected(open_O):
            self.add_tile(gradients, tile, stats_T.rows(tile.at), weight_T[tile.at])
        return gradients.finish()

    def recompute_by_columns(self, open_O: Tensor, stats_T: TileStats, weight_T: Tensor) -> ThreeGradients:
        """Gradients of the open rows, slice by slice of the vocabulary."""
        indices_O = self.rows.indices(open_O)
        assert isinstance(indices_O, Tensor)
        hidden_OD, labels_O = self.hidden_ND[indices_O], self.labels_T[open_O]
        stats_O, weight_O = stats_T.rows(open_O), weight_T[open_O]
        gradients = ColumnGradients(self.hidden_ND, self.head_VD, self.needs_grad, indices_O, self.weight_dtype)
        count = len(open_O)
        # as large as a tile of the first pass, whose memory is then used again
        fit = self.tile_rows * self.columns // max(1, count)
        width = min(self.columns, max(_SLICE_COLUMNS, fit))
        for columns in _slices(self.columns, width):
            # requested for each slice: the last one is narrower, and its rows must be contiguous too
            with tile_buffer(self.tiles_at_once * count, columns.stop - columns.start, self.head_VD) as buffer:
                logits_OC = buffer[:count]
                self.project(hidden_OD, columns, logits_OC)
                base = self.project_base(indices_O, columns, buffer[count:])
                self.tile_gradient_(logits_OC, labels_O - columns.start, stats_O, weight_O, base, open_O)
                gradients.add(columns, hidden_OD, logits_OC)
        return gradients.finish()

    @property
    def tiles_at_once(self) -> int:
        """Tiles held at a time: the model's, and the base model's."""
        return 1 if self.anchor is None else 2

    def projected(self, rows: Tensor | slice) -> Iterator[_Tile]:
        """Iterate over tiles of some of the T rows."""
        count = len(rows) if isinstance(rows, Tensor) else rows.stop
        with tile_buffer(self.tiles_at_once * self.tile_rows, self.columns, self.head_VD) as buffer:
            for tile in _slices(count, self.tile_rows):
                at = rows[tile] if isinstance(rows, Tensor) else tile
                indices = self.rows.indices(at)
                hidden_RD = self.hidden_ND[indices]
                logits_RV = buffer[: hidden_RD.shape[0]]
                self.project(hidden_RD, slice(None), logits_RV)
                base = self.project_base(indices, slice(None), buffer[self.tile_rows :])
                yield _Tile(at, indices, hidden_RD, logits_RV, base)

    def project(self, hidden_RD: Tensor, columns: slice, out_RC: Tensor) -> None:
        """Write the raw logits of some columns of the vocabulary into `out_RC`."""
        bias_C = None if self.bias_V is None else self.bias_V[columns]
        multiply_into(out_RC, hidden_RD, self.head_VD[columns].t(), bias_C=bias_C)

    def project_base(self, indices: Tensor | slice, columns: slice, buffer: Tensor) -> BaseTile | None:
        """Project the base model's hidden states of some of the N rows into the first rows of `buffer`; None without one."""
        if self.anchor is None or self.base is None:
            return None
        hidden_RD = self.base.hidden[indices]
        out_RC = buffer[: len(hidden_RD)]
        bias_C = None if self.base_bias_V is None else self.base_bias_V[columns]
        multiply_into(out_RC, hidden_RD, self.base_VD[columns].t(), bias_C=bias_C)
        return BaseTile(out_RC, self.base.transform, self.anchor.direction == "forward", self.anchor.mask_target)

    def tile_statistics(self, tile: _Tile) -> TileStats:
        arguments = (tile.logits, self.labels_T[tile.at], self.transform, self.settings.gate.topk)
        if self.shard is not None:
            return self.shard.tile_statistics(self.backend, *arguments, tile.base)
        if tile.base is None:
            return self.backend.tile_statistics(*arguments)
        return self.backend.anchored_statistics(*arguments, tile.base)

    def tile_gradient_(
        self,
        logits_RC: Tensor,
        labels_R: Tensor,
        stats: TileStats,
        weight_R: Tensor,
        base: BaseTile | None,
        at: Tensor | slice,
    ) -> None:
        """Overwrite a tile, or a slice of one, with its gradient; `at` are its rows among the T."""
        if self.anchor is None or base is None:
            self.backend.tile_gradient_(logits_RC, labels_R, stats, weight_R, self.transform)
            return
        anchor_R = self.rows.mask(torch.full_like(weight_R, self.anchor.kl), at)
        self.backend.anchored_gradient_(logits_RC, labels_R, stats, weight_R, self.transform, base, anchor_R)

    def gate(self, tile_stats: list[TileStats], rows: Tensor | slice) -> Tensor:
        """Weights of some of the T rows, 0 where a row is not trained."""
        return self.rows.weigh(evaluate_gate(self.settings.gate, self.token_stats(tile_stats, rows)), rows)

    def add_tile(self, gradients: Gradients, tile: _Tile, stats: TileStats, weight_R: Tensor) -> None:
        """Form the gradient of a tile whose gate is computed, and add it; rows without one are left out."""
        logits_RV, hidden_RD, indices, labels_R = tile.logits, tile.hidden, tile.indices, self.labels_T[tile.at]
        order_R = self.open_rows(weight_R, logits_RV)
        if order_R is not None:
            logits_RV, hidden_RD = logits_RV[: len(order_R)], hidden_RD[order_R]
            labels_R, stats, weight_R = labels_R[order_R], stats.rows(order_R), weight_R[order_R]
            indices = order_R + indices.start if isinstance(indices, slice) else indices[order_R]
        elif self.settings.gate_threshold:
            weight_R = torch.where(self.closed(weight_R), 0, weight_R)
        if len(logits_RV):
            self.tile_gradient_(logits_RV, labels_R, stats, weight_R, tile.base, tile.at)
            gradients.add(indices, hidden_RD, logits_RV)

    def open_of_all(self, weight_T: Tensor) -> Tensor:
        """Indices of the rows among the T that have a gradient; all of them where the host cannot wait for the device."""
        if self.rows.is_static or self.anchor is not None:
            return torch.arange(self.rows.count, device=weight_T.device)
        return (~self.closed(weight_T)).nonzero().squeeze(1)

    def open_rows(self, weight_R: Tensor, logits_RV: Tensor) -> Tensor | None:
        """Move the open rows of a tile to its top and return their indices, or None if no row is to be left out: with an
        anchor every row has a gradient.

        On a device this waits for the gate, so it is done only where the gate can close a row.
        """
        waits = logits_RV.device.type != "cpu"
        if (
            self.rows.is_static
            or self.anchor is not None
            or (waits and not (self.settings.gate.closes or self.settings.gate_threshold))
        ):
            return None
        open_R = ~self.closed(weight_R)
        order = open_R.nonzero().squeeze(1)
        count = len(order)
        if count == len(open_R):
            return None
        # open rows from the end fill the gaps at the top: as few copies as there are gaps
        gaps = (~open_R[:count]).nonzero().squeeze(1)
        movers = order[order >= count]
        for into, source in zip(gaps.split(_MOVED_ROWS), movers.split(_MOVED_ROWS), strict=True):
            logits_RV[into] = logits_RV[source]
        kept = torch.arange(count, device=order.device)
        kept[gaps] = movers
        return kept

    def closed(self, weight: Tensor) -> Tensor:
        """Mask of the rows whose cross-entropy takes no part in the gradient. Gates may be negative; a NaN is not closed, so
        it shows."""
        return (weight == 0) | (weight.abs() < self.settings.gate_threshold)

    def row_gradients(self) -> Gradients:
        dropped_below = self.settings.dropped_below
        # an upper bound: how many rows the gate closes is not known yet
        pieces = self.tiles if dropped_below is None else math.ceil(self.rows.count / ROWS_PER_SUM)
        rounded = self.weight_dtype != self.head_VD.dtype
        dtype = torch.float32 if rounded else sum_dtype(self.head_VD.dtype, pieces)
        common = (self.hidden_ND, self.head_VD, self.needs_grad, self.backend, dtype)
        if dropped_below is None:
            return Gradients(*common)
        sums_to_zero = self.transform.softcap is None and self.shard is None
        return TailSparseGradients(*common, dropped_below, sums_to_zero)

    def token_stats(self, tile_stats: list[TileStats], rows: Tensor | slice) -> TokenStats:
        whole = TileStats.concatenate(tile_stats)
        return TokenStats(
            nll=whole.nll,
            entropy=whole.entropy,
            topk_entropy=whole.topk_entropy,
            correct=whole.correct,
            vocab_size=self.vocab,
            sequence=None if self.rows.sequence is None else self.rows.sequence[rows],
        )

    def result(self, tile_stats: list[TileStats], weight_T: Tensor, gradients: ThreeGradients) -> LossResult:
        if self.shard is not None and gradients[0] is not None:
            self.shard.add_parts_(gradients[0], self.rows)
        stats = self.token_stats(tile_stats, slice(0, self.rows.count))
        # a row whose gate is closed stays out even if its label is impossible (0 * inf)
        loss = torch.where(weight_T == 0, 0, weight_T * stats.nll).sum()
        divergence_T = None
        if self.anchor is not None:
            every_row = slice(0, self.rows.count)
            parts = [part.anchor.divergence for part in tile_stats if part.anchor is not None]
            divergence_T = self.rows.mask(torch.cat(parts), every_row)
            loss = loss + self.anchor.kl * divergence_T.sum()
        closed_T = self.closed(weight_T)
        return LossResult(loss, gradients, stats, weight_T, closed_T, divergence_T, self.rows, self.backend)


def _slices(count: int, size: int) -> Iterator[slice]:
    """Iterate over slices of at most `size`; one empty slice for a count of 0."""
    return (slice(start, min(start + size, count)) for start in range(0, max(count, 1), size))
