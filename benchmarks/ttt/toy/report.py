"""The toy's results: `toy.json` with all pieces, the table, paired differences of arms, and the figure."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from eaftdrope.files import write_atomically

from ...command import as_typed
from ...loss.results import environment
from . import task
from .arms import ARMS, BATCH, QUICK, TTT
from .run import SEEDS, ToyRun, summary

SCHEMA = 1
CEILINGS = {"all tokens so far": None, "last 46 tokens": 46, "last 16 tokens": 16}
# points of the comparisons at equal steps and at equal CPU seconds
BUDGETS = {"step": (46, 92, 138, 230, 400, 700), "cpu_seconds": (10, 20, 30, 60, 100, 160)}
# the ceiling that no reader without a memory beyond its window can pass
MEMORY = "last 46 tokens"
# (arm, reading) minus (arm, reading)
COMPARED = (
    (("first", "as trained"), ("second", "as trained")),
    (("horizon2", "as trained"), ("second", "as trained")),
    (("first", "as trained"), ("naive", "as trained")),
    (("first", "as trained"), ("full", "as trained")),
    (("first", "as trained"), ("mamba2", "as trained")),
    (("first_long", "as trained"), ("first", "as trained")),
    (("first_long", "as trained"), ("mamba2", "as trained")),
    (("first", "as trained"), ("in_place", "as trained")),
    (("first", "inner gate eaft"), ("first", "as trained")),
    (("first", "TTT off"), ("window", "as trained")),
    (("naive", "as trained"), ("window", "as trained")),
    (("naive", "as trained"), ("naive_random", "as trained")),
    (("naive", "as trained"), ("naive_in_place", "as trained")),
)


def toy(
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for pieces, weights, toy.json and toy.png; resumed if it exists.", show_default=False
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=len(SEEDS))] = len(SEEDS),
    quick: Annotated[
        bool, typer.Option("--quick", help="A test run of some seconds: one seed, few arms, 4 steps.")
    ] = False,
) -> None:
    """Train tiny models on sequences that each hide their own successor table, with and without test-time training, and
    compare the loss by position with the best possible predictions. Takes an hour of one core."""
    # small products: more threads only wait for each other
    torch.set_num_threads(1)
    console = Console() if sys.stdout.isatty() else Console(width=180)
    with tempfile.TemporaryDirectory(prefix="eaftdrope-toy-") as name:
        folder = Path(name) if output is None else output
        run = ToyRun(folder, QUICK, SEEDS[:1], 4, 4) if quick else ToyRun(folder, ARMS, SEEDS[:seeds])
        pieces = run.run(lambda line: console.print(line, highlight=False, markup=False))
        result = document(run, pieces, as_typed("benchmarks.ttt", sys.argv[1:]))
        for grid in (table(result), *(budget_table(result, clock) for clock in BUDGETS)):
            console.print(grid)
        for line in result["differences"]:
            console.print(_sentence(line), highlight=False, markup=False)
        if output is not None:
            from .figure import draw

            console.print(f"written  {write(output, result)}, {draw(result, output / 'toy.png')}", highlight=False)


def document(run: ToyRun, pieces: list[dict], command: str) -> dict:
    sequences = run.test_BT.numpy()
    threshold = float(task.bayes_nll(run.validation_BT.numpy(), CEILINGS[MEMORY]).mean())
    return {
        "schema": SCHEMA,
        "what": "TTT-E2E on sequences with a successor table each: loss by position",
        "command": command,
        "environment": environment(None),
        "settings": {
            "symbols": task.SYMBOLS,
            "length": task.LENGTH,
            "follows": task.FOLLOWS,
            "batch": BATCH,
            "ttt": TTT,
            "test_sequences": len(sequences),
            "validation_sequences": len(run.validation_BT),
            "seeds": run.seeds,
        },
        "cpu_seconds": round(sum(piece["training"]["cpu_seconds"] for piece in pieces), 1),
        "ceilings": {name: summary(task.bayes_nll(sequences, reach)) for name, reach in CEILINGS.items()},
        "first_symbol_in_view": {name: first_symbol(sequences, reach) for name, reach in CEILINGS.items() if reach},
        "validation_threshold": round(threshold, 4),
        "means": means(pieces, threshold),
        "equal_budgets": {clock: at_budgets(pieces, clock) for clock in BUDGETS},
        "differences": differences(pieces),
        "missing": [f"{arm.name}-{seed}" for arm, seed in run.jobs() if run.piece(arm, seed) is None],
        "pieces": pieces,
    }


def first_symbol(sequences_BT: np.ndarray, reach: int) -> dict:
    """Return how much a ceiling would be lower if the reader also used what the first symbol in view reveals."""
    apart_BT = np.subtract(*task.sampled_nll(sequences_BT[:48], reach, range(64, task.LENGTH, 6)))
    by_sequence = apart_BT.mean(1)
    return {"nats": round(float(by_sequence.mean()), 4), "standard_error": round(_error(by_sequence), 4)}


def means(pieces: list[dict], threshold: float) -> list[dict]:
    """Return for every arm and reading the means over seeds; the standard error is over test sequences.

    `reached` is where in training the validation loss fell to `threshold`, in steps and CPU seconds; None where it did not
    in every seed.
    """
    titles, found = {arm.name: arm.title for arm in ARMS}, []
    for arm, reading in dict.fromkeys((piece["arm"], reading) for piece in pieces for reading in piece["readings"]):
        same = [piece for piece in pieces if piece["arm"] == arm]
        read = [piece["readings"][reading] for piece in same]
        by_seed = [one["nll"] for one in read]
        found.append(
            {
                "arm": arm,
                "title": titles.get(arm, arm),
                "reading": reading,
                "seeds": [piece["seed"] for piece in same],
                "steps": same[0]["settings"]["steps"],
                "cpu_seconds": round(statistics.mean(piece["training"]["cpu_seconds"] for piece in same), 1),
                "reached": _reached([piece["training"]["curve"] for piece in same], threshold),
                "nll": round(statistics.mean(by_seed), 4),
                "standard_error": round(_error(_by_sequence(read)), 4),
                "spread_over_seeds": round(statistics.stdev(by_seed), 4) if len(by_seed) > 1 else None,
                "by_bin": np.mean([one["by_bin"] for one in read], axis=0).round(4).tolist(),
                "by_bin_by_seed": [one["by_bin"] for one in read],
            }
        )
    return found


def _reached(curves: list[list[dict]], threshold: float) -> dict | None:
    """Return the mean over curves of the point that crosses `threshold`, interpolated between measured points."""
    found = []
    for curve in curves:
        for before, after in itertools.pairwise(curve):
            if after["nll"] <= threshold:
                # at the first point already: that is an upper bound
                share = max(0.0, (before["nll"] - threshold) / (before["nll"] - after["nll"]))
                found.append([before[of] + share * (after[of] - before[of]) for of in ("step", "cpu_seconds")])
                break
    if not found or len(found) < len(curves):
        return None
    step, seconds = np.mean(found, axis=0)
    return {"step": round(float(step)), "cpu_seconds": round(float(seconds), 1)}


def at_budgets(pieces: list[dict], clock: str) -> dict[str, list[dict | None]]:
    """Return for every trained arm the validation loss at each of `BUDGETS[clock]`, interpolated: mean, lowest and highest
    seed; None beyond the measured points of a seed. The learning rate of a longer training is still high there."""
    found = {}
    for arm in dict.fromkeys(piece["arm"] for piece in pieces if piece["training"]["curve"]):
        curves = [piece["training"]["curve"] for piece in pieces if piece["arm"] == arm]
        found[arm] = []
        for budget in BUDGETS[clock]:
            inside = all(curve[0][clock] <= budget <= curve[-1][clock] for curve in curves)
            losses = [np.interp(budget, *([point[of] for point in curve] for of in (clock, "nll"))) for curve in curves]
            ends = {"mean": np.mean(losses), "lowest": min(losses), "highest": max(losses)}
            found[arm].append({name: round(float(loss), 4) for name, loss in ends.items()} if inside else None)
    return found


def differences(pieces: list[dict]) -> list[dict]:
    """Return the paired differences of `COMPARED` over the seeds that both arms have."""
    there = {
        (piece["arm"], reading, piece["seed"]): one for piece in pieces for reading, one in piece["readings"].items()
    }
    found = []
    for first, second in COMPARED:
        seeds = [seed for seed in SEEDS if (*first, seed) in there and (*second, seed) in there]
        if seeds:
            ours, theirs = ([there[*which, seed] for seed in seeds] for which in (first, second))
            apart_B = _by_sequence(ours) - _by_sequence(theirs)
            found.append(
                {
                    "arms": [first, second],
                    "difference": round(float(apart_B.mean()), 4),
                    "standard_error": round(_error(apart_B), 4),
                    "by_seed": [round(one["nll"] - other["nll"], 4) for one, other in zip(ours, theirs)],
                }
            )
    return found


def _by_sequence(readings: list[dict]) -> np.ndarray:
    """Return the mean over seeds of each sequence's loss, `[B]`."""
    return np.mean([reading["by_sequence"] for reading in readings], axis=0)


