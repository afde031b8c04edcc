"""Results of `eaftdrope compare`: verdict, table, Pareto figure, and the control at an equal target."""

from __future__ import annotations

from pathlib import Path

from eaftdrope.evaluate.scores import Score
from eaftdrope.evaluate.table import by_metric, error_text, number_text
from eaftdrope.files import read_json

from ..blocks import Gallery, Page, PageSection, TableBlock, Text
from ..figures.pareto import pareto_figure
from ..render import FigureWriter
from ..words import arrowed, listing, number, plural, score_of, value_text
from .about import about_section

_FILE = "compare.json"


def compare_page(folder: Path, writer: FigureWriter) -> Page:
    """Return the page of a folder with compare.json."""
    document = read_json(folder / _FILE)
    seeds = sorted({arm["seed"] for arm in document["arms"]})
    sections = [
        _outcome(document, writer),
        *_matched(document),
        *_arms(document),
        about_section(document, ("Seeds", listing([str(seed) for seed in seeds]) if seeds else None)),
    ]
    return Page("Comparison", folder.resolve().name, _summary(document), sections)


def _summary(document: dict) -> str:
    if document["status"] != "finished":
        return f"This comparison is not finished; {plural(len(document['arms']), 'run')} so far."
    return document["verdict"]


def _scores(rows: list[dict]) -> dict[str, Score]:
    return by_metric([score_of(row) for row in rows])


def _ordered(document: dict) -> dict[str, Score]:
    """Return the base model's scores: the two of the figure first, then the target's, then the general ones."""
    base = _scores(document["base"])
    first = (document["target"], document["general"])
    return dict(sorted(base.items(), key=lambda one: (one[0] not in first, one[1].group != "target")))


def _head(base: dict[str, Score]) -> list[str]:
    return [arrowed(name, score.better) for name, score in base.items()]


def _outcome(document: dict, writer: FigureWriter) -> PageSection:
    blocks: list[object] = []
    if document["table"]:
        blocks.append(_table(document))
        figure = pareto_figure(document)
        label = (
            f"Target ({document['target']}) against general ({document['general']}) for "
            f"{listing([row['label'] for row in document['table']])}. The table has the numbers."
        )
        caption = (
            "Up and to the right is better. Large markers are means with one standard deviation over seeds, small markers "
            "are single seeds, the star is the model before training."
        )
        blocks.append(Gallery([writer.picture("pareto", figure, label, caption)]))
    if document["verdicts"]:
        rows = [[listing([str(name) for name in one["pair"]]), one["text"]] for one in document["verdicts"]]
        blocks.append(TableBlock("Each pair", ("pair", "verdict"), rows, stack=True, long=(1,)))
    return PageSection(
        "outcome", "Gained and forgotten by each arm", blocks or [Text("Nothing has been measured yet.")]
    )


def _table(document: dict) -> TableBlock:
    """Return the table of means over seeds, with the base model's values in the first row."""
    base = _ordered(document)
    rows = [["before training", "", "", *(value_text(score) for score in base.values())]]
    for row in document["table"]:
        values = {**row, document["target"]: row["target"], document["general"]: row["general"]}
        texts = [_spread(values[name], score.kind) for name, score in base.items()]
        rows.append([row["label"], f"{row['n']:,}", number(row["mean_gate"]), *texts])
    head = ["arm", "seeds", "mean gate", *_head(base)]
    note = "± is one standard deviation over seeds; before training, one standard error. ↓ lower, ↑ higher is better."
    return TableBlock("Means over seeds", head, rows, numeric=range(1, len(head)), stack=len(head) < 7, note=note)


def _spread(value: dict, kind: str) -> str:
    return number_text(value["mean"], kind) + error_text(value["sd"], kind)


def _matched(document: dict) -> list[PageSection]:
    matched = document["matched"]
    if not matched:
        return []
    base = _ordered(document)
    found = [(arm, _scores(arm["scores"])) for arm in matched["arms"]]
    base = {name: score for name, score in base.items() if any(name in scores for _, scores in found)}
    rows = [
        [
            arm["label"] if arm.get("monotone", True) else f"{arm['label']} (not monotone)",
            str(arm["seed"]),
            f"{100 * arm['share']:.0f} %",
            *(value_text(scores.get(name)) for name in base),
        ]
        for arm, scores in found
    ]
    words = (
        "A method that simply learns less also forgets less. Here the weights of every run are interpolated towards the base "
        "model until its gain on the target equals that of the run that gained least; what it forgot is measured there."
    )
    out = [f"{one['label']}, seed {one['seed']}: {one['why']}" for one in matched.get("left_out", [])]
    blocks: list = [Text(words + (f" Left out: {'; '.join(out)}." if out else ""))]
    if rows:
        head = ["arm", "seed", "share of the way", *_head(base)]
        note = "Share of the way: 0 % is the base model, 100 % the trained weights. ± is one standard error."
        caption = f"At an equal target ({document['target']})"
        blocks.append(TableBlock(caption, head, rows, numeric=range(1, len(head)), stack=len(head) < 7, note=note))
    return [PageSection("matched", "At an equal target", blocks)]


def _arms(document: dict) -> list[PageSection]:
    if not document["arms"]:
        return []
    base = _ordered(document)
    rows = []
    for arm in document["arms"]:
        scores = _scores(arm["scores"])
        run = [str(arm["seed"]), f"{arm['learning_rate']:g}", number(arm["mean_gate"]), f"{arm['steps']:,}"]
        rows.append([arm["label"], *run, *(value_text(scores.get(name)) for name in base), arm["folder"]])
    head = ["arm", "seed", "learning rate", "mean gate", "steps", *_head(base)]
    table = TableBlock(
        "Each run with its own error",
        [*head, "folder"],
        rows,
        numeric=range(1, len(head)),
        note="± is one standard error.",
    )
    return [PageSection("runs", "Every run", [table])]
