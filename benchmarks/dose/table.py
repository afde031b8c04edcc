"""The tables of the study: the arms, the verdicts, and the costs."""

from __future__ import annotations

import statistics

from . import plan
from .measures import FACTS, TARGET, TEXT
from .plan import DoseCell
from .results import DoseResults
from .rule import ShareVerdict, verdicts

_METRICS = (TARGET, FACTS, TEXT)


def groups(results: DoseResults) -> list[tuple[str, str, tuple[int, ...]]]:
    """Model, kind and shares of what is judged together: the main shares and those between are two families."""
    shares = (plan.MAIN_SHARES, plan.BETWEEN_SHARES)
    models = (plan.SMOLLM2, *plan.LLAMAS)
    found = [(model, "conflict", family) for model in models for family in shares]
    found += [(plan.SMOLLM2, kind, (40,)) for kind in ("schema", "spelling")]
    return [group for group in found if any(_cells(results, *group))]


def _cells(results: DoseResults, model: str, kind: str, shares: tuple[int, ...]) -> list[DoseCell]:
    cells = [DoseCell(model, kind, share, seed) for share in shares for seed in plan.SEEDS]
    return [cell for cell in cells if results.cell(cell)["arms"]]


def tables(results: DoseResults) -> str:
    """All tables in Markdown."""
    parts = []
    for model, kind, shares in groups(results):
        parts += [f"**{model}, {kind}**", _arms(results, model, kind, shares), _verdicts(results, model, kind, shares)]
    return "\n\n".join([*parts, _costs(results)])


def _arms(results: DoseResults, model: str, kind: str, shares: tuple[int, ...]) -> str:
    base = results.base(model)
    lines = [
        "| % of rows | arm | seeds | mean gate | held-out loss | facts, % | perplexity | at equal target loss: facts, % "
        "| perplexity |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| | base | | | {' | '.join(_value(metric, [base[metric].value]) for metric in _METRICS)} | | |",
    ]
    for share in shares:
        cells = _cells(results, model, kind, (share,))
        for arm in plan.ARMS:
            found = [results.scores(cell, arm) for cell in cells]
            trained = [scores for scores in found if scores]
            if not trained:
                continue
            equal = [scores for cell in cells if (scores := results.scores(cell, arm, equal=True))]
            gates = [results.cell(cell)["arms"][arm]["mean_gate"] for cell, scores in zip(cells, found) if scores]
            shown = [_value(metric, [scores[metric].value for scores in trained]) for metric in _METRICS]
            shown += [_value(metric, [scores[metric].value for scores in equal]) for metric in (FACTS, TEXT)]
            lines.append(f"| {share} | {arm} | {len(trained)} | {statistics.mean(gates):.3f} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _value(metric: str, values: list[float]) -> str:
    """The mean, with the standard deviation over seeds."""
    if not values:
        return ""
    scale, digits = {TARGET: (1, 3), FACTS: (100, 1), TEXT: (1, 2)}[metric]
    values = [scale * value for value in values]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _verdicts(results: DoseResults, model: str, kind: str, shares: tuple[int, ...]) -> str:
    lines = [
        "| % of rows | confident conflicts that `inspect` reports | arm | facts at equal target loss | perplexity | gain "
        "| verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in plan.ARMS:
        if arm != "none":
            lines += [_verdict_line(one) for one in verdicts(results, model, kind, shares, arm)]
    return "\n".join(lines)


def _verdict_line(one: ShareVerdict) -> str:
    mean, low, high = one.inspected
    inspected = f"{mean:.2%} ({low:.2%} to {high:.2%})"
    cells = [str(one.share), inspected, one.arm, one.facts.text, one.text.text, f"{one.gain:.0%}"]
    return f"| {' | '.join(cells)} | **{one.word}**: {one.because} |"


def _costs(results: DoseResults) -> str:
    seconds: dict[str, list[float]] = {}
    for key, cell in results.content["cells"].items():
        for entry in cell["arms"].values():
            spent = entry["cpu_seconds"] + entry.get("matched", {}).get("cpu_seconds", 0.0)
            seconds.setdefault(key.split(",")[0], []).append(spent)
    lines = ["| model | arms | CPU seconds per arm | in all |", "|---|---|---|---|"]
    for model, spent in seconds.items():
        lines.append(f"| {model} | {len(spent)} | {statistics.mean(spent):.0f} | {sum(spent):.0f} |")
    return "\n".join(lines)