def _error(values_B: np.ndarray) -> float:
    return float(values_B.std(ddof=1) / len(values_B) ** 0.5)


def table(result: dict) -> Table:
    grid = Table(title="nats per token by bin of 32 positions, means over seeds", title_justify="left")
    grid.add_column("arm", no_wrap=True)
    reached = f"{result['validation_threshold']:.2f} reached after"
    for name in ("seeds", "steps", "CPU s", "by bin", "mean (s.e.)", "spread over seeds", reached):
        grid.add_column(name, justify="right", no_wrap=True)
    for name, ceiling in result["ceilings"].items():
        error = _error(np.array(ceiling["by_sequence"]))
        grid.add_row(
            f"Bayes, {name}", "", "", "", _bins(ceiling), f"{ceiling['nll']:.3f} ({error:.3f})", "", style="dim"
        )
    for row in result["means"]:
        title = row["title"] if row["reading"] == "as trained" else f"  {row['reading']}"
        spread = "" if row["spread_over_seeds"] is None else f"{row['spread_over_seeds']:.3f}"
        cells = [str(len(row["seeds"])), str(row["steps"] or ""), f"{row['cpu_seconds']:.0f}", _bins(row)]
        at = row["reached"] if row["reading"] == "as trained" else None
        after = f"{at['step']} steps, {at['cpu_seconds']:.0f} CPU s" if at else ""
        grid.add_row(title, *cells, f"{row['nll']:.3f} ({row['standard_error']:.3f})", spread, after)
    return grid


