"""Tables of what is measured so far, in Markdown: losses, paired differences, pass key, fitted rates, trainings.

A difference is paired: the same passages under two arms. Its standard error is over passages, of the mean over seeds; an
interval of that kind covers other passages of this text, and not other texts or seeds, whose spread is shown beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from eaftdrope.evaluate.long_context.retrieval import wilson

from . import plan
from .document import Document, beyond, mean_loss
from .plan import LEARNING, LONG, ORIGINAL, SHORT, Evaluate, Train, as_trained, best

BINS = ((0, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048), (256, None))
TITLES = {
    "full": "full attention",
    "window": "window, no sink",
    "sink": "window + sink",
    "prime": "naive TTT, prime",
    "in_place": "naive TTT, in place",
    "warmup": f"naive TTT, prime, rate warm-up ({plan.WARMUP} chunks)",
    "muon": "naive TTT, prime, Muon steps",
    "muon_warmup": "naive TTT, prime, Muon steps, rate warm-up",
}
Losses = list[list[float]]
"""By passage and chunk."""


def passages(found: Document, task: Evaluate) -> Losses | None:
    return found.entry(task)["values"] if found.has(task) else None


def naive(found: Document, weights: str, reads: str, fit_on: str | None = None) -> Evaluate | None:
    """The test measurement of a fitted arm; None before the fit."""
    losses = found.fit(fit_on or weights, reads)
    return Evaluate(weights, reads, best(losses), "test") if losses else None


def trained_arms(found: Document, budget: int, seed: int) -> dict[str, Evaluate]:
    """The test measurements of one seed's trainings that exist, by name."""
    meta = Train("meta", budget, seed)
    arms: dict[str, Evaluate | None] = {}
    if found.has(meta):
        arms["meta"] = as_trained(found, meta)
        arms["meta, TTT off"] = Evaluate(found.weights(meta), "sink", 0.0, "test")
        arms["meta, rate fitted"] = naive(found, found.weights(meta), "prime")
        if found.has(Train("control", budget, seed)):
            for equal in plan.EQUAL:
                weights, first = (found.control(budget, at, equal) for at in (seed, plan.SEEDS[0]))
                arms[f"control, equal {equal}"] = Evaluate(weights, "sink", 0.0, "test")
                arms[f"control, equal {equal}, naive TTT"] = naive(found, weights, "prime", first)
    for name, arm in (("meta, in place", "meta_in_place"), ("meta, Muon steps", "meta_muon")):
        if found.has(training := Train(arm, budget, seed)):
            arms[name] = as_trained(found, training)
    return {name: task for name, task in arms.items() if task is not None and found.has(task)}


def all_arms(found: Document) -> dict[str, list[Evaluate]]:
    """The finished test measurements by the arm's title: one, or one per seed."""
    arms: dict[str, list[Evaluate]] = {}
    for reads in ("full", "window", "sink"):
        arms[TITLES[reads]] = [Evaluate(ORIGINAL, reads, 0.0, "test")]
    for reads in LEARNING:
        arms[TITLES[reads]] = [task for task in [naive(found, ORIGINAL, reads)] if task is not None]
    for budget in (SHORT, LONG):
        for seed in plan.SEEDS:
            for name, task in trained_arms(found, budget, seed).items():
                arms.setdefault(f"{name}, {budget // 60} CPU min", []).append(task)
    finished = {title: [task for task in tasks if found.has(task)] for title, tasks in arms.items()}
    return {title: tasks for title, tasks in finished.items() if tasks}


def paired(first: Sequence[Losses], second: Sequence[Losses]) -> tuple[float, float, list[float]]:
    """Return the mean difference beyond the window, its standard error over passages, and the difference of each seed."""
    by_seed = [
        [beyond(a) - beyond(b) for a, b in zip(ours, theirs, strict=True)]
        for ours, theirs in zip(first, second, strict=True)
    ]
    by_passage = [statistics.mean(values) for values in zip(*by_seed, strict=True)]
    error = statistics.stdev(by_passage) / len(by_passage) ** 0.5
    return statistics.mean(by_passage), error, [statistics.mean(values) for values in by_seed]


COMPARED = (
    ("meta", "control, equal tokens"),
    ("meta", "control, equal tokens, naive TTT"),
    ("meta, rate fitted", "control, equal tokens, naive TTT"),
    ("meta", "control, equal time"),
    ("meta", "control, equal time, naive TTT"),
    ("meta", "meta, TTT off"),
    ("meta", "meta, in place"),
    ("meta, Muon steps", "meta"),
    ("meta, TTT off", "control, equal tokens"),
    ("control, equal tokens, naive TTT", "control, equal tokens"),
    ("control, equal time, naive TTT", "control, equal time"),
)


