"""Results of a probe as rows: what the CSV holds, and what the table and the figures read.

Imports nothing heavy but the probes' own result classes.
"""

from __future__ import annotations

import csv
import io

from .attention import NeedleAttention
from .lengths import multiple
from .needles import KINDS
from .perplexity import WindowLosses
from .retrieval import Retrieval

COLUMNS = {
    "model": "",
    "arm": "as is, or a baseline",
    "trained_length": "tokens",
    "probe": "",
    "length": "tokens",
    "multiple": "length / trained length",
    "metric": "",
    "at": "depth of the needle (niah), or positions of a window (perplexity); empty: over all",
    "value": "",
    "low": "95 % Wilson interval of a share",
    "high": "the same",
    "stderr": "of a perplexity, over windows; of a suite, as lm-eval gives it",
    "n": "trials or windows",
}


def rows_of(document: dict) -> list[dict]:
    """A row for every number of the document that `Results` stores, with every column of `COLUMNS` (None: has none)."""
    trained = {model["name"]: model["trained_length"] for model in document["settings"]["models"]}
    rows = []
    for cell in document["cells"]:
        known = {name: cell[name] for name in ("model", "arm", "probe", "length")}
        known["trained_length"] = trained[cell["model"]]
        known["multiple"] = multiple(cell["length"], trained[cell["model"]])
        for numbers in _numbers(cell):
            rows.append({column: {**known, **numbers}.get(column) for column in COLUMNS})
    return rows


def csv_of(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
    return text.getvalue()


def _numbers(cell: dict) -> list[dict]:
    probe, length, result = cell["probe"], cell["length"], cell["result"]
    if probe == "perplexity":
        return _perplexities(WindowLosses.from_json(length, result))
    if probe in KINDS:
        return _shares(Retrieval.from_json(probe, length, result))
    if probe == "attention":
        return _masses(NeedleAttention.from_json(result))
    return [{"metric": score["task"], **score} for score in result["scores"]]


def _perplexities(losses: WindowLosses) -> list[dict]:
    def row(score, at=None) -> dict:
        return {"metric": "perplexity", "at": at, "value": score.value, "stderr": score.stderr, "n": score.n}

    parts = [row(score, f"{start}-{stop}") for start, stop, score in losses.by_position()]
    return [row(losses.score()), *parts]


def _shares(retrieval: Retrieval) -> list[dict]:
    def row(part: Retrieval, at=None) -> dict:
        low, high = part.interval()
        return {
            "metric": "accuracy",
            "at": at,
            "value": part.accuracy,
            "low": low,
            "high": high,
            "n": len(part.outcomes),
        }

    rows = [row(retrieval)]
    if retrieval.outcomes[0].asked > 1:
        rows.append({"metric": "recall", "value": retrieval.recall, "n": len(retrieval.outcomes)})
    return rows + [row(part, f"{depth:.3f}") for depth, part in retrieval.by_depth().items()]


def _masses(attention: NeedleAttention) -> list[dict]:
    numbers = {"uniform": attention.uniform}
    for name in ("peak", "near", "outside"):
        numbers[f"{name}, mean"] = getattr(attention.mean, name)
        numbers[f"{name}, best head"] = getattr(attention.best, name)
    return [{"metric": metric, "value": value, "n": attention.trials} for metric, value in numbers.items()]
