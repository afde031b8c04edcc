"""`eaftdrope validate`: every problem of a recipe at once, or ok and what it will do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eaftdrope.recipe import Recipe, load_recipe


def validate(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, such as train.steps=10.", show_default=False)
    ] = None,
) -> None:
    """Check a recipe in a second, without loading anything: unknown keys, wrong types, missing files, combinations
    that cannot work. Prints ok and a summary, or every problem with its line (exit code 2)."""
    typer.echo(f"ok  {recipe}\n{summary(load_recipe(recipe, overrides or []))}")


def summary(recipe: Recipe) -> str:
    """The recipe in a few lines of plain text."""
    data, train, lora = recipe.data, recipe.train, recipe.lora
    options = ", ".join(f"{name} {value}" for name, value in recipe.loss.gate_kwargs().items())
    length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
    if data.held_out_share:
        held_out = f"{data.held_out_share:.0%} of train"
    else:
        held_out = ", ".join(source.path for source in data.held_out or []) or "nothing"
    probes = [probe.name for probe in (*recipe.probes.target, *recipe.probes.general)]
    lines = {
        "model": recipe.model.reference,
        "method": f"LoRA r {lora.r}, alpha {lora.alpha:g}" if lora else "full fine-tune",
        "train": f"{', '.join(source.path for source in data.train)} (loss on {data.train_on}, "
        f"at most {data.max_length} tokens a row)",
        "held out": held_out,
        "loss": f"gate {recipe.loss.gate}" + (f" ({options})" if options else ""),
        "length": f"{length} of {train.batch_size * train.accumulation} rows a device, "
        f"learning rate {train.learning_rate:g}, {train.scheduler}",
        "probes": ", ".join(probes) or "none",
        "output": recipe.output.dir,
    }
    return "\n".join(f"  {name:9} {text}" for name, text in lines.items())