def budget_table(result: dict, clock: str) -> Table:
    grid = Table(title=f"validation loss by {clock} of training, lowest and highest seed", title_justify="left")
    for name in ("arm", *map(str, BUDGETS[clock])):
        grid.add_column(name, justify="right", no_wrap=True)
    for arm, row in result["equal_budgets"][clock].items():
        cells = [f"{at['mean']:.2f} ({at['lowest']:.2f}-{at['highest']:.2f})" if at else "" for at in row]
        grid.add_row(arm, *cells)
    return grid


def _bins(row: dict) -> str:
    return " ".join(f"{value:.2f}" for value in row["by_bin"])


def _sentence(line: dict) -> str:
    first, second = (f"{arm} ({reading})" for arm, reading in line["arms"])
    by_seed = ", ".join(f"{value:+.3f}" for value in line["by_seed"])
    return f"{first} - {second}: {line['difference']:+.3f} ({line['standard_error']:.3f}); by seed {by_seed}"


def write(folder: Path, result: dict) -> Path:
    """Write `toy.json`, with one piece per line."""
    head = json.dumps({name: value for name, value in result.items() if name != "pieces"}, indent=1)
    pieces = ",\n".join("  " + json.dumps(piece, separators=(",", ":")) for piece in result["pieces"])
    return write_atomically(
        folder / "toy.json", f'{head.removesuffix("}").rstrip()},\n "pieces": [\n{pieces}\n ]\n}}\n'
    )
