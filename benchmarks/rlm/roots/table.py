"""Tables: how far the roots of each arm came, per seed, and the paired differences between arms."""

from __future__ import annotations

from math import comb

from eaftdrope.evaluate.long_context.retrieval import wilson
from eaftdrope.evaluate.rlm.trials import STEPS, TaskTrial

from . import plan
from .plan import RootCell, TrainedRoot
from .results import RootResults

NAMES = {"fence": "wrote a block", "ran": "ran", "finished": "finished", "right": "right"}
PAIRS = (("cross-entropy", "EAFT"), ("cross-entropy", "EAFT, exempt"), ("EAFT", "EAFT, exempt"))


def trials_of(results: RootResults, arm: str, task: str, phrasings: str) -> list[TaskTrial]:
    """The trials of an arm, of all seeds that are finished."""
    found = []
    for training in models(arm):
        cell = RootCell(training, task, phrasings)
        if results.done(cell):
            found += results.trials(cell)
    return found


def models(arm: str) -> list[TrainedRoot | None]:
    return [None] if arm == plan.UNTRAINED else [TrainedRoot(arm, seed) for seed in plan.SEEDS]


def shares(trials: list[TaskTrial], step: str) -> tuple[float, float, float]:
    """Share of the trials that came to a step, in %, with its 95 % Wilson interval."""
    hits = sum(bool(getattr(trial, step)) for trial in trials)
    return tuple(100 * value for value in (hits / len(trials), *wilson(hits, len(trials))))


def tables(results: RootResults) -> str:
    return "\n\n".join([_steps(results), _seeds(results), _differences(results), _costs(results)])


def _steps(results: RootResults) -> str:
    lines = [
        "| arm | phrasings | task | n | wrote a block | ran | finished | right |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for phrasings in plan.PHRASINGS:
        for task in plan.TASKS:
            for arm in (plan.UNTRAINED, *plan.LOSSES):
                if not (trials := trials_of(results, arm, task, phrasings)):
                    continue
                cells = [_share(trials, step) for step in STEPS]
                shown = {"train": "trained", "test": "unseen"}[phrasings]
                lines.append(f"| {arm} | {shown} | {task} | {len(trials)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(trials: list[TaskTrial], step: str) -> str:
    share, low, high = shares(trials, step)
    return f"{share:.0f} ({low:.0f}–{high:.0f})"


def _seeds(results: RootResults) -> str:
    """Right per training, of 50."""
    lines = ["| arm | task, phrasings | right per seed |", "|---|---|---|"]
    for phrasings in plan.PHRASINGS:
        for task in plan.TASKS:
            for arm in plan.LOSSES:
                found = [RootCell(training, task, phrasings) for training in models(arm)]
                counts = [sum(t.right for t in results.trials(cell)) for cell in found if results.done(cell)]
                if counts:
                    lines.append(f"| {arm} | {task}, {phrasings} | {', '.join(map(str, counts))} |")
    return "\n".join(lines)


def paired(results: RootResults, first: str, second: str, phrasings: str) -> list[tuple[int, int, int]]:
    """For each seed of which both arms are finished: trials that only the first arm answers right, only the second, n."""
    rows = []
    for seed in plan.SEEDS:
        gained = lost = count = 0
        for task in plan.TASKS:
            cells = [RootCell(TrainedRoot(arm, seed), task, phrasings) for arm in (first, second)]
            if not all(results.done(cell) for cell in cells):
                break
            for a, b in zip(*(results.trials(cell) for cell in cells), strict=True):
                lost += a.right and not b.right
                gained += b.right and not a.right
                count += 1
        else:
            rows.append((lost, gained, count))
    return rows


def sign_test(lost: int, gained: int) -> float:
    """Two-sided p of the exact sign test: McNemar's, of the pairs that differ."""
    n = lost + gained
    tail = sum(comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    return min(1.0, 2 * tail)


def _differences(results: RootResults) -> str:
    """Both tasks together: McNemar's exact test over the pooled pairs, and the sign of each seed."""
    lines = [
        "| phrasings | arms | only the first right | only the second | pairs | by seed | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for phrasings in plan.PHRASINGS:
        for first, second in PAIRS:
            if not (rows := paired(results, first, second, phrasings)):
                continue
            lost, gained, count = (sum(column) for column in zip(*rows, strict=True))
            p = sign_test(lost, gained)
            by_seed = ", ".join(f"{b - a:+d}" for a, b, _ in rows)
            lines.append(f"| {phrasings} | {first} / {second} | {lost} | {gained} | {count} | {by_seed} | {p:.2g} |")
    return "\n".join(lines)


def _costs(results: RootResults) -> str:
    trainings = results.content["trainings"].values()
    lines = ["| training | CPU s | loss of the first step, of the last four |", "|---|---|---|"]
    for entry in trainings:
        last = sum(entry["losses"][-4:]) / 4
        lines.append(
            f"| {entry['arm']}, seed {entry['seed']} | {entry['cpu_seconds']:.0f} | {entry['losses'][0]:.2f}, {last:.3f} |"
        )
    return "\n".join(lines)
