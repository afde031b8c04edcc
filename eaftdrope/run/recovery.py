"""The recovery of a recalibration: the text it is measured on, the original model, and what is shown in the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from eaftdrope.errors import UserError
from eaftdrope.evaluate.likelihood import TokenRow, rows_nll
from eaftdrope.evaluate.probes.perplexity import PerplexityProbe
from eaftdrope.evaluate.texts import evenly_spaced, read_texts, shipped_text
from eaftdrope.loaded_model import evaluating
from eaftdrope.recipe.schema import Model
from eaftdrope.recipe.stage_sections import Recovery
from eaftdrope.report.figures.recovery import draw_recovery
from eaftdrope.trainer.callbacks.recovery import RecoveryCallback, RecoveryCurve

from .build import build_model
from .data import RunData
from .folder import RunFolder
from .machine import training_device
from .settings import TrainingSettings

RECOVERY_FILE = "recovery.json"
_ROWS_SHOWN = 12


@dataclass(frozen=True)
class RecoveryProbe:
    """The measure of a recalibration: mean nats per token on fixed blocks of text, in the arithmetic of the training.

    Args:
        original: the model before its rotary embeddings were dropped.
        rows: the blocks of text.
    """

    folder: RunFolder
    settings: TrainingSettings
    section: Recovery
    original: Model
    rows: list[TokenRow]

    @property
    def tokens(self) -> int:
        """Tokens that are scored: all but the first of each block."""
        return sum(label != -100 for row in self.rows for label in row.labels[1:])

    def nll(self, model: nn.Module) -> float:
        """Mean negative log-likelihood in nats per token."""
        batch_tokens = max(self.settings.max_length, self.settings.probes.batch_tokens)
        device = next(model.parameters()).device.type
        with evaluating(model), torch.autocast(device, torch.bfloat16, enabled=self.settings.autocast):
            # pyrefly: ignore[bad-argument-type]  # the Trainer passes its model as a plain module
            units = rows_nll(model, self.rows, batch_tokens=batch_tokens)
        return math.fsum(nll for nll, _ in units) / math.fsum(count for _, count in units)

    def begin(self, console: Console) -> RecoveryCurve:
        """The curve of an earlier start, or a new one, for which the original model is loaded, measured and freed.

        For the main process, before anything else is loaded; the caller writes the curve once the folder is the run's.

        Raises:
            UserError: the original cannot be loaded, or the curve of a training that is to be resumed is damaged.
        """
        curve = _stored_curve(self.folder)
        resumed = self.folder.resume_point().checkpoint
        if curve is not None and (curve.points or not resumed):
            return curve
        if resumed:
            raise UserError(
                f"{self.folder.path / RECOVERY_FILE} is damaged or missing, and the measurements before {resumed.name} "
                "cannot be repeated. Put back a copy and run the same command again, or pass --overwrite to delete the "
                "run and start from scratch."
            )
        console.print(
            f"measuring the original model, {self.original.reference} ...",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        original = build_model(self.original)
        # pyrefly: ignore[bad-argument-type]  # transformers wraps `to` in a way that hides its signature
        nll = self.nll(original.to(training_device().kind))
        console.print(f"its perplexity is {math.exp(nll):.2f}, on {self.tokens:,} tokens", highlight=False)
        return RecoveryCurve(nll, self.tokens, self.section.stop_at)

    def note_in(self, config: PretrainedConfig) -> None:
        """Add to the record of a converted model on how many tokens it was recalibrated, and how much was recovered."""
        record = getattr(config, "drope", None)
        if record:
            curve = read_curve(self.folder)
            last = curve.points[-1]
            recalibrated = {
                "tokens": last.tokens,
                "block_length": self.settings.max_length,
                "recovery": round(curve.recovery(last.nll), 4),
            }
            config.drope = {**record, "recalibrated": recalibrated}

    def callback(self) -> RecoveryCallback:
        """The callback that continues the curve in the folder."""
        return RecoveryCallback(self.folder.path / RECOVERY_FILE, read_curve(self.folder), self.nll, self.section.every)


def recovery_rows(
    section: Recovery, settings: TrainingSettings, data: RunData, tokenizer: PreTrainedTokenizerBase
) -> list[TokenRow]:
    """The text to measure on: the recipe's files, else its held-out blocks, else the text that eaftdrope ships.

    Raises:
        UserError: a file cannot be used, or has no text.
    """
    length = settings.max_length
    blocks = max(1, section.max_tokens // length)
    if section.files is None and data.held_out is not None:
        held_out = cast(Sequence[dict[str, list[int]]], data.held_out)
        return [TokenRow(block["input_ids"], block["labels"]) for block in evenly_spaced(held_out, blocks)]
    if section.files is None:
        texts = [shipped_text()]
    else:
        texts = [text for file in section.files for text in read_texts(Path(file), "recalibrate.recovery")]
    return PerplexityProbe(texts, max_tokens=blocks * length, window=length).windows(tokenizer)


def read_curve(folder: RunFolder) -> RecoveryCurve:
    """The curve of a run, as far as it was measured.

    Raises:
        UserError: it is damaged or missing.
    """
    curve = _stored_curve(folder)
    if curve is None:
        raise UserError(
            f"{folder.path / RECOVERY_FILE} is damaged or missing. Put back a copy and run the same command again."
        )
    return curve


def _stored_curve(folder: RunFolder) -> RecoveryCurve | None:
    """The curve in a folder; None if it is missing or cannot be read."""
    try:
        return RecoveryCurve.from_json(folder.stored(RECOVERY_FILE) or "")
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def recovery_markdown(curve: RecoveryCurve) -> str:
    """The section of the model card."""
    first, last = curve.points[0], curve.points[-1]
    return f"""\
## Recovery

| | perplexity of {curve.measured:,} tokens of text | share of the original's recovered |
|---|---:|---:|
| original, with its rotary embedding | {math.exp(curve.original):.2f} | |
| before recalibration | {math.exp(first.nll):.2f} | {curve.recovery(first.nll):.1%} |
| after {last.tokens:,} tokens | {math.exp(last.nll):.2f} | {curve.recovery(last.nll):.1%} |

![Perplexity over the tokens of the recalibration](recovery.png)"""


def show_recovery(folder: RunFolder, console: Console) -> None:
    """Print the curve as a table, and draw it in the folder."""
    curve = read_curve(folder)
    points = [(point.tokens, point.nll) for point in curve.points]
    draw_recovery(folder.path / "recovery.png", original=curve.original, points=points, tokens=curve.measured)
    console.print()
    console.print(recovery_table(curve))


def recovery_table(curve: RecoveryCurve) -> Table:
    """The curve as a rich table: the original, the first measurement, the last, and some in between."""
    table = Table(title="Recovery", title_justify="left")
    for column in ("step", "tokens", "perplexity", "recovery"):
        table.add_column(column, justify="right")
    table.add_row("original", "", f"{math.exp(curve.original):.2f}", "")
    points = [*evenly_spaced(curve.points[:-1], _ROWS_SHOWN - 1), curve.points[-1]]
    for point in points:
        perplexity, recovery = f"{math.exp(point.nll):.2f}", f"{curve.recovery(point.nll):.3f}"
        table.add_row(str(point.step), f"{point.tokens:,}", perplexity, recovery)
    return table