def differences(found: Document, budget: int) -> list[tuple[str, float, float, list[float]]]:
    """Paired differences between the trained arms, over the seeds that have both."""
    seeds = [trained_arms(found, budget, seed) for seed in plan.SEEDS]
    result = []
    for first, second in COMPARED:
        both = [(arms[first], arms[second]) for arms in seeds if first in arms and second in arms]
        if both:
            ours, theirs = ([found.entry(task)["values"] for task in side] for side in zip(*both, strict=True))
            result.append((f"{first} - {second}", *paired(ours, theirs)))
    return result


def untrained_differences(found: Document) -> list[tuple[str, float, float, list[float]]]:
    """Paired differences between the original's arms and its window + sink."""
    arms = {title: tasks[0] for title, tasks in all_arms(found).items() if tasks[0].weights == ORIGINAL}
    sink = arms.pop(TITLES["sink"], None)
    if sink is None:
        return []
    values = [found.entry(sink)["values"]]
    return [
        (f"{title} - window + sink", *paired([found.entry(task)["values"]], values)) for title, task in arms.items()
    ]


def tables(found: Document) -> str:
    parts = [_loss_table(found)]
    for budget in (SHORT, LONG):
        if compared := differences(found, budget):
            rows = [
                (name, f"{mean:+.4f}", f"{error:.4f}", " ".join(f"{value:+.4f}" for value in by_seed))
                for name, mean, error, by_seed in compared
            ]
            head = (f"{budget // 60} CPU min: difference beyond the window, nats", "mean", "s.e.", "by seed")
            parts.append(markdown(head, rows))
    parts += [_pass_key_table(found), _rate_table(found), _training_table(found)]
    return "\n\n".join(part for part in parts if part)


def _loss_table(found: Document) -> str:
    sink = passages(found, Evaluate(ORIGINAL, "sink", 0.0, "test"))
    rows = []
    for title, tasks in all_arms(found).items():
        losses = [found.entry(task)["values"] for task in tasks]
        rates = {f"{task.rate:g}" for task in tasks if task.rate}
        cells = [_mean_over(losses, start, stop) for start, stop in BINS]
        seconds = statistics.mean(found.entry(task)["cpu_seconds"] / len(found.entry(task)["values"]) for task in tasks)
        against = ""
        if sink is not None:
            mean, error, _ = paired(losses, [sink] * len(losses))
            against = f"{mean:+.4f} ({error:.4f})"
        row = (title, str(len(tasks)), ", ".join(sorted(rates)), *(f"{cell:.3f}" for cell in cells), against)
        rows.append((*row, f"{seconds:.1f}"))
    bins = [f"{start}-{stop}" if stop else "beyond" for start, stop in BINS]
    return markdown(("arm", "runs", "rate", *bins, "beyond, minus window + sink (s.e.)", "CPU s per passage"), rows)


def _mean_over(losses: Iterable[Losses], start: int, stop: int | None) -> float:
    return statistics.mean(mean_loss(values, start, stop) for run in losses for values in run)


def _pass_key_table(found: Document) -> str:
    rows = []
    for entry in found.content["pass_keys"].values():
        if not entry["finished"]:
            continue
        losses, exact = zip(*entry["values"], strict=True)
        low, high = wilson(sum(exact), len(exact))
        error = statistics.stdev(losses) / len(losses) ** 0.5
        found_keys = f"{sum(exact)} of {len(exact)} ({low:.2f} to {high:.2f})"
        cells = (f"{entry['gap']}", f"{statistics.mean(losses):.2f} ({error:.2f})", found_keys)
        rows.append((f"{TITLES[entry['reads']]}, {entry['weights']}", f"{entry['rate']:g}", *cells))
    return markdown(("pass key", "rate", "gap", "loss of the five digits (s.e.)", "exact (95 % interval)"), rows)


def _rate_table(found: Document) -> str:
    fitted = {
        (entry["weights"], entry["reads"]) for entry in found.content["losses"].values() if entry["text"] == "fit"
    }
    rows = []
    for weights, reads in sorted(fitted):
        losses = found.fit(weights, reads)
        cells = [f"{losses[rate]:.4f}" if rate in losses else "" for rate in plan.LADDER]
        rows.append((f"{TITLES[reads]}, {weights}", *cells))
    return markdown(("loss beyond the window on the fit passages, by rate", *map(str, plan.LADDER)), rows)


def _training_table(found: Document) -> str:
    rows = []
    for key, entry in found.content["trainings"].items():
        losses = entry["values"]
        quarter = max(1, len(losses) // 4)
        ends = (
            [f"{statistics.mean(part):.3f}" for part in (losses[:quarter], losses[-quarter:])] if losses else ["", ""]
        )
        per_row = f"{entry['cpu_seconds'] / max(1, len(losses)):.2f}"
        state = "finished" if entry["finished"] else "interrupted"
        rows.append((key, state, str(len(losses)), f"{entry['cpu_seconds']:.0f}", per_row, *ends))
    head = ("training", "", "rows", "CPU s", "CPU s per row", "loss, first quarter", "loss, last quarter")
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, or nothing without rows."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""
