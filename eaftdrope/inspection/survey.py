"""The pass over all rows: windows of rows are read, measured in batches of similar length, and dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from eaftdrope.evaluate.likelihood import Progress, TokenRow, batches
from eaftdrope.loss.gates import Gate

from .tally import Tally
from .text import copy_key
from .tokens import measure_tokens
from .worst import RowFigures, WorstConflicts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Rows that are in memory at once, and batched among themselves.
_WINDOW = 512


class Survey:
    """The statistics of some rows.

    Args:
        rows (`Dataset`): columns `input_ids`, `labels` (not shifted, at least one trained token per row), `origin` and
            `source` (an index).
        sources (`list[str]`): the names of the sources.
        conflicts (`int`): number of the worst conflicts that are kept.
    """

    def __init__(self, rows: Dataset, sources: list[str], *, conflicts: int) -> None:
        self.rows = rows
        self.tally = Tally(sources)
        self.conflicts = WorstConflicts(conflicts)
        self.figures = RowFigures(len(rows))

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        gate: Gate,
        *,
        batch_tokens: int,
        backend: str = "auto",
        tile_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> Survey:
        """Measure every row with a model in evaluation mode; `progress(done, total)` counts rows.

        `backend` and `tile_bytes` as in [`measure_tokens`].
        """
        done = 0
        for numbers, rows, sources in self._batches(batch_tokens):
            tokens = measure_tokens(model, rows, gate, backend=backend, tile_bytes=tile_bytes)
            self.tally.add(tokens, sources)
            self.conflicts.add(tokens, numbers)
            self.figures.add(tokens, numbers, [copy_key(row, tokenizer) for row in rows])
            done += len(rows)
            if progress is not None:
                progress(done, len(self.rows))
        return self

    def row(self, number: int) -> tuple[TokenRow, str, int]:
        """Return a row, its origin, and the index of its source."""
        found = self.rows[int(number)]
        return TokenRow(found["input_ids"], found["labels"]), found["origin"], found["source"]

    def _batches(self, batch_tokens: int) -> Iterator[tuple[list[int], list[TokenRow], list[int]]]:
        for start in range(0, len(self.rows), _WINDOW):
            window = self.rows[start : start + _WINDOW]
            for batch in batches([len(ids) for ids in window["input_ids"]], batch_tokens):
                rows = [TokenRow(window["input_ids"][i], window["labels"][i]) for i in batch]
                yield [start + i for i in batch], rows, [window["source"][i] for i in batch]
