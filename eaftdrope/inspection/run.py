"""`eaftdrope inspect`: from a recipe to statistics of its training rows under its model, before any training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eaftdrope.data import hold_out
from eaftdrope.errors import UserError
from eaftdrope.evaluate.likelihood import Progress
from eaftdrope.evaluate.texts import evenly_spaced
from eaftdrope.loaded_model import check_token_ids
from eaftdrope.loss.gates import Gate, resolve_gate
from eaftdrope.models import load_config, load_tokenizer, refuse_ttt
from eaftdrope.recipe.dump import dump_recipe
from eaftdrope.recipe.schema import Recipe
from eaftdrope.run.build import build_model, check_backend, tile_bytes
from eaftdrope.run.data import encode_rows
from eaftdrope.run.machine import format_bytes, keep_freed_memory, precision_line, training_device, uses_bfloat16

from .on_policy import sampled_rows, survey_of_rows
from .results import InspectionFolder, write_survey
from .survey import Survey

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The worst confident conflicts that are kept with their context.
CONFLICTS_KEPT = 10_000


@dataclass(frozen=True)
class Inspection:
    """A prepared inspection: everything except the weights is loaded.

    Args:
        rows: each row once, with the index of its source in the column `source`.
        on_policy: number of rows whose prompts the model answers itself.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    sources: list[str]
    gate: Gate
    on_policy: int


def prepare_inspection(recipe: Recipe, *, rows: int | None, on_policy: int) -> Inspection:
    """Read and encode the rows that the recipe trains on.

    Args:
        recipe: with the section data.
        rows: evenly spaced rows, at most; None for all.
        on_policy: number of rows whose prompts the model answers itself.

    Raises:
        UserError: the recipe trains on no rows, or the data, the model or the gate cannot be used.
    """
    if recipe.data is None:
        raise UserError(
            "inspect measures the rows of the section data, which this recipe does not have: its stages are "
            f"{', '.join(recipe.stages or [])}."
        )
    check_backend(recipe.model, recipe.loss, recipe.train.precision)
    refuse_ttt(recipe.model.reference, revision=recipe.model.revision)
    options = {"revision": recipe.model.revision, "trust_remote_code": recipe.model.trust_remote_code}
    tokenizer = load_tokenizer(recipe.model.reference, **options)
    found, sources = _training_rows(recipe, tokenizer)
    check_token_ids(found, load_config(recipe.model.reference, **options).get_text_config().vocab_size, tokenizer)
    if rows is not None and rows < len(found):
        found = found.select(evenly_spaced(range(len(found)), rows))
    gate = resolve_gate(recipe.loss.gate, **recipe.loss.gate_kwargs())
    return Inspection(recipe, tokenizer, found, sources, gate, on_policy)


def _training_rows(recipe: Recipe, tokenizer) -> tuple[Dataset, list[str]]:
    """Return the training rows with the index of their source, and the names of the sources.

    Each row appears once: a weight above 1 repeats rows, and repeats must not be reported as copies.
    """
    data = recipe.data
    assert data is not None, "prepare_inspection refuses a recipe without data"
    once = [replace(source, weight=min(1.0, source.weight)) for source in data.train_sources()]
    rows, report = encode_rows(
        data, once, tokenizer, seed=data.data_seed(recipe.train.seed), max_length=data.max_length
    )
    counts = [source.rows for source in report.by_source.values()]
    rows = rows.add_column("source", np.repeat(np.arange(len(counts), dtype=np.int32), counts))
    if data.held_out_share:
        rows, _ = hold_out(rows, data.held_out_share, seed=data.data_seed(recipe.train.seed))
    return rows, list(report.by_source)


