"""inspect.json, conflicts.jsonl and rows.jsonl from a survey.

The folder of an inspection: made whole beside its place, then put there.

inspect.json       everything a page is drawn from; written there last
conflicts.jsonl    the worst confident conflicts, one a line, with their context
rows.jsonl         every row, those to look at first
report.html, figures/
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eaftdrope.errors import UserError
from eaftdrope.files import check_unused, check_writable, usable_path

from .survey import Survey
from .text import in_context, shown
from .worst import REASONS, ConfidentConflict

# Of each in inspect.json, which a page is drawn from; the files beside it have more.
_CONFLICTS, _ROWS, _COMMON = 200, 200, 40


def write_survey(survey: Survey, tokenizer, folder: Path, *, about: dict, on_policy: dict | None) -> dict:
    """Writes the three files into `folder` and returns what inspect.json says.

    Args:
        about: `about`, `command`, `model` and `recipe`, as they are to stand in it.
    """
    conflicts = survey.conflicts.worst_first()
    first_conflicts = _write_lines(folder / "conflicts.jsonl", _conflict_rows(survey, conflicts, tokenizer), _CONFLICTS)
    first_rows = _write_lines(folder / "rows.jsonl", _ranked_rows(survey, tokenizer), _ROWS)
    tally = survey.tally
    document = {
        "kind": "inspect",
        **about,
        "rows": len(survey.rows),
        "tokens": tally.tokens,
        "landscape": tally.landscape(),
        "summary": tally.summary(),
        "quadrants": tally.quadrants(),
        "positions": tally.positions(),
        "sources": tally.sources(),
        "conflicts_seen": survey.conflicts.seen,
        "conflicts_kept": len(conflicts),
        "conflicts": first_conflicts,
        "common_conflicts": _common(conflicts, survey, tokenizer),
        "rows_ranked": first_rows,
        "on_policy": on_policy,
    }
    (folder / "inspect.json").write_text(json.dumps(_finite(document), allow_nan=False) + "\n", encoding="utf-8")
    return document


def _conflict_rows(survey: Survey, conflicts: list[ConfidentConflict], tokenizer) -> Iterator[dict]:
    for conflict in conflicts:
        row, origin, _ = survey.row(conflict.row)
        yield {
            "origin": origin,
            "position": conflict.position,
            "entropy": conflict.entropy,
            "nll": conflict.nll,
            "probability": math.exp(-conflict.nll),
            "predicted_probability": conflict.predicted_probability,
            **in_context(row, conflict.position, conflict.predicted, tokenizer),
        }


def _ranked_rows(survey: Survey, tokenizer) -> Iterator[dict]:
    figures = survey.figures
    duplicates = figures.duplicates()
    for number, reason in zip(*figures.ranked(), strict=True):
        row, origin, source = survey.row(number)
        tokens, conflicts = int(figures.tokens[number]), int(figures.conflicts[number])
        yield {
            "origin": origin,
            "source": survey.tally.names[source],
            "because_of": REASONS[reason],
            "tokens": tokens,
            "conflicts": conflicts,
            "conflict_share": conflicts / tokens,
            "nll": figures.nll[number] / tokens,
            "duplicates": int(duplicates[number]),
            "text": shown(row, tokenizer),
        }


def _common(conflicts: list[ConfidentConflict], survey: Survey, tokenizer) -> list[dict]:
    """Which label stands where the model is sure of which other token, and how often, among the conflicts kept."""
    pairs: Counter[tuple[int, int]] = Counter()
    for conflict in conflicts:
        pairs[survey.row(conflict.row)[0].input_ids[conflict.position], conflict.predicted] += 1
    return [
        {"label": tokenizer.decode(label), "predicted": tokenizer.decode(predicted), "count": count}
        for (label, predicted), count in pairs.most_common(_COMMON)
    ]


def _write_lines(path: Path, rows: Iterator[dict], first: int) -> list[dict]:
    """Writes every row and returns the first ones."""
    kept = []
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(_finite(row), allow_nan=False, ensure_ascii=False) + "\n")
            if len(kept) < first:
                kept.append(row)
    return kept


def _finite(value):
    """NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


NAME = "inspect.json"
_FILES = ("conflicts.jsonl", "rows.jsonl", NAME)


class InspectionFolder:
    """`path`, looked at; nothing is written before there is something to put there.

    Raises:
        UserError: it holds an inspection and is not to be overwritten, holds strangers' files, or cannot be made.
    """

    def __init__(self, path: Path, *, overwrite: bool = False):
        self.path = path
        usable_path(path)
        check_writable(path, "--output")
        check_unused(path, NAME)
        if (path / NAME).is_file() and not overwrite:
            raise UserError(
                f"{path} holds an inspection. Nothing was changed: choose another folder with --output, or pass --overwrite "
                "to replace it."
            )

    @contextmanager
    def filled(self) -> Iterator[Path]:
        """A folder to write the three files into; they are put in their place when the block ends, and are gone if it does
        not come to its end."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        # what a killed start left
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            self.path.mkdir(exist_ok=True)
            # a folder with new lines and an old summary must not pass for whole
            (self.path / NAME).unlink(missing_ok=True)
            for name in _FILES:
                os.replace(partial / name, self.path / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
