"""The tables of `eaftdrope ttt eval`, for the terminal and for the page: each is a head and lines of text."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

from ..long_context.retrieval import wilson
from ..scores import score_units
from ..table import NOTE, TextTable, as_table, comparison_lines, error_text, number_text
from .arms import ARMS
from .latency import READERS, PositionCost, crossover
from .needle import DIGITS, GUESSING, PLACES
from .passages import counted
from .plan import TTTEvalPlan
from .positions import Difference, PositionLosses
from .results import Measured, of_document
from .retention import STATES

if TYPE_CHECKING:
    from rich.table import Table

LIMITS = (
    "TTT compresses what it has read, as a summary does; it does not recall it. What lies outside the window cannot be "
    "quoted; the needle measures it. The first {chunk:,} tokens are read with the initial weights, so TTT cannot change "
    "their loss, and a prompt of at most {chunk:,} tokens gets nothing from it."
)
"""What every reader of these numbers has to know; `chunk` is to be filled in."""

PAIRS = (
    ("window", "full"),
    ("sink", "full"),
    ("sink", "window"),
    ("naive", "sink"),
    ("control", "sink"),
    ("control-naive", "control"),
    ("ttt", "full"),
    ("ttt", "sink"),
    ("ttt", "naive"),
    ("ttt", "control"),
    ("ttt", "control-naive"),
    ("ttt", "off"),
)
"""Differences worth a line: the first arm minus the second."""

READER_TITLES = dict(zip(READERS, ("full attention", "window", "TTT"), strict=True))


def tables_of(document: dict) -> list[TextTable]:
    """Return the tables of a document; what was not measured has none."""
    found, settings = of_document(document), document["settings"]
    tables = [
        _losses(found, settings),
        _differences(found),
        _pairs(found, settings),
        _rates(found),
        _needles(found, settings),
        _latency(found, settings),
        *(_retention(found, arm, settings) for arm in dict.fromkeys(arm for arm, _ in found.retention)),
        _absent(document),
    ]
    return [table for table in tables if table.lines]


def cost_table(plan: TTTEvalPlan) -> Table:
    """Return the table of a plan: cells and tokens by arm and probe."""
    cells = Counter((cell.arm, cell.probe) for cell in plan.cells)
    tokens: Counter[tuple[str, str]] = Counter()
    for cell in plan.cells:
        tokens[cell.arm, cell.probe] += plan.tokens(cell)
    lines = [
        [ARMS[arm].title if arm else "in turn", probe, f"{count:,}", f"{tokens[arm, probe]:,}"]
        for (arm, probe), count in cells.items()
    ]
    lines.append(["all", "", f"{len(plan.cells):,}", f"{tokens.total():,}"])
    return as_table(TextTable("What will be measured", ["arm", "probe", "cells", "tokens"], lines))


def _losses(found: Measured, settings: dict) -> TextTable:
    window = settings["window"]
    lines = []
    for arm, losses in found.losses.items():
        beyond = losses.mean(window)
        means = [number_text(score.value, "mean") for score in losses.by_bin()]
        lines.append([ARMS[arm].title, *means, number_text(beyond.value, "mean") + error_text(beyond.stderr, "mean")])
    note = (
        f"Nats per token, mean of {_passages(found)} of {settings['length']:,} tokens. Position t is the prediction of the "
        f"token after t + 1 tokens; beyond: positions from {window:,} (the window). ± is one standard error over passages; "
        "between arms, use the paired differences below."
    )
    return TextTable("Loss by position", ["arm", *_bins(found), "beyond"], lines, note)


def _differences(found: Measured) -> TextTable:
    full = found.losses.get("full")
    if full is None:
        return TextTable("", [], [])
    lines = [
        [ARMS[arm].title, *(difference_text(losses.minus(full, a, b)) for a, b in pairwise(losses.edges))]
        for arm, losses in found.losses.items()
        if arm != "full"
    ]
    note = "Nats per token more than full attention, paired over passages; ± is one standard error of the difference."
    return TextTable("Difference to full attention by position", ["arm", *_bins(found)], lines, note)


def _pairs(found: Measured, settings: dict) -> TextTable:
    window, lines = settings["window"], []
    for first, second in PAIRS:
        if first in found.losses and second in found.losses:
            mine, other = found.losses[first], found.losses[second]
            difference = mine.minus(other, window)
            name = f"{ARMS[first].title} − {ARMS[second].title}"
            lines.append([name, difference_text(difference), f"{_wins(mine, other, window)} of {_shared(mine, other)}"])
    note = f"Nats per token at positions from {window:,} on; lower: passages in which the first arm has the lower loss."
    return TextTable("Paired differences beyond the window", ["", "difference", "lower"], lines, note)


def _rates(found: Measured) -> TextTable:
    rates = list(dict.fromkeys(rate for fit in found.fits.values() for rate in fit.losses))
    lines = [
        [
            ARMS[arm].title,
            *(number_text(fit.losses[rate], "mean") if rate in fit.losses else "–" for rate in rates),
            f"{fit.best:g}" + (" (edge)" if fit.at_edge else ""),
        ]
        for arm, fit in found.fits.items()
    ]
    passages = max((fit.passages for fit in found.fits.values()), default=0)
    note = f"Nats per token, all positions of {counted(passages)} that are not test text."
    if any(fit.at_edge for fit in found.fits.values()):
        note += " (edge): the end of the grid is best, so a rate beyond it may be better; pass a wider grid with --lr."
    return TextTable("Inner rate of naive TTT", ["arm", *(f"{rate:g}" for rate in rates), "used"], lines, note)


def _needles(found: Measured, settings: dict) -> TextTable:
    lines = []
    for arm in dict.fromkeys(arm for arm, _ in found.needles):
        line = [ARMS[arm].title]
        for where in PLACES:
            answers = found.needles.get((arm, where))
            if not answers:
                line += ["–", "–"]
                continue
            units = [(answer.nll, 1.0) for answer in answers]
            nll = score_units("needle", "general", "nats", units, kind="mean", better="lower")
            low, high = wilson(sum(answer.right for answer in answers), len(answers))
            right = sum(answer.right for answer in answers)
            line += [
                number_text(nll.value, "exp") + error_text(nll.stderr, "exp"),
                f"{right}/{len(answers)} ({100 * low:.0f}–{100 * high:.0f} %)",
            ]
        lines.append(line)
    head = ["arm", *(column for where in PLACES for column in (f"{where}: nats", f"{where}: exact"))]
    note = (
        f"{DIGITS} digits hidden in the text: summed loss of the digits (guessing: {GUESSING:.1f}), and greedy answers that "
        f"are exactly right with the 95 % Wilson interval. Outside: the needle is {2 * settings['window']:,} tokens back, "
        "twice the window."
    )
    return TextTable("Needle", head, lines, note)


def _latency(found: Measured, settings: dict) -> TextTable:
    lines = []
    for position, costs in sorted(found.costs.items()):
        ordered = [costs.get(reader) for reader in READERS]
        lines.append(
            [
                f"{position:,}",
                _costs(ordered, lambda cost: f"{1e3 * cost.chunk_seconds:,.0f}"),
                _costs(ordered, lambda cost: f"{1e3 * cost.token_seconds:,.1f}"),
                _costs(ordered, lambda cost: f"{cost.nbytes / 1e6:,.3g}"),
            ]
        )
    note = (
        f"{' / '.join(READER_TITLES.values())}; medians; chunks of {settings['ttt']['chunk']:,} tokens. "
        f"{crossover_sentence(found)}"
    )
    return TextTable("Latency and memory", ["position", "ms per chunk", "ms per token", "MB of state"], lines, note)


def crossover_sentence(found: Measured) -> str:
    """Return from which position TTT is faster than full attention, in words; "" if full attention was not measured."""
    parts = []
    if not any("full" in costs for costs in found.costs.values()):
        return ""
    for what, attribute in (("reads", "chunk_seconds"), ("decodes", "token_seconds")):
        seconds = {
            position: {reader: getattr(costs[reader], attribute) for reader in ("full", "ttt") if reader in costs}
            for position, costs in found.costs.items()
        }
        at = crossover(seconds)
        if at is None:
            parts.append(f"{what} slower than full attention up to {max(seconds):,} tokens")
        elif at <= min(seconds):
            parts.append(f"{what} faster from {min(seconds):,} tokens or fewer")
        else:
            parts.append(f"{what} faster from about {_rounded(at):,} tokens")
    return f"TTT {' and '.join(parts)}."


def _retention(found: Measured, arm: str, settings: dict) -> TextTable:
    fresh, read = (found.retention.get((arm, state)) for state in STATES)
    if not fresh or not read:
        return TextTable("", [], [])
    lines = [[line.name, line.before, line.after, line.change, line.verdict] for line in comparison_lines(fresh, read)]
    title = f"Retention: {ARMS[arm].title} that has read {settings['read']:,} tokens"
    return TextTable(title, ["probe", "fresh", "after reading", "change", ""], lines, NOTE)


def _absent(document: dict) -> TextTable:
    lines = [[ARMS[arm].title, reason] for arm, reason in document["absent"].items()]
    return TextTable("Not measured", ["arm", "reason"], lines, names=2)


def difference_text(difference: Difference) -> str:
    """Return `+0.068 ± 0.004`; no error for a single passage, or if all passages have the same difference."""
    return number_text(difference.value, "mean", signed=True) + error_text(difference.stderr, "mean")


def _bins(found: Measured) -> list[str]:
    edges = next(iter(found.losses.values())).edges if found.losses else ()
    return [f"{a}–{b}" for a, b in pairwise(edges)]


def _wins(first: PositionLosses, second: PositionLosses, window: int) -> int:
    count = _shared(first, second)
    sides = [one.mean(window).units[:count] for one in (first, second)]
    return sum(mine[0] / mine[1] < other[0] / other[1] for mine, other in zip(*sides, strict=True))


def _shared(first: PositionLosses, second: PositionLosses) -> int:
    return min(len(first.sums), len(second.sums))


def _passages(found: Measured) -> str:
    counts = sorted({len(losses.sums) for losses in found.losses.values()})
    return (
        counted(counts[0])
        if len(counts) == 1
        else f"{counts[0] if counts else 0} to {counted(counts[-1] if counts else 0)}"
    )


def _costs(costs: list[PositionCost | None], text) -> str:
    return " / ".join("–" if cost is None else text(cost) for cost in costs)


def _rounded(position: float) -> int:
    """Two significant digits: the position is interpolated."""
    return int(float(f"{position:.2g}"))
