"""`eaftdrope inspect`: from a recipe to what its model makes of its training rows, before any training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError
from eaftdrope.recipe.dump import dump_recipe
from eaftdrope.recipe.schema import Recipe
from eaftdrope.run.build import build_model, check_backend, encode_rows, tile_bytes
from eaftdrope.run.machine import gib, keep_freed_memory, precision_line, training_device, uses_bfloat16

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from eaftdrope.loss.gates import Gate

    from .results import InspectionFolder
    from .survey import Survey

# The worst confident conflicts that are kept with their context.
CONFLICTS_KEPT = 10_000


@dataclass(frozen=True)
class Inspection:
    """What is to be looked at, everything but the weights read.

    Args:
        rows: each row once, with the number of its source in the column `source`.
        on_policy: rows whose prompts the model is to answer itself.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    sources: list[str]
    gate: Gate
    on_policy: int


def prepare_inspection(recipe: Recipe, *, rows: int | None, on_policy: int) -> Inspection:
    """Reads and encodes the rows that the recipe trains on; of those, `rows` spread evenly.

    Raises:
        UserError: the recipe trains on no rows; the data, the model or the gate can not be used.
    """
    from eaftdrope.evaluate.texts import evenly_spaced
    from eaftdrope.loaded_model import check_token_ids
    from eaftdrope.loss.gates import resolve_gate
    from eaftdrope.models import load_config, load_tokenizer

    if recipe.data is None:
        raise UserError(
            "inspect looks at the rows of the section data, and this recipe has none: its stages are "
            f"{', '.join(recipe.stages)}."
        )
    check_backend(recipe)
    how = {"revision": recipe.model.revision, "trust_remote_code": recipe.model.trust_remote_code}
    tokenizer = load_tokenizer(recipe.model.reference, **how)
    found, sources = _training_rows(recipe, tokenizer)
    check_token_ids(found, load_config(recipe.model.reference, **how).get_text_config().vocab_size, tokenizer)
    if rows is not None and rows < len(found):
        found = found.select(evenly_spaced(range(len(found)), rows))
    gate = resolve_gate(recipe.loss.gate, **recipe.loss.gate_kwargs())
    return Inspection(recipe, tokenizer, found, sources, gate, on_policy)


def _training_rows(recipe: Recipe, tokenizer) -> tuple[Dataset, list[str]]:
    """Each row that is trained on once (a weight above 1 repeats rows, and repeats are no copies to be told about), the
    number of its source beside it; and the names of the sources."""
    import numpy as np

    from eaftdrope.data import hold_out

    data = recipe.data
    once = [replace(source, weight=min(1.0, source.weight)) for source in data.train_sources()]
    rows, report = encode_rows(recipe, once, tokenizer, max_length=data.max_length)
    counts = [source.rows for source in report.by_source.values()]
    rows = rows.add_column("source", np.repeat(np.arange(len(counts), dtype=np.int32), counts))
    if data.held_out_share:
        rows, _ = hold_out(rows, data.held_out_share, seed=data.drawn_by(recipe.train.seed))
    return rows, list(report.by_source)


def plan_lines(inspection: Inspection, folder: Path) -> list[tuple[str, str]]:
    """What will be done, as (name, text) lines."""
    recipe, rows = inspection.recipe, inspection.rows
    tokens = trained = 0
    for batch in rows.select_columns("labels").iter(1000):
        tokens += sum(map(len, batch["labels"]))
        trained += sum(label != -100 for labels in batch["labels"] for label in labels[1:])
    device = training_device()
    precision = precision_line(recipe, uses_bfloat16(recipe), device)
    memory = "" if device.memory is None else f", which has {gib(device.memory)}"
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
        lines.append(("note", f"looked at with {recipe.model.reference} as it is, before the stages"))
    return lines


def run_inspection(
    inspection: Inspection,
    folder: InspectionFolder,
    *,
    about: dict,
    command: str,
    start: Callable[[str], Callable[[int, int], None]],
) -> dict:
    """Loads the model, looks at every row and fills the folder; returns what inspect.json says.

    Args:
        about: where and with what it is measured.
        start: begins a progress bar of some words, and gives what moves it.
    """
    from .results import write_survey
    from .survey import Survey

    recipe = inspection.recipe
    device = training_device().kind
    if device == "cpu":
        keep_freed_memory()
    model = build_model(recipe)
    # a quantised model is where it was loaded
    model = model.eval() if recipe.model.quantization != "none" else model.eval().to(device)
    with folder.filled() as place, _autocast(recipe, device):
        on_policy = _on_policy(inspection, model, start) if inspection.on_policy else None
        survey = Survey(inspection.rows, inspection.sources, conflicts=CONFLICTS_KEPT)
        _look(survey, inspection, model, start("looking at rows"))
        facts = {
            "about": about,
            "command": command,
            "model": recipe.model.reference,
            "recipe": dump_recipe(recipe, folder=folder.path),
        }
        return write_survey(survey, inspection.tokenizer, place, about=facts, on_policy=on_policy)


def _look(survey: Survey, inspection: Inspection, model, progress) -> None:
    survey.run(
        model,
        inspection.tokenizer,
        inspection.gate,
        batch_tokens=inspection.recipe.probes.batch_tokens,
        progress=progress,
        **_loss_options(inspection.recipe),
    )


def _loss_options(recipe: Recipe) -> dict:
    """What the section `loss` decides beside the gate."""
    return {"backend": recipe.loss.backend, "tile_bytes": tile_bytes(recipe)}


def _on_policy(inspection: Inspection, model, start) -> dict:
    from .on_policy import sampled_rows, survey_of_rows

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


def _autocast(recipe: Recipe, device: str):
    """As training computes. One block around everything: its rounded copies of the weights are made once."""
    import torch

    return torch.autocast(device, torch.bfloat16) if uses_bfloat16(recipe) else nullcontext()


def show_plan(inspection: Inspection, folder: Path, console: Console) -> None:
    for name, text in plan_lines(inspection, folder):
        console.print(f"{name:10} {text}", highlight=False, markup=False, soft_wrap=True)
