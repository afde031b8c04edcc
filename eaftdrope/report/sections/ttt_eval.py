"""Results of `eaftdrope ttt eval`: what learning while reading adds, beside every control."""

from __future__ import annotations

from pathlib import Path

from eaftdrope.evaluate.ttt.arms import ARMS
from eaftdrope.evaluate.ttt.results import Measured, of_document
from eaftdrope.evaluate.ttt.table import LIMITS, crossover_sentence, difference_text, tables_of
from eaftdrope.files import read_json

from ..blocks import Gallery, Page, PageSection, TableBlock, Text
from ..figures.ttt_eval import ttt_figures
from ..render import FigureWriter
from .about import about_section

_WORDS = {
    "ttt_loss_by_position": "Loss by position in a passage, mean over passages.",
    "ttt_difference_to_full": "Loss more than that of full attention by position; bars are one standard error of the paired "
    "difference.",
    "ttt_latency": "Time per chunk read and per token decoded, by context position.",
}
# Lines of text in a numeric column would be cut on a phone.
_RUNNING = ("Not measured",)
_NARROW = 5


def ttt_page(folder: Path, writer: FigureWriter) -> Page:
    """Return the page of a folder with ttt.json."""
    document = read_json(folder / "ttt.json")
    found, settings = of_document(document), document["settings"]
    blocks: list[object] = [Text(LIMITS.format(chunk=settings["ttt"]["chunk"]))]
    for table in tables_of(document):
        running = table.title in _RUNNING
        numeric = () if running else range(1, len(table.head))
        long = (1,) if running else ()
        blocks.append(
            TableBlock(table.title, table.head, table.lines, numeric=numeric, long=long, stack=running, note=table.note)
        )
    pictures = [
        writer.picture(name, figure, _WORDS[name], wide=figure.get_figwidth() > _NARROW)
        for name, figure in ttt_figures(found, settings["window"], settings["ttt"]["chunk"]).items()
    ]
    sections = [PageSection("outcome", "What learning while reading adds", blocks)]
    if pictures:
        sections.append(PageSection("figures", "Figures", [Gallery(pictures)]))
    sections.append(about_section(document, *_facts(document)))
    return Page("Test-time training", folder.resolve().name, _summary(document, found), sections)


def _facts(document: dict) -> list[tuple[str, str | None]]:
    settings = document["settings"]
    ttt = settings["ttt"]
    fit = settings["fit_text"]["name"] if settings["fit_text"] else "the end of the same texts"
    shown = ", ".join(f"{name} {ttt[name]}" for name in ("window", "sink", "chunk", "layout", "lr", "clip"))
    return [
        ("Model", settings["model"]["reference"]),
        ("Base", settings["base"] and settings["base"]["reference"]),
        ("Control", settings["control"] and settings["control"]["reference"]),
        ("TTT", shown + ("" if settings["trained"] else " (not trained)")),
        ("Text", settings["text"]["name"]),
        ("Text of the fit", fit if settings["fit_passages"] else None),
        ("Arithmetic", settings["dtype"]),
        ("Notes", "\n".join(document["notes"])),
    ]


def _summary(document: dict, found: Measured) -> str:
    if len(document["cells"]) < document["planned"]:
        return "This measurement is not finished: the page shows what has been measured so far."
    window = document["settings"]["window"]
    learning = next((arm for arm in ("ttt", "naive") if arm in found.losses), None)
    parts = []
    for other in ("sink", "control", "full"):
        if learning and other in found.losses:
            difference = found.losses[learning].minus(found.losses[other], window)
            parts.append(f"{difference_text(difference)} against {ARMS[other].title}")
    if not parts or learning is None:
        return crossover_sentence(found) or "Parts of a measurement of test-time training."
    return (
        f"{ARMS[learning].title} beyond the window, in nats per token: {', '.join(parts)}. {crossover_sentence(found)}"
    )
