"""Many runs of a recursive language model: their strategies with the distribution of sub-calls, and a list of the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from eaftdrope.evaluate.rlm.table import percentile
from eaftdrope.rlm.journal import is_journal, read_journal
from eaftdrope.rlm.strategies import RUN_RULES, RunSummary, summary_of

from ..blocks import Gallery, Page, PageSection, TableBlock, Text
from ..figures.rlm_bench import sub_calls_figure
from ..render import FigureWriter
from ..words import left_out, percent, plural, start_of

_LISTED = 300
_QUERY_CHARS = 160


def journals_in(folder: Path) -> list[Path]:
    """The journals of a folder, by name; other files are passed over."""
    return [path for path in sorted(folder.glob("*.jsonl")) if path.is_file() and is_journal(path)]


def summaries_in(folder: Path) -> list[RunSummary]:
    """The runs of a folder of journals."""
    return [summary_of(path.stem, read_journal(path)) for path in journals_in(folder)]


def rlm_runs_page(folder: Path, writer: FigureWriter) -> Page:
    """Return the page of a folder of journals."""
    runs = summaries_in(folder)
    finished = sum(bool(run.finished) for run in runs)
    summary = f"{plural(len(runs), 'run')}, {finished:,} of which answered."
    sections = [strategy_section(runs, writer), _list(folder, runs)]
    return Page("Runs of recursive language models", folder.resolve().name, summary, sections)


def strategy_section(
    runs: Sequence[RunSummary], writer: FigureWriter, scores: Mapping[str, float] | None = None
) -> PageSection:
    """The strategies of runs, tagged by rule, with the distribution of their sub-calls.

    Args:
        scores: of runs, by their names; None if they have none.
    """
    rows, calls = [], {}
    for name, rule in RUN_RULES.items():
        found = [run for run in runs if run.strategy == name]
        if not found:
            continue
        calls[name] = [run.sub_calls for run in found]
        spread = [f"{percentile(calls[name], q):,}" for q in (0.5, 0.95, 1.0)]
        tokens = [f"{percentile([run.tokens for run in found], q):,}" for q in (0.5, 0.95)]
        answered = percent(sum(bool(run.finished) for run in found) / len(found))
        right = [] if scores is None else [percent(sum(scores.get(run.name) == 1.0 for run in found) / len(found))]
        rows.append([name, rule, f"{len(found):,}", answered, *right, *spread, *tokens])
    head = [
        "strategy",
        "rule",
        "runs",
        "answered",
        "sub-calls, median",
        "95\u00a0%",
        "most",
        "tokens, median",
        "95\u00a0%",
    ]
    if scores is not None:
        head.insert(4, "right")
    note = "The first rule that holds for the root's code and calls. Several strategies may lead to the same answer."
    table = TableBlock("Strategies", head, rows, numeric=range(2, len(head)), stack=True, note=note)
    blocks: list[object] = [table]
    label = "Runs by their number of sub-calls, stacked by strategy."
    if any(map(any, calls.values())):
        blocks.append(Gallery([writer.picture("rlm_sub_calls", sub_calls_figure(calls), label)]))
    else:
        blocks.append(Text("No run called a sub-model."))
    return PageSection("strategies", "Strategies and sub-calls", blocks)


def _list(folder: Path, runs: Sequence[RunSummary]) -> PageSection:
    states = {True: "answered", False: "stopped by a limit", None: "not ended"}
    rows = [
        [
            run.name,
            start_of(run.query, _QUERY_CHARS),
            run.strategy,
            states[run.finished],
            f"{run.turns:,}",
            f"{run.sub_calls:,}",
            f"{run.tokens:,}",
        ]
        for run in runs[:_LISTED]
    ]
    head = ("journal", "query", "strategy", "state", "turns", "sub-calls", "tokens")
    note = left_out(len(rows), len(runs), "runs", str(folder))
    words = f"eaftdrope report {folder.name}/NAME.jsonl writes the page of one run, with every turn."
    table = TableBlock("Runs", head, rows, numeric=(4, 5, 6), long=(1,), stack=True, note=note)
    return PageSection("runs", "Runs", [Text(words), table])
