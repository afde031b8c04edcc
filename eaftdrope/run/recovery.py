"""The recovery of a recalibration: the text it is measured on, the original model, and what is shown in the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

from .build import RunData, build_model
from .folder import RunFolder
from .machine import training_device, uses_bfloat16
from .stages.chain import Stage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import nn
    from transformers import PretrainedConfig

    from eaftdrope.evaluate.likelihood import TokenRow
    from eaftdrope.recipe.schema import Recipe
    from eaftdrope.trainer.callbacks.recovery import RecoveryCallback, RecoveryCurve

RECOVERY_FILE = "recovery.json"
_ROWS_SHOWN = 12


@dataclass(frozen=True)
class RecoveryProbe:
    """What a recalibration stage measures: the mean nats a token on fixed blocks of text, in the arithmetic of the
    training."""

    stage: Stage
    recipe: Recipe
    original: str
    rows: list[TokenRow]

    @property
    def tokens(self) -> int:
        """Tokens that count: all but the first of each block."""
        return sum(label != -100 for row in self.rows for label in row.labels[1:])

    def nll(self, model: nn.Module) -> float:
        import torch

        from eaftdrope.evaluate.likelihood import rows_nll
        from eaftdrope.loaded_model import evaluating

        batch_tokens = max(self.recipe.data.max_length, self.recipe.probes.batch_tokens)
        device = next(model.parameters()).device.type
        with evaluating(model), torch.autocast(device, torch.bfloat16, enabled=uses_bfloat16(self.recipe)):
            units = rows_nll(model, self.rows, batch_tokens=batch_tokens)
        return math.fsum(nll for nll, _ in units) / math.fsum(count for _, count in units)

    def begin(self, console: Console) -> RecoveryCurve:
        """The curve of an earlier start, or a new one: then the original model is loaded, measured and let go. For the
        main process, before anything else is loaded; the caller writes it once the folder is the run's.

        Raises:
            UserError: the original cannot be loaded, or it is not known what it was; the curve of a training that is to
                be resumed is damaged.
        """
        from eaftdrope.trainer.callbacks.recovery import RecoveryCurve

        folder = self.stage.folder
        curve = _kept_curve(folder)
        resumed = folder.resume_point().checkpoint
        if curve is not None and (curve.points or not resumed):
            return curve
        if resumed:
            raise UserError(
                f"{folder.path / RECOVERY_FILE} is damaged or missing, and what was measured before {resumed.name} cannot be "
                "measured again. Put back a copy and run the same command again, or pass --overwrite to delete the run "
                "and start from scratch."
            )
        console.print(f"measuring the original model, {self.original} ...", highlight=False, markup=False)
        model = self.recipe.model.model_copy(
            update={"reference": self.original, "revision": self.stage.revision(self.original)}
        )
        original = build_model(self.recipe.model_copy(update={"model": model}))
        nll = self.nll(original.to(training_device().kind))
        console.print(f"its perplexity is {math.exp(nll):.2f}, on {self.tokens:,} tokens", highlight=False)
        return RecoveryCurve(nll, self.tokens, self.recipe.recalibrate.recovery.stop_at)

    def note_in(self, config: PretrainedConfig) -> None:
        """Says in the record of a converted model that, and how far, it was recalibrated."""
        record = getattr(config, "drope", None)
        if record:
            curve = read_curve(self.stage.folder)
            last = curve.points[-1]
            recalibrated = {
                "tokens": last.tokens,
                "block_length": self.recipe.data.max_length,
                "recovery": round(curve.recovery(last.nll), 4),
            }
            config.drope = {**record, "recalibrated": recalibrated}

    def callback(self) -> RecoveryCallback:
        """The callback that goes on with the folder's curve."""
        from eaftdrope.trainer.callbacks.recovery import RecoveryCallback

        folder, every = self.stage.folder, self.recipe.recalibrate.recovery.every
        return RecoveryCallback(folder.path / RECOVERY_FILE, read_curve(folder), self.nll, every)


