"""What `eaftdrope compare` found: verdict, table, Pareto figure, and the control at an equal target."""

from __future__ import annotations

from pathlib import Path

from eaftdrope.evaluate.scores import Score
from eaftdrope.evaluate.table import number_text

from ..blocks import Gallery, Page, Section, Table, Text
from ..drawer import Drawer
from ..files import read_json
from ..pareto import pareto_figure
from ..words import arrowed, listing, number, plural, score_of, value_text
from .about import about_section

_FILE = "compare.json"


def compare_page(folder: Path, drawer: Drawer) -> Page:
    """The page of a folder with compare.json."""
    document = read_json(folder / _FILE)
    sections = [
        _outcome(document, drawer),
        *_matched(document),
        *_arms(document),
        about_section(
            document, ("Seeds", listing([str(seed) for seed in _seeds(document)]) if document["arms"] else None)
        ),
    ]
    return Page("Comparison of gates", folder.resolve().name, _summary(document), sections)


def _summary(document: dict) -> str:
    if document["status"] != "finished":
        return f"This comparison is not finished: {plural(len(document['arms']), 'run')} of it are there."
    return document["verdict"]


def _seeds(document: dict) -> list:
    return sorted({arm["seed"] for arm in document["arms"]})


def _known(document: dict) -> dict[str, Score]:
    """A score of every metric, for how it is written."""
    rows = [*document["base"], *(row for arm in document["arms"] for row in arm["scores"])]
    return {row["metric"]: score_of(row) for row in reversed(rows)}


def _outcome(document: dict, drawer: Drawer) -> Section:
    blocks = []
    if document["table"]:
        blocks.append(_table(document))
        figure = pareto_figure(document)
        label = (
            f"Target ({document['target']}) against general ({document['general']}) for "
            f"{listing([row['label'] for row in document['table']])}. The numbers are in the table."
        )
        caption = (
            "Up and right is better. Large marks are means with one standard deviation over seeds, small marks single "
            "seeds, the star is the model before training."
        )
        blocks.append(Gallery([drawer.picture("pareto", figure, label, caption)]))
    if document["verdicts"]:
        rows = [[listing([str(name) for name in one["pair"]]), one["text"]] for one in document["verdicts"]]
        blocks.append(Table("Pair by pair", ("pair", "verdict"), rows, stack=True))
    return Section("outcome", "Gained and forgotten under each gate", blocks or [Text("Nothing was measured yet.")])


def _table(document: dict) -> Table:
    """Means over seeds; the base model's own values come first."""
    known = _known(document)
    target, general = document["target"], document["general"]
    others = [key for key in document["table"][0] if key not in ("label", "n", "target", "general") and key in known]
    metrics = [target, general, *others]
    base = {row["metric"]: score_of(row) for row in document["base"]}
    rows = [["before training", "", *(value_text(base.get(metric)) for metric in metrics)]]
    for row in document["table"]:
        values = [row["target"], row["general"], *(row[key] for key in others)]
        texts = [_spread(value, known[metric].kind) for metric, value in zip(metrics, values)]
        rows.append([row["label"], f"{row['n']:,}", *texts])
    head = ["gate", "runs", *(arrowed(metric, known[metric].better) for metric in metrics)]
    note = "± is one standard deviation over runs; before training, one standard error. ↓ lower is better, ↑ higher."
    return Table("Mean over seeds", head, rows, numeric=range(1, len(head)), stack=len(head) < 6, note=note)


def _spread(value: dict, kind: str) -> str:
    if value["mean"] is None:
        return "–"
    text = number_text(value["mean"], kind)
    return text if value["sd"] is None else f"{text} ± {number_text(value['sd'], kind)}"


def _matched(document: dict) -> list[Section]:
    matched = document["matched"]
    if not matched:
        return []
    known, general = _known(document), document["general"]
    metrics = list(
        dict.fromkeys([document["target"], general, *(s["metric"] for a in matched["arms"] for s in a["scores"])])
    )
    metrics = [metric for metric in metrics if metric in known]
    rows = []
    for arm in matched["arms"]:
        scores = {row["metric"]: score_of(row) for row in arm["scores"]}
        share = "not reached" if arm["share"] is None else f"{100 * arm['share']:.0f} %"
        rows.append([arm["label"], str(arm["seed"]), share, *(value_text(scores.get(metric)) for metric in metrics)])
    level = number_text(matched["level"], known[document["target"]].kind)
    words = (
        f"A gate that simply learns less also forgets less. Here every run is taken back towards the base model until its "
        f"target ({document['target']}) is {level}, and only then compared."
    )
    head = ["gate", "seed", "of the way", *(arrowed(metric, known[metric].better) for metric in metrics)]
    note = "Of the way: 0 % is the base model, 100 % the trained weights. ± is one standard error."
    table = Table("At an equal target", head, rows, numeric=range(1, len(head)), stack=len(head) < 7, note=note)
    return [Section("matched", "At an equal target", [Text(words), table])]


def _arms(document: dict) -> list[Section]:
    if not document["arms"]:
        return []
    known = _known(document)
    rows = []
    for arm in document["arms"]:
        scores = {row["metric"]: score_of(row) for row in arm["scores"]}
        first = [
            arm["label"],
            str(arm["seed"]),
            f"{arm['learning_rate']:g}",
            number(arm["mean_gate"]),
            f"{arm['steps']:,}",
        ]
        rows.append([*first, *(value_text(scores.get(metric)) for metric in known), arm["folder"]])
    head = ["gate", "seed", "learning rate", "mean gate", "steps"]
    metrics = [arrowed(metric, score.better) for metric, score in known.items()]
    table = Table("Every run", [*head, *metrics, "folder"], rows, numeric=range(1, len(head) + len(metrics)))
    return [Section("runs", "Every run", [table])]
