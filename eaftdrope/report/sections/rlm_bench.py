"""Results of `eaftdrope rlm bench`: a recursive language model beside its baselines, by task and length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from eaftdrope.evaluate.rlm.table import cells_of, crossover_sentences, tables_of
from eaftdrope.files import read_json

from ..blocks import Gallery, Page, PageSection, TableBlock, Text
from ..figures.rlm_bench import bench_figures
from ..render import FigureWriter
from ..words import plural
from .about import about_section
from .rlm_runs import strategy_section, summaries_in

_WORDS = {
    "rlm_accuracy_by_length": "Share of right answers by length of the context, with 95 % Wilson intervals. The arm guess "
    "does not read the context; the arm oracle is a scripted root and sub-model, the ceiling of the harness.",
    "rlm_steps": "How far the roots of the RLM came, by length of the context, with 95 % Wilson intervals.",
    "rlm_cost_by_length": "Tokens per trial, read and written by all models, by length of the context: the median, with a "
    "line up to the 95th percentile.",
}
# Inches. A wider figure has several panels.
_NARROW = 5


def rlm_bench_page(folder: Path, writer: FigureWriter) -> Page:
    """Return the page of a folder with rlm_bench.json."""
    document = read_json(folder / "rlm_bench.json")
    cells = cells_of(document)
    pictures = {
        name: writer.picture(name, figure, _WORDS[name], wide=figure.get_figwidth() > _NARROW)
        for name, figure in bench_figures(cells).items()
    }
    tables = [
        TableBlock(table.title, table.head, table.lines, numeric=range(table.names, len(table.head)), note=table.note)
        for table in tables_of(document)
    ]
    crossover = crossover_sentences(cells)
    sections = [PageSection("outcome", "Beside the baselines", [*map(Text, filter(None, [crossover])), *tables])]
    if pictures:
        sections.append(PageSection("figures", "Figures", [Gallery(list(pictures.values()))]))
    runs = summaries_in(folder / "journals")
    if runs:
        sections.append(strategy_section(runs, writer, _scores(folder)))
    sections.append(about_section(document, *_facts(document)))
    return Page("RLM bench", folder.resolve().name, _summary(document, crossover), sections)


def _scores(folder: Path) -> Mapping[str, float]:
    return {name.removesuffix(".jsonl"): score for name, score in (read_json(folder / "scores.json") or {}).items()}


def _summary(document: dict, crossover: str) -> str:
    done = sum(len(cell["trials"]) for cell in document["cells"])
    planned = document.get("planned", done)
    if done < planned:
        return f"This measurement is not finished: {done:,} of {plural(planned, 'trial')} are measured."
    # the first sentence is about the plain call
    return crossover.split(". ")[0].removesuffix(".") + "." if crossover else f"{plural(done, 'trial')}."


def _facts(document: dict) -> list[tuple[str, str | None]]:
    settings = document["settings"]
    errors = settings["classifier_errors"]
    limits = ", ".join(f"{name} {value:,}" for name, value in settings["limits"].items() if name != "seconds")
    return [
        ("Model", settings["model"]),
        (
            "Sub-model",
            settings["sub_model"] if errors is None else f"scripted, wrong in {100 * errors:g} % of its replies",
        ),
        ("Endpoint", settings["endpoint"]),
        ("Tasks", f"names {settings['names']}, phrasings {settings['phrasings']}"),
        ("System prompt", "short" if settings["short_prompt"] else None),
        ("Limits", limits),
        ("Arithmetic", settings["dtype"]),
    ]
