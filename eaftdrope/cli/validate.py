"""`eaftdrope validate`: every problem of a recipe at once, or ok and a summary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eaftdrope.errors import UserError, printable
from eaftdrope.recipe import Recipe, load_recipe
from eaftdrope.recipe.data_section import DataSource, Rows
from eaftdrope.recipe.probe_sections import Probes
from eaftdrope.recipe.stage_sections import Drope, Pretrain, Recalibrate
from eaftdrope.recipe.training_sections import AnchoredLoss, Loss, Train
from eaftdrope.recipe.ttt_section import MetaTraining

from .terminal import echo


def validate(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of its keys, such as train.steps=10.", show_default=False)
    ] = None,
    data: Annotated[
        bool, typer.Option("--data", help="Also read the rows, and report fields that are read, unread or lost.")
    ] = False,
    scan: Annotated[int | None, typer.Option(min=1, help="With --data: rows of each source to read.")] = None,
) -> None:
    """Check a recipe in a second, without loading anything: unknown keys, wrong types, missing files, combinations
    that cannot work. Prints ok and a summary, or every problem with its line (exit code 2).

    With --data the rows are read, rendered and tokenised too, and audited: a table of the fields that were read and of
    those that were not, and every bad row's reason."""
    loaded = load_recipe(recipe, overrides or [])
    if scan is not None and not data:
        raise UserError("--scan limits the rows, which are only read with --data. Add --data, or leave --scan out.")
    checked = printable(f"ok  {recipe}\n{summary(loaded)}", lines=True)
    if not data:
        echo(checked)
        return
    if bad := _print_audit(loaded, recipe, scan):
        raise UserError(f"{recipe}: {bad:,} bad rows, and training stops at the first (on_bad_row: stop). See above.")
    echo(checked)


def _print_audit(loaded: Recipe, recipe: Path, scan: int | None) -> int:
    """Print the audit of the rows; return the number of bad rows that would stop a training."""
    from eaftdrope.data.preview import report_text

    from .preview import stage_heading, stage_previews

    bad = 0
    for stage, shown in stage_previews(loaded, recipe, rows=0, scan=scan, held_out=True):
        if loaded.stages:
            echo(stage_heading(stage, loaded))
        echo(report_text(shown).plain)
        bad += shown.report.skipped_rows if shown.on_bad_row == "stop" else 0
    return bad


def summary(recipe: Recipe) -> str:
    """The recipe in a few lines of plain text."""
    lines = [("model", recipe.model.reference)]
    if recipe.stages:
        lines.append(("stages", ", ".join(recipe.stages)))
    for stage in recipe.stages or ["eaft"]:
        if stage == "drope":
            lines.append(("drope", _drope(recipe.drope or Drope())))
        elif stage == "eaft":
            lines += _fine_tuning(recipe).items()
        else:
            # the lines of a training, set off where another one follows
            heading, training = {
                "pretrain": lambda: (_new_model(recipe.pretrain), _text_training(recipe.pretrain)),
                "recalibrate": lambda: ("", _text_training(recipe.recalibrate)),
                "ttt": lambda: (_reading(recipe.ttt), _meta_training(recipe.ttt)),
            }[stage]()
            lines += [(stage, heading), *((f" {name}", text) for name, text in training.items())]
    lines.append(("output", recipe.output.dir))
    width = max(9, *(len(name) for name, _ in lines))
    return "\n".join(f"  {name:{width}} {text}".rstrip() for name, text in lines)


def _drope(drope: Drope) -> str:
    parts = [f"layers {drope.layers}"]
    if drope.max_length:
        parts.append(f"context of {drope.max_length} tokens")
    if drope.temperature:
        parts.append(f"temperature {drope.temperature:g}")
    if drope.qk_norm:
        parts.append("QK-norm")
    return ", ".join(parts)