def recovery_probe(stage: Stage, recipe: Recipe, config: PretrainedConfig, data: RunData, tokenizer) -> RecoveryProbe:
    """The probe of a recalibration: on the recipe's files, else on its held-out blocks, else on the text shipped here.

    Raises:
        UserError: a file that cannot be used, or without text; it is not known which model was the original.
    """
    from eaftdrope.evaluate.likelihood import TokenRow
    from eaftdrope.evaluate.probes.perplexity import PerplexityProbe
    from eaftdrope.evaluate.texts import evenly_spaced, read_texts, shipped_text

    original = original_of(stage, recipe, config)
    settings, length = recipe.recalibrate.recovery, recipe.data.max_length
    blocks = max(1, settings.max_tokens // length)
    if settings.files is None and data.held_out is not None:
        rows = [TokenRow(block["input_ids"], block["labels"]) for block in evenly_spaced(data.held_out, blocks)]
        return RecoveryProbe(stage, recipe, original, rows)
    if settings.files is None:
        texts = [shipped_text()]
    else:
        texts = [text for file in settings.files for text in read_texts(Path(file), "recalibrate.recovery")]
    rows = PerplexityProbe(texts, max_tokens=blocks * length, window=length).windows(tokenizer)
    return RecoveryProbe(stage, recipe, original, rows)


def original_of(stage: Stage, recipe: Recipe, config: PretrainedConfig) -> str:
    """Reference of the model before its rotary embeddings were dropped.

    Raises:
        UserError: it was not dropped by this recipe, and the recipe does not say.
    """
    if recipe.recalibrate.recovery.original is not None:
        return recipe.recalibrate.recovery.original
    if stage.before is None and getattr(config, "drope", None):
        raise UserError(
            f"{stage.model} has no rotary embedding, and its recovery is measured against the model that had one. Name "
            "that model in recalibrate.recovery.original."
        )
    return stage.record.model.reference


def read_curve(folder: RunFolder) -> RecoveryCurve:
    """The curve of a run, with what was measured until now.

    Raises:
        UserError: it is damaged or missing.
    """
    curve = _kept_curve(folder)
    if curve is None:
        raise UserError(
            f"{folder.path / RECOVERY_FILE} is damaged or missing. Put back a copy and run the same command again."
        )
    return curve


def _kept_curve(folder: RunFolder) -> RecoveryCurve | None:
    """The curve in a folder; None where there is none that can be read."""
    from eaftdrope.trainer.callbacks.recovery import RecoveryCurve

    try:
        return RecoveryCurve.from_json(folder.kept(RECOVERY_FILE) or "")
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
    """The curve in the end: a table on the screen, a figure in the folder."""
    from eaftdrope.report.figures.recovery import draw_recovery

    curve = read_curve(folder)
    points = [(point.tokens, point.nll) for point in curve.points]
    draw_recovery(folder.path / "recovery.png", original=curve.original, points=points, tokens=curve.measured)
    console.print()
    console.print(recovery_table(curve))


def recovery_table(curve: RecoveryCurve) -> Table:
    """The curve as a rich table: the original, the first measurement, the last, and some between."""
    from rich.table import Table

    from eaftdrope.evaluate.texts import evenly_spaced

    table = Table(title="Recovery", title_justify="left")
    for column in ("step", "tokens", "perplexity", "recovery"):
        table.add_column(column, justify="right")
    table.add_row("original", "", f"{math.exp(curve.original):.2f}", "")
    points = [*evenly_spaced(curve.points[:-1], _ROWS_SHOWN - 1), curve.points[-1]]
    for point in points:
        perplexity, recovery = f"{math.exp(point.nll):.2f}", f"{curve.recovery(point.nll):.3f}"
        table.add_row(str(point.step), f"{point.tokens:,}", perplexity, recovery)
    return table
