"""The results folder of `eaftdrope inspect`, written completely beside its place and then moved there.

inspect.json       everything that the report is drawn from; moved last
conflicts.jsonl    the worst confident conflicts, one per line, with their context
rows.jsonl         every row, the most suspicious first
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
from typing import TYPE_CHECKING, Any

from eaftdrope.errors import UserError
from eaftdrope.files import check_unused, check_writable, usable_path

from .gate_benefit import gate_benefit
from .survey import Survey
from .text import in_context, shown
from .worst import REASONS, ConfidentConflict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Entries of each in inspect.json, for the report; the files beside it have more.
_CONFLICTS, _ROWS, _COMMON = 200, 200, 40


def write_survey(
    survey: Survey, tokenizer: PreTrainedTokenizerBase, folder: Path, *, about: dict, on_policy: dict | None
) -> dict:
    """Write the three files into `folder`; return the content of inspect.json.

    Args:
        about: `about`, `command`, `model` and `recipe`, for inspect.json.
        on_policy: as from `survey_of_rows`; None if nothing was sampled.
    """
    conflicts = survey.conflicts.worst_first()
    first_conflicts = _write_lines(folder / "conflicts.jsonl", _conflict_rows(survey, conflicts, tokenizer), _CONFLICTS)
    first_rows = _write_lines(folder / "rows.jsonl", _ranked_rows(survey, tokenizer), _ROWS)
    tally = survey.tally
    summary = tally.summary()
    document = {
        "kind": "inspect",
        **about,
        "rows": len(survey.rows),
        "tokens": tally.tokens,
        "landscape": tally.landscape(),
        "summary": summary,
        "gate_benefit": gate_benefit(summary["conflict_share"]),
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


def _conflict_rows(
    survey: Survey, conflicts: list[ConfidentConflict], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict]:
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


def _ranked_rows(survey: Survey, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict]:
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


def _common(conflicts: list[ConfidentConflict], survey: Survey, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """Return the most common pairs of label and confident prediction, with their counts, among the conflicts kept."""
    pairs: Counter[tuple[int, int]] = Counter()
    for conflict in conflicts:
        pairs[survey.row(conflict.row)[0].input_ids[conflict.position], conflict.predicted] += 1
    return [
        {"label": tokenizer.decode(label), "predicted": tokenizer.decode(predicted), "count": count}
        for (label, predicted), count in pairs.most_common(_COMMON)
    ]


def _write_lines(path: Path, rows: Iterator[dict], first: int) -> list[dict]:
    """Write every row; return the first ones."""
    kept = []
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(_finite(row), allow_nan=False, ensure_ascii=False) + "\n")
            if len(kept) < first:
                kept.append(row)
    return kept


def _finite(value: Any) -> Any:
    """Return `value` with NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


NAME = "inspect.json"
_FILES = ("conflicts.jsonl", "rows.jsonl", NAME)


class InspectionFolder:
    """The folder of an inspection. The constructor only checks it; nothing is written before there are results.

    Raises:
        UserError: it has an inspection and `overwrite` is not set, has other files, or cannot be created.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
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
        """Yield a folder to write the three files into; they are moved to their place when the block ends, and deleted on an
        error."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        # left by a killed process
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            self.path.mkdir(exist_ok=True)
            # a folder with new lines and an old summary must not look complete
            (self.path / NAME).unlink(missing_ok=True)
            for name in _FILES:
                os.replace(partial / name, self.path / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
