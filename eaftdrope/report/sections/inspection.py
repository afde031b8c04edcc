"""What `eaftdrope inspect` saw in training data: landscape, conflicts with their text, rows, positions, sources."""

from __future__ import annotations

from pathlib import Path

from eaftdrope.files import read_json

from ..blocks import Conflict, Conflicts, Gallery, Page, Section, Table, Text
from ..figures.landscape import landscape_figure
from ..render import Drawer
from ..words import end_of, left_out, number, percent, plural, start_of, visible
from .about import about_section

_FILE = "inspect.json"
_CONFLICTS, _ROWS, _COMMON, _LINES = 40, 40, 12, 60
_CONTEXT, _TOKEN, _ROW_TEXT = 240, 60, 300


def inspect_page(folder: Path, drawer: Drawer) -> Page:
    """The page of a folder with inspect.json."""
    document = read_json(folder / _FILE)
    sections = [
        _landscape(document, drawer),
        *conflict_sections(document),
        *_rows(document),
        *_where(document),
        about_section(document, ("Model", document["model"])),
    ]
    return Page("Training data, before training", folder.resolve().name, _summary(document), sections)


def _summary(document: dict) -> str:
    summary = document["summary"]
    sentence = (
        f"In {plural(document['rows'], 'row')} with {document['tokens']:,} trained tokens, "
        f"{percent(summary['conflict_share'])} of the tokens are confident conflicts: {document['model']} is sure of another "
        f"token than the label"
    )
    worst = max((row["conflict_share"] for row in document["rows_ranked"]), default=0)
    return sentence + (f"; in one row they are {percent(worst)}." if worst else ".")


def _landscape(document: dict, drawer: Drawer) -> Section:
    on_policy = document["on_policy"]
    maps = {"The training data": document["landscape"]}
    if on_policy:
        maps["Text that the model wrote itself"] = on_policy["landscape"]
    pictures = []
    for name, (title, landscape) in zip(("landscape", "landscape_on_policy"), maps.items()):
        label = (
            f"{title}: {landscape['tokens']:,} tokens by the model's entropy and the label's probability; "
            f"{landscape['conflicts']:,} of them are confident conflicts, in the outlined corner."
        )
        pictures.append(drawer.picture(name, landscape_figure(landscape, title), label))
    columns = {"training data": document["summary"]}
    if on_policy:
        columns["written by the model"] = on_policy["summary"]
    blocks = [Gallery(pictures), _means(columns), *_quadrants(document)]
    return Section("landscape", "Landscape of the tokens", blocks)


def _means(columns: dict[str, dict]) -> Table:
    rows = [
        ["cross-entropy, nats a token", *(number(one.get("nll")) for one in columns.values())],
        ["entropy of the model, nats", *(number(one.get("entropy")) for one in columns.values())],
        ["mean gate", *(number(one.get("gate")) for one in columns.values())],
        ["confident conflicts", *(percent(one.get("conflict_share")) for one in columns.values())],
        ["label is the model's first choice", *(percent(one.get("accuracy")) for one in columns.values())],
    ]
    return Table("Means over the tokens", ["", *columns], rows, numeric=range(1, 1 + len(columns)))


def _quadrants(document: dict) -> list[Table]:
    rows = [
        [one["name"], percent(one["tokens"]), percent(one["gradient"]), percent(one["gated_gradient"])]
        for one in document["quadrants"]
    ]
    head = ("tokens with", "of the tokens", "of the gradient's norm", "of it under the gate")
    return [Table("Who pulls at the weights", head, rows, numeric=(1, 2, 3), stack=True)] if rows else []


