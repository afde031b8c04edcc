"""Training runs side by side: their scores, each run compared with the first, and their curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eaftdrope.errors import UserError
from eaftdrope.evaluate.scores import Score, scores_from_json
from eaftdrope.files import read_json, read_lines

from ..blocks import Facts, Gallery, Page, PageSection, TableBlock
from ..figures.curves import run_curves
from ..render import FigureWriter
from ..words import listing
from .changes import difference_sentence, difference_table
from .evaluation import score_table

_CURVES = {
    "eaft/cross_entropy": ("nats per token", "Cross-entropy of the training batches, without the gate."),
    "eaft/gate_mean": ("mean gate", "Mean gate of the training batches."),
    "eaft/low_entropy_loss": (
        "nats per token",
        "Cross-entropy of the tokens where the model was confident (entropy ≤ 0.5).",
    ),
}


def runs_page(folders: Sequence[Path], writer: FigureWriter) -> Page:
    """Return the page that compares training runs.

    Raises:
        UserError: a run has no scores after training.
    """
    names = _names(folders)
    after = {name: _after(folder) for name, folder in zip(names, folders)}
    before = scores_from_json((folders[0] / "probes_before.json").read_text(encoding="utf-8"))
    first, *others = names
    blocks = [score_table({"before training": before, **after})]
    blocks += [difference_table(first, name, after[first], after[name]) for name in others]
    sections = [
        PageSection("outcome", "Side by side", blocks),
        *_curves(names, folders, writer),
        _differences(names, folders),
    ]
    summaries = [difference_sentence(first, name, after[first], after[name]) for name in others]
    return Page("Training runs side by side", listing(names), " ".join(summaries), sections)


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the names of the folders, with the parent folder or the full path if they are not unique."""
    short = [folder.resolve().name for folder in folders]
    long = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    full = [str(folder) for folder in folders]
    return next((names for names in (short, long) if len(set(names)) == len(names)), full)


def _after(folder: Path) -> list[Score]:
    file = folder / "probes_after.json"
    if not file.is_file():
        raise UserError(
            f"{folder} has no probes_after.json, so there is nothing to compare. Only training runs with scores after "
            "training can be compared side by side."
        )
    return scores_from_json(file.read_text(encoding="utf-8"))


def _curves(names: list[str], folders: Sequence[Path], writer: FigureWriter) -> list[PageSection]:
    metrics = {name: read_lines(folder / "metrics.jsonl") for name, folder in zip(names, folders)}
    pictures = []
    for key, (axis, words) in _CURVES.items():
        figure = run_curves(metrics, key, axis)
        if figure is not None:
            pictures.append(writer.picture(f"curve_{key.rpartition('/')[2]}", figure, words))
    return [PageSection("curves", "Training", [Gallery(pictures)])] if pictures else []


def _differences(names: list[str], folders: Sequence[Path]) -> PageSection:
    """Return the section with the recipe keys in which the runs differ."""
    recipes = [_flat(read_json(folder / "run.json")["recipe"]) for folder in folders]
    keys = [key for key in dict.fromkeys(key for recipe in recipes for key in recipe)]
    rows = [
        [key, *(str(recipe.get(key, "–")) for recipe in recipes)]
        for key in keys
        if len({str(recipe.get(key)) for recipe in recipes}) > 1
    ]
    folders_block = Facts(list(zip(names, map(str, folders))))
    if not rows:
        return PageSection("run", "How they were run", [folders_block])
    return PageSection(
        "run",
        "How they were run",
        [folders_block, TableBlock("Differences between the recipes", ["key", *names], rows)],
    )


def _flat(data: object, prefix: str = "") -> dict[str, object]:
    if isinstance(data, dict) and data:
        return {key: value for name in data for key, value in _flat(data[name], f"{prefix}{name}.").items()}
    return {prefix[:-1]: data}
