"""Results of `eaftdrope eval`: a table of models, and every value with its interval."""

from __future__ import annotations

from pathlib import Path

from eaftdrope.evaluate.scores import Score
from eaftdrope.evaluate.table import GROUPS
from eaftdrope.files import read_json

from ..blocks import Page, PageSection, TableBlock
from ..render import FigureWriter
from ..words import arrowed, interval_text, plural, score_of, value_text
from .about import about_section
from .changes import difference_sentence, difference_table


def eval_page(folder: Path, writer: FigureWriter) -> Page:
    """Return the page of a folder with eval.json."""
    document = read_json(folder / "eval.json")
    models = {one["name"]: [score_of(row) for row in one["scores"]] for one in document["models"]}
    first, *others = models
    blocks = [score_table(models), *(difference_table(first, name, models[first], models[name]) for name in others)]
    about = about_section(
        document,
        ("Models", "\n".join(one["reference"] for one in document["models"])),
        ("Suites", ", ".join(map(str, document["suites"]))),
        ("Notes", "\n".join(document["notes"])),
    )
    sections = [PageSection("outcome", "Scores", blocks), _intervals(models), about]
    return Page("Evaluation", folder.resolve().name, _summary(document, models), sections)


def _summary(document: dict, models: dict[str, list[Score]]) -> str:
    if document["status"] != "finished":
        return "This evaluation is not finished: the page shows what has been measured so far."
    first, *others = models
    if not others:
        return f"{first}: {plural(len(models[first]), 'metric')}, each with its standard error."
    return " ".join(difference_sentence(first, name, models[first], models[name]) for name in others)


def score_table(models: dict[str, list[Score]]) -> TableBlock:
    """Return the table of scores: one row per metric, one column per model."""
    found: dict[tuple[str, str], dict[str, Score]] = {}
    for name, scores in models.items():
        for score in scores:
            found.setdefault((score.probe, score.metric), {})[name] = score
    lines = sorted(found.values(), key=lambda line: list(GROUPS).index(next(iter(line.values())).group))
    rows, group = [], None
    for line in lines:
        score = next(iter(line.values()))
        if score.group != group:
            group = score.group
            rows.append([GROUPS[group]])
        rows.append([arrowed(score.metric, score.better), *(value_text(line.get(name)) for name in models)])
    head = ["metric", *models]
    note = "± is one standard error. ↓ lower is better, ↑ higher is better."
    return TableBlock("Scores by model", head, rows, numeric=range(1, len(head)), stack=len(head) < 5, note=note)


def _intervals(models: dict[str, list[Score]]) -> PageSection:
    rows = [
        [
            arrowed(score.metric, score.better),
            score.probe,
            name,
            value_text(score),
            interval_text(score),
            f"{score.n:,}",
        ]
        for name, scores in models.items()
        for score in scores
    ]
    head = ("metric", "probe", "model", "value", "95 % interval", "units")
    return PageSection("probes", "Probes", [TableBlock("Each model separately", head, rows, numeric=(3, 4, 5))])
