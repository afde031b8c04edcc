"""Results of `eaftdrope context`: how far the context of a model reaches."""

from __future__ import annotations

from pathlib import Path

from eaftdrope.evaluate.long_context.table import CAPTION, result_lines, rows_of, suite_lines
from eaftdrope.files import read_json

from ..blocks import Gallery, Page, PageSection, TableBlock
from ..figures.context import context_figures
from ..render import FigureWriter
from ..words import listing, plural
from .about import about_section

_WORDS = {
    "probe_needles_by_depth": "Share of needles found by depth (down) and length (across), in percent.",
    "probe_needles_by_length": "Share of correct answers by length, with 95 % intervals; dotted: the trained length.",
    "probe_perplexity_by_length": "Perplexity of whole windows by length; bars are one standard error.",
    "probe_perplexity_by_position": "Perplexity along the longest windows; dotted: the trained length.",
    "probe_attention_by_length": "Attention on the needle by length; grey: uniform attention over all tokens.",
}
# Inches. A wider figure has several panels.
_NARROW = 5


def context_page(folder: Path, writer: FigureWriter) -> Page:
    """Return the page of a folder with probe.json."""
    document = read_json(folder / "probe.json")
    rows = rows_of(document)
    blocks = []
    for caption, (head, lines), note in (
        ("By length", result_lines(rows), CAPTION),
        ("Suites (lm-eval)", suite_lines(rows), ""),
    ):
        if lines:
            blocks.append(TableBlock(caption, head, lines, numeric=range(1, len(head)), note=note))
    pictures = [
        writer.picture(name, figure, _WORDS[name], wide=figure.get_figwidth() > _NARROW)
        for name, figure in context_figures(document, rows).items()
    ]
    sections = [PageSection("outcome", "How far the context reaches", blocks)]
    if pictures:
        sections.append(PageSection("figures", "Figures", [Gallery(pictures)]))
    settings = document["settings"]
    text = ("Text", settings["text"]["name"])
    sections.append(
        about_section(document, text, ("Arithmetic", settings["dtype"]), ("Notes", "\n".join(document["notes"])))
    )
    return Page("Long context", folder.resolve().name, _summary(document, rows), sections)


def _summary(document: dict, rows: list[dict]) -> str:
    models = [model["name"] for model in document["settings"]["models"]]
    lengths = sorted({row["length"] for row in rows})
    if not lengths:
        return "This measurement is not finished: nothing has been measured yet."
    found = []
    for row in rows:
        if (row["probe"], row["metric"], row["at"], row["arm"]) == ("niah", "accuracy", None, "as is"):
            share = f"{100 * row['value']:.0f} % of the needles"
            found.append(f"{row['model']} finds {share} at {row['length']:,} tokens ({row['multiple']})")
    if not found:
        return f"{listing(models)} at {plural(len(lengths), 'length')} up to {lengths[-1]:,} tokens."
    longest = max(row["length"] for row in rows)
    return "; ".join([text for text in found if f" {longest:,} tokens" in text] or found[-1:]) + "."