def _new_model(section: Pretrain) -> str:
    changed = ", ".join(f"{key} {value}" for key, value in section.config.items())
    vocabulary = f"a vocabulary of {section.vocabulary}" if section.vocabulary else "the model's tokenizer"
    return f"random weights, {f'{changed}, ' if changed else ''}{vocabulary}"


def _text_training(section: Pretrain | Recalibrate) -> dict[str, str]:
    data, train = section.data, section.train
    blocks = f"blocks of {data.max_length}" if data.max_length else "blocks of the trained context"
    share = section.recovery.stop_at if isinstance(section, Recalibrate) else None
    stop = f", stops at {share:g} of the original's perplexity" if share else ""
    length = f"{section.budget:,.0f} tokens" if section.budget else _length(train)
    return {
        "train": f"{_paths(data.train)} ({blocks}, documents {data.documents})",
        "held out": _held_out(data),
        "loss": _loss(section.loss),
        "length": f"{length}, {_pace(train)}{stop}",
        "probes": _probes(section.probes),
    }


def _reading(section: MetaTraining) -> str:
    window = "the model's own window" if section.window is None else f"a window of {section.window} tokens"
    sink = f" and the first {section.sink}" if section.window is not None and section.sink else ""
    blocks = (
        "the last quarter of the blocks" if section.fast_blocks is None else f"the last {section.fast_blocks} blocks"
    )
    return f"{window}{sink}, chunks of {section.chunk}, {blocks} learn at rate {section.lr:g} ({section.layout})"


def _meta_training(section: MetaTraining) -> dict[str, str]:
    data, lora, span = section.data.resolved(), section.lora, section.horizon
    what = "blocks of" if section.data.sequences == "blocks" else f"loss on {data.train_on}, at most"
    order = "first order" if span == 1 else f"a meta-gradient over {span} chunks"
    return {
        "method": f"{f'LoRA r {lora.r}, alpha {lora.alpha:g}' if lora else 'full fine-tune'}, {order}",
        "train": f"{_paths(data.train)} ({what} {data.max_length} tokens)",
        "held out": _held_out(data),
        "loss": _loss(section.loss),
        "length": f"{_length(section.train)} of {_pace(section.train)}",
        "probes": _probes(section.probes),
    }


def _fine_tuning(recipe: Recipe) -> dict[str, str]:
    data, lora = recipe.data, recipe.lora
    return {
        "method": f"LoRA r {lora.r}, alpha {lora.alpha:g}" if lora else "full fine-tune",
        "train": f"{_paths(data.train)} (loss on {data.train_on}, at most {data.max_length} tokens per row)",
        "held out": _held_out(data),
        "loss": _loss(recipe.loss),
        "length": f"{_length(recipe.train)} of {_pace(recipe.train)}",
        "probes": _probes(recipe.probes),
    }


def _paths(sources: list[DataSource]) -> str:
    return ", ".join(source.path for source in sources)


def _held_out(data: Rows) -> str:
    return (
        f"{100 * data.held_out_share:.3g}% of train"
        if data.held_out_share
        else _paths(data.held_out or []) or "nothing"
    )


def _loss(loss: Loss) -> str:
    options = ", ".join(f"{name} {value}" for name, value in loss.gate_kwargs().items())
    exempt = f", not on {', '.join(map(repr, loss.exempt))}" if loss.exempt else ""
    anchor = loss.anchor_of_loss if isinstance(loss, AnchoredLoss) else None
    kept = f", anchor {anchor.formula}" if anchor else ""
    return f"gate {loss.gate}" + (f" ({options})" if options else "") + exempt + kept


def _length(train: Train) -> str:
    return f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"


def _pace(train: Train) -> str:
    rows = train.batch_size * train.accumulation
    return f"{rows} rows per device, learning rate {train.learning_rate:g}, {train.scheduler}"


def _probes(probes: Probes) -> str:
    return ", ".join(probe.name for probe in (*probes.target, *probes.general)) or "none"