def plan_lines(inspection: Inspection, folder: Path) -> list[tuple[str, str]]:
    """Return the plan as (name, text) lines."""
    recipe, rows = inspection.recipe, inspection.rows
    tokens = trained = 0
    for batch in rows.select_columns("labels").iter(1000):
        tokens += sum(map(len, batch["labels"]))
        trained += sum(label != -100 for labels in batch["labels"] for label in labels[1:])
    device = training_device()
    precision = precision_line(recipe.model.dtype, uses_bfloat16(recipe.train.precision), device)
    memory = "" if device.memory is None else f", which has {format_bytes(device.memory)}"
    lines = [
        ("model", recipe.model.reference),
        ("device", f"{device.name}{memory}; {precision}"),
        ("rows", f"{len(rows):,} with {tokens:,} tokens, {trained:,} of them trained"),
        ("gate", inspection.gate.formula),
        ("writes", f"{folder}/: inspect.json, rows.jsonl, conflicts.jsonl (the worst {CONFLICTS_KEPT:,}), report.html"),
    ]
    if inspection.on_policy:
        lines.append(("on policy", f"{min(inspection.on_policy, len(rows)):,} prompts answered by the model itself"))
    if not inspection.gate.row_local:
        lines.append(("note", f"{inspection.gate.name} compares tokens with each other: here, those of a batch"))
    if recipe.stages:
        lines.append(("note", f"measured with {recipe.model.reference} as it is, before the stages"))
    return lines


def run_inspection(
    inspection: Inspection,
    folder: InspectionFolder,
    *,
    about: dict[str, Any],
    command: str,
    start: Callable[[str], Progress],
) -> dict[str, Any]:
    """Load the model, measure every row and fill the folder; return the content of inspect.json.

    Args:
        about: the machine and the versions.
        command: the command line.
        start: starts a progress bar with a description; returns the function that is called with (done, total).
    """
    recipe = inspection.recipe
    device = training_device().kind
    if device == "cpu":
        keep_freed_memory()
    model = build_model(recipe.model)
    # a quantised model cannot be moved
    model = model.eval() if recipe.model.quantization != "none" else model.eval().to(device)
    with folder.filled() as place, _autocast(recipe, device):
        on_policy = _on_policy(inspection, model, start) if inspection.on_policy else None
        survey = Survey(inspection.rows, inspection.sources, conflicts=CONFLICTS_KEPT)
        _measure(survey, inspection, model, start("measuring rows"))
        facts = {
            "about": about,
            "command": command,
            "model": recipe.model.reference,
            "recipe": dump_recipe(recipe, folder=folder.path),
        }
        return write_survey(survey, inspection.tokenizer, place, about=facts, on_policy=on_policy)


def _measure(survey: Survey, inspection: Inspection, model: PreTrainedModel, progress: Progress) -> None:
    survey.run(
        model,
        inspection.tokenizer,
        inspection.gate,
        batch_tokens=inspection.recipe.probes.batch_tokens,
        progress=progress,
        **_loss_options(inspection.recipe),
    )


def _loss_options(recipe: Recipe) -> dict[str, Any]:
    """Return the options of the section `loss` other than the gate."""
    return {"backend": recipe.loss.backend, "tile_bytes": tile_bytes(recipe.loss)}


def _on_policy(inspection: Inspection, model: PreTrainedModel, start: Callable[[str], Progress]) -> dict[str, Any]:
    recipe = inspection.recipe
    batch_tokens = recipe.probes.batch_tokens
    rows = sampled_rows(
        model,
        inspection.tokenizer,
        inspection.rows,
        inspection.on_policy,
        seed=recipe.train.seed,
        batch_tokens=batch_tokens,
        progress=start("the model answers"),
    )
    return survey_of_rows(model, rows, inspection.gate, batch_tokens=batch_tokens, **_loss_options(recipe))


def _autocast(recipe: Recipe, device: str) -> AbstractContextManager[Any]:
    """Return the autocast of training; one block around everything rounds the weights only once."""
    return torch.autocast(device, torch.bfloat16) if uses_bfloat16(recipe.train.precision) else nullcontext()


def show_plan(inspection: Inspection, folder: Path, console: Console) -> None:
    """Print the plan."""
    for name, text in plan_lines(inspection, folder):
        console.print(f"{name:10} {text}", highlight=False, markup=False, soft_wrap=True)
