"""Result folders with known numbers, in the form that the verbs write, with texts that could break a page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from eaftdrope.evaluate.scores import Score, score_units, scores_to_json

NASTY = "<script>alert('x')</script><img src=x onerror=alert(1)>&amp;\"'"
ARABIC = "مرحبا بالعالم، هذا نص من اليمين إلى اليسار."
LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 4
EMOJI = "👩🏽‍⚕️💊🇳🇴"
ABOUT = {
    "date": "2026-01-02 03:04 UTC",
    "device": "a CPU <2 cores>",
    "versions": {"eaftdrope": "0.1.0", "torch": "2.13.0"},
}


def scores(shift: float) -> list[Score]:
    """Held-out loss falls by `shift`, perplexity grows with it, calls stay."""
    loss = [(20 * (2.0 - shift + 0.01 * i), 20) for i in range(40)]
    perplexity = [(128 * (3.0 + 0.1 * shift + 0.02 * i), 128) for i in range(16)]
    calls = [(float(i % 3 == 0), 1.0) for i in range(12)]
    return [
        score_units("held_out_loss", "target", "held-out loss", loss, kind="mean", better="lower"),
        score_units("function_calls", "target", "exact calls", calls, kind="share", better="higher"),
        score_units("perplexity", "general", "perplexity", perplexity, kind="exp", better="lower"),
    ]


def rows_of(scores: list[Score]) -> list[dict]:
    return json.loads(scores_to_json(scores))


def landscape(conflicts: int, seed: int = 0) -> dict:
    """4,000 tokens, `conflicts` of them in the corner."""
    rng = np.random.default_rng(seed)
    entropy = 0.6 + rng.gamma(1.2, 1.0, 4000)
    probability = np.exp(-entropy) * rng.uniform(0.3, 1, 4000)
    entropy[:conflicts], probability[:conflicts] = 0.3, 0.05
    bins = [np.arange(81) * 0.1, np.linspace(0, 1, 41)]
    density, _, _ = np.histogram2d(np.minimum(entropy, 7.95), probability, bins=bins)
    gate, _ = np.histogram(np.clip(entropy / 3, 0, 1), bins=20, range=(0, 1))
    group = {"tokens": 100, "nll": 200.0, "weighted": 90.0}
    return {
        "density": density.astype(int).tolist(),
        "entropy_width": 0.1,
        "probability_width": 0.025,
        "gate": gate.tolist(),
        "groups": {"high": group, "low": group},
        "tokens": 4000,
        "conflicts": conflicts,
    }


def write(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def write_lines(path: Path, documents: list[dict]) -> None:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")


def metrics(steps: int) -> list[dict]:
    def line(step: int) -> dict:
        left = 1 - step / steps
        return {
            "step": step,
            "loss": 0.2 + left,
            "learning_rate": 1e-3 * left,
            "eaft/cross_entropy": 1 + left,
            "entropy": 1.1 + left,
            "eaft/gate_mean": 0.3 - 0.1 * left,
            "eaft/gate_low_share": 0.1,
            "eaft/conflict_share": 0.05 * left,
            "eaft/high_entropy_loss": 3 + left,
            # where no token of a window was certain
            "eaft/low_entropy_loss": None if step == 2 else 0.2 * left,
            **{f"eaft/gate_hist_{i:02}": 0.1 for i in range(10)},
        }

    lines = [line(step) for step in range(1, steps + 1)]
    return [*lines, {"step": steps, "train_runtime": 90.0}]


def run_folder(folder: Path, *, shift: float = 0.4, steps: int = 12, nasty: str = NASTY) -> Path:
    """A finished run with everything that a run may leave."""
    folder.mkdir(parents=True)
    recipe = {
        "model": {"reference": f"models/{nasty}"},
        "loss": {"gate": "eaft", "alpha": 1.0},
        "train": {"seed": 42, "learning_rate": 1e-3},
    }
    write(
        folder / "run.json",
        {
            "status": "finished",
            "versions": ABOUT["versions"],
            "processes": 1,
            "data": {"rows": 24, "tokens": 1271, "trained_tokens": 355, "truncated": 0, "skipped": 0},
            "recipe": recipe,
            "about": {
                "command": f"eaftdrope train {nasty}",
                "date": ABOUT["date"],
                "device": ABOUT["device"],
                "method": "full fine-tune, gate",
            },
        },
    )
    (folder / "recipe.yaml").write_text(f"model: {nasty}\n", encoding="utf-8")
    write_lines(folder / "metrics.jsonl", metrics(steps))
    (folder / "probes_before.json").write_text(scores_to_json(scores(0)), encoding="utf-8")
    (folder / "probes_after.json").write_text(scores_to_json(scores(shift)), encoding="utf-8")
    during = [
        {"step": step, "scores": [row for row in rows_of(scores(shift * step / steps)) if row.pop("units")]}
        for step in (4, 8)
    ]
    write_lines(folder / "probes_during.jsonl", during)
    windows = [
        {"step": 6, "first_step": 1, **landscape(400)},
        {"step": steps, "first_step": 7, **landscape(100, seed=1)},
    ]
    write_lines(folder / "landscape.jsonl", windows)
    write(
        folder / "samples.json",
        [
            {"prompt": nasty, "reference": LONG, "before": ARABIC, "after": EMOJI},
            {"prompt": "What is 2 + 2?\nThink.", "reference": None, "before": "5\x00\ud83d", "after": None},
        ],
    )
    return folder


def conflict(number: int, nasty: str = NASTY) -> dict:
    return {
        "origin": f"rows.jsonl:{number}",
        "position": 17,
        "entropy": 0.12,
        "probability": 0.00034,
        "label": " Oslo\n" if number % 2 else LONG,
        "predicted": " Bergen",
        "predicted_probability": 0.97,
        "before": f"The capital of {EMOJI} {nasty} is",
        "after": ARABIC,
    }


def inspect_folder(folder: Path, *, conflicts: int = 5, nasty: str = NASTY) -> Path:
    summary = {"nll": 2.345, "entropy": 1.5, "gate": 0.41, "conflict_share": 0.1, "accuracy": 0.55}
    quadrants = [
        {"name": "confident conflict", "tokens": 0.1, "gradient": 0.273, "gated_gradient": 0.061},
        {"name": "confident agreement", "tokens": 0.4, "gradient": 0.05, "gated_gradient": 0.01},
    ]
    rows = [
        {
            "origin": f"rows.jsonl:{i}",
            "source": "rows.jsonl",
            "because_of": "conflicts",
            "tokens": 40,
            "conflicts": 10,
            "conflict_share": 0.25,
            "nll": 4.2,
            "duplicates": i % 3,
            "text": f"{LONG} {nasty} {ARABIC}",
        }
        for i in range(conflicts)
    ]
    part = {"tokens": 4000, "gate": 0.41, "conflict_share": 0.1, "nll": 2.345}
    document = {
        "kind": "inspect",
        "about": ABOUT,
        "command": f"eaftdrope inspect {nasty}",
        "model": "package:tiny",
        "recipe": f"model: {nasty}\n",
        "rows": max(24, conflicts),
        "tokens": 4000,
        "landscape": landscape(400),
        "summary": summary,
        "quadrants": quadrants,
        "positions": [{"from": 1, "to": 1, **part}, {"from": 2, "to": None, **part}],
        "sources": [{"source": f"{LONG}{nasty}", "rows": 24, **part}],
        "conflicts_seen": 10 * conflicts,
        "conflicts_kept": 5 * conflicts,
        # the verb writes no more of these
        "conflicts": [conflict(i, nasty) for i in range(min(200, conflicts))],
        "common_conflicts": [
            {"label": " a", "predicted": " the", "count": 7},
            {"label": "b", "predicted": "c", "count": 1},
        ],
        "rows_ranked": rows[:200],
        "on_policy": {
            "tokens": 4000,
            "landscape": landscape(4, seed=2),
            "summary": {**summary, "conflict_share": 0.001},
        },
    }
    write(folder / "inspect.json", document)
    return folder


def compare_folder(folder: Path, *, gates: tuple[str, ...] = ("none", "eaft", "conflict-mask"), seeds: int = 3) -> Path:
    arms, table = [], []
    names = ("held-out loss", "exact calls", "perplexity")
    for i, gate in enumerate(gates):
        found = []
        for seed in range(seeds):
            reached = scores(0.6 - 0.1 * i + 0.01 * seed)
            found.append([score.value for score in reached])
            arms.append(
                {
                    "gate": gate, "label": gate, "seed": seed, "learning_rate": 1e-4, "folder": f"arms/{gate}-{seed}",
                    "mean_gate": 1 - 0.2 * i, "steps": 50, "scores": rows_of(reached),
                }
            )  # fmt: skip
        sd = np.std(found, axis=0, ddof=1).tolist() if seeds > 1 else [None] * 3
        spread = {
            name: {"mean": mean, "sd": one} for name, mean, one in zip(names, np.mean(found, axis=0).tolist(), sd)
        }
        table.append(
            {
                "label": gate, "n": seeds, "mean_gate": 1 - 0.2 * i, "target": spread[names[0]],
                "general": spread[names[2]], names[1]: spread[names[1]],
            }
        )  # fmt: skip
    document = {
        "kind": "compare",
        "about": ABOUT,
        "command": "eaftdrope compare r.yaml",
        "recipe": f"model: {NASTY}\n",
        "status": "finished",
        "base": rows_of(scores(0)),
        "target": "held-out loss",
        "general": "perplexity",
        "arms": arms,
        "matched": {
            "level": 1.8,
            "levels": [],
            "arms": [{"label": "none", "seed": 0, "share": 0.51, "monotone": True, "scores": rows_of(scores(0.3))}],
            "left_out": [{"label": "dft", "seed": 0, "why": f"gained nothing {NASTY}"}],
        },
        "table": table,
        "verdicts": [{"pair": ["none", "eaft"], "text": f"eaft forgets less: {NASTY}"}],
        "verdict": "eaft keeps more of the general metric than none, by more than the spread.",
    }  # fmt: skip
    write(folder / "compare.json", document)
    return folder


def eval_folder(folder: Path) -> Path:
    models = [
        {"name": "tiny", "reference": "package:tiny", "scores": rows_of(scores(0))},
        {"name": f"new {NASTY}", "reference": f"runs/{NASTY}", "scores": rows_of(scores(0.4))},
    ]
    write(
        folder / "eval.json",
        {
            "schema": 1,
            "kind": "eval",
            "status": "finished",
            "about": ABOUT,
            "command": "eaftdrope eval",
            "models": models,
            "suites": ["general"],
            "notes": [],
        },
    )
    return folder


def probe_folder(folder: Path) -> Path:
    """Two models with needles and perplexity at two lengths."""
    cells = []
    for model in ("plain", LONG[:60]):
        for length in (1024, 2048):
            found = 2 if length == 1024 else 1
            outcomes = [
                {"depth": depth, "found": int(i < found), "asked": 1, "answer": ""}
                for depth in (0.0, 1.0)
                for i in (0, 1)
            ]
            known = {"model": model, "arm": "as is", "length": length, "seconds": 1.0}
            cells.append({**known, "probe": "niah", "result": {"outcomes": outcomes}})
            losses = {"joined": False, "sums": [[[30.0, 10]] * 32] * 2}
            cells.append({**known, "probe": "perplexity", "result": losses})
    settings = {
        "models": [{"name": name, "trained_length": 1024} for name in ("plain", LONG[:60])],
        "text": {"name": NASTY},
        "dtype": "float32",
    }
    document = {"schema": 1, "settings": settings, "about": ABOUT, "notes": [f"a note {NASTY}"], "cells": cells}
    write(folder / "probe.json", document)
    return folder


# nats per token of each bin by arm: full attention is best, TTT between it and the window with its sink
TTT_ARMS = {
    "full": (4.0, 3.4, 3.2),
    "window": (4.0, 4.2, 3.9),
    "sink": (4.0, 3.5, 3.3),
    "naive": (4.0, 3.48, 3.27),
    "ttt": (3.9, 3.45, 3.25),
}


def ttt_folder(folder: Path) -> Path:
    """Five arms over four passages, a fit, needles, latency at three positions, and retention."""

    def cell(probe: str, result: object, arm: str = "", at: str = "", index: int = 0) -> dict:
        return {"probe": probe, "arm": arm, "at": at, "index": index, "seconds": 1.0, "result": result}

    cells = []
    for number, (arm, means) in enumerate(TTT_ARMS.items()):
        for index in range(4):
            # the passages differ by tenths, the arms' differences by thousandths
            own = 0.1 * index + 0.002 * number * (0, 1, -1, 0)[index]
            bins = [[(mean + own) * count, count] for mean, count in zip(means, (256, 256, 511), strict=True)]
            cells.append(cell("loss", bins, arm, "", index))
        for where, nats in (("inside", 2.0), ("outside", 2.0 if arm == "full" else 22.0)):
            cells += [cell("needle", [nats + 0.2 * i, nats < 3 and i < 3], arm, where, i) for i in range(4)]
    cells += [cell("fit", loss, "naive", rate) for rate, loss in (("0.1", 3.31), ("0.3", 3.3), ("1", 3.4))]
    for position, full in ((512, 0.08), (2048, 0.16), (8192, 0.48)):
        costs = {
            reader: {"chunk_seconds": seconds, "token_seconds": seconds / 10, "nbytes": size}
            for reader, seconds, size in (
                ("full", full, 9000 * position),
                ("window", 0.08, 10**6),
                ("ttt", 0.16, 3 * 10**6),
            )
        }
        cells.append(cell("latency", costs, at=str(position)))
    cells += [cell("retention", rows_of(scores(shift)), "ttt", state) for state, shift in (("fresh", 0), ("read", 0.1))]
    named = {"reference": f"runs/{NASTY}", "name": NASTY, "checkpoint": "0"}
    settings = {
        "model": named,
        "base": named,
        "control": None,
        "trained": True,
        "ttt": {"window": 256, "sink": 4, "chunk": 128, "layout": "prime", "lr": 0.3, "clip": 1.0},
        "window": 256,
        "arms": list(TTT_ARMS),
        "text": {"name": NASTY},
        "fit_text": None,
        "edges": [0, 256, 512, 1024],
        "length": 1024,
        "fit_passages": 1,
        "read": 16384,
        "dtype": "float32",
    }
    absent = {"control": f"no --control {NASTY}", "control-naive": "no --control"}
    document = {"schema": 1, "settings": settings, "about": ABOUT, "command": "eaftdrope ttt eval", "absent": absent}
    write(folder / "ttt.json", document | {"notes": [f"a note {NASTY}"], "planned": len(cells), "cells": cells})
    return folder


FOLDERS = {
    "run": run_folder,
    "inspect": inspect_folder,
    "compare": compare_folder,
    "eval": eval_folder,
    "probe": probe_folder,
    "ttt": ttt_folder,
}
