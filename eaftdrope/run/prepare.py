"""Everything of a run that needs no weights, read and checked before any stage begins; what it finds goes on the screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eaftdrope.recipe.schema import Recipe

from .build import RunData, build_data, build_run_probes, check_backend, check_vocabulary
from .machine import uses_bfloat16
from .plan import make_plan, plan_table, plan_text
from .recovery import RecoveryProbe, recovery_probe
from .stages.chain import Stage, training_recipe, with_steps
from .stages.drope import planned_config

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from eaftdrope.evaluate import Probe


@dataclass(frozen=True)
class Prepared:
    """What a training stage needs beside its model. `recipe` is the stage's (see `training_recipe`, `with_steps`)."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    probes: list[Probe]
    recovery: RecoveryProbe | None


def prepare(stage: Stage, console: Console) -> Prepared:
    """Tokenizer, data and probes, with the plan and what the data's audit found on the screen. Where the model does not
    exist yet, those of the model it will be made from.

    Raises:
        UserError: whatever would stop the stage before its weights are read.
    """
    from eaftdrope.models import load_config, load_tokenizer, needs_dequantising

    recipe = training_recipe(stage)
    check_backend(recipe)
    readable = stage.readable_model
    if needs_dequantising(readable):
        console.print("dequantising the model once, about half a minute ...", highlight=False)
    how = {"revision": stage.revision(readable), "trust_remote_code": recipe.model.trust_remote_code}
    tokenizer = load_tokenizer(readable, **how)
    config = load_config(readable, **how)
    recipe = with_steps(recipe, config)
    data = build_data(recipe, tokenizer)
    check_vocabulary(data, tokenizer, config)
    probes = build_run_probes(recipe, data)
    recovery = recovery_probe(stage, recipe, config, data, tokenizer) if stage.name == "recalibrate" else None
    if stage.heading:
        console.print(f"\n{stage.heading}", highlight=False, markup=False)
    _print_plan(recipe, planned_config(stage, config), data, console)
    print_audit(data, console)
    return Prepared(recipe, tokenizer, data, probes, recovery)


def _print_plan(recipe: Recipe, config: PretrainedConfig, data: RunData, console: Console) -> None:
    plan = make_plan(recipe, config, data.stats, autocast=uses_bfloat16(recipe), longest=data.longest)
    console.print()
    if console.is_terminal:
        console.print(plan_table(plan))
    else:
        console.print(plan_text(plan), highlight=False, markup=False, soft_wrap=True)
    console.print()


def print_audit(data: RunData, console: Console) -> None:
    """What may go wrong with the data, and the rows that were left out."""
    from rich.text import Text

    report = data.report
    for warning in report.warnings:
        console.print(Text.assemble(("warning", "yellow"), f" {warning}"), soft_wrap=True)
    for origin, reason in report.skipped[:5]:
        console.print(f"skipped {origin}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if report.skipped_rows > 5:
        console.print(f"... and {report.skipped_rows - 5} more rows skipped", highlight=False)