def conflict_sections(document: dict | None) -> list[Section]:
    """The confident conflicts of an inspection with their text; none where there was none."""
    if not document or not document["conflicts"]:
        return []
    found = document["conflicts"]
    items = [_conflict(one) for one in found[:_CONFLICTS]]
    words = (
        "The label is underlined, and what the model was sure of stands after it in italics. A name or a number that it "
        "can not know is what training is for; a slip, a wrong label or noise is not."
    )
    seen, kept = document["conflicts_seen"], document["conflicts_kept"]
    all_ = "all of them are" if kept == seen else f"the worst {kept:,} are"
    rest = f" The worst {len(items):,} of {seen:,} are shown; {all_} in conflicts.jsonl." if len(items) < seen else ""
    blocks = [Text(words + rest), Conflicts(items), *_common(document["common_conflicts"])]
    return [Section("conflicts", "Worst conflicts", blocks)]


def _common(pairs: list[dict]) -> list[Table]:
    rows = [
        [start_of(visible(one["label"]), _TOKEN), start_of(visible(one["predicted"]), _TOKEN), f"{one['count']:,}"]
        for one in pairs[:_COMMON]
        if one["count"] > 1
    ]
    head = ("label", "what the model was sure of", "times")
    return [Table("The same conflict again", head, rows, numeric=(2,))] if rows else []


def _conflict(one: dict) -> Conflict:
    facts = (
        f"probability of the label {one['probability']:.2g}, of the model's token {number(one['predicted_probability'], 2)}; "
        f"entropy {number(one['entropy'], 2)} nats; token {one['position']:,} of {one['origin']}"
    )
    return Conflict(
        end_of(one["before"], _CONTEXT),
        start_of(visible(one["label"]), _TOKEN),
        start_of(one["after"], _CONTEXT // 2),
        start_of(visible(one["predicted"]), _TOKEN),
        facts,
    )


def _rows(document: dict) -> list[Section]:
    ranked = document["rows_ranked"]
    if not ranked:
        return []
    rows = [
        [
            end_of(one["origin"], 60),
            one["because_of"],
            f"{one['conflicts']:,} of {one['tokens']:,}",
            percent(one["conflict_share"]),
            number(one["nll"]),
            f"{one['duplicates']:,}" if one["duplicates"] else "",
            start_of(one["text"], _ROW_TEXT),
        ]
        for one in ranked[:_ROWS]
    ]
    head = ("row", "because of", "conflicts", "share", "nats a token", "copies", "text")
    note = left_out(len(rows), document["rows"], "rows", "rows.jsonl")
    words = (
        "Rows that stand out by confident conflicts, by their loss, or because the same text comes again: wrong labels and "
        "copied noise tend to be at the top."
    )
    table = Table("Rows, those to look at first", head, rows, numeric=(1, 2, 3, 4), long=(5,), stack=True, note=note)
    return [Section("rows", "Rows to look at", [Text(words), table])]


def _where(document: dict) -> list[Section]:
    head = ("tokens", "mean gate", "conflicts", "nats a token")
    tables = []
    if document["positions"]:
        rows = [
            [_span(one), f"{one['tokens']:,}", number(one["gate"]), percent(one["conflict_share"]), number(one["nll"])]
            for one in document["positions"][:_LINES]
        ]
        note = left_out(len(rows), len(document["positions"]), "positions", _FILE)
        tables.append(
            Table("By position in the answer", ["position", *head], rows, numeric=(1, 2, 3, 4), stack=True, note=note)
        )
    if document["sources"]:
        rows = [
            [
                start_of(one["source"], 120), f"{one['rows']:,}", f"{one['tokens']:,}", number(one["gate"]),
                percent(one["conflict_share"]), number(one["nll"]),
            ]
            for one in document["sources"][:_LINES]
        ]  # fmt: skip
        note = left_out(len(rows), len(document["sources"]), "sources", _FILE)
        tables.append(
            Table("By source", ["source", "rows", *head], rows, numeric=(1, 2, 3, 4, 5), stack=True, note=note)
        )
    return [Section("where", "Positions and sources", tables)] if tables else []


def _span(one: dict) -> str:
    if one["from"] == one["to"]:
        return f"{one['from']:,}"
    return f"{one['from']:,} and on" if one["to"] is None else f"{one['from']:,} to {one['to']:,}"
