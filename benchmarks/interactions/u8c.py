"""U8 (c): a thought before each block of code of an RLM's root, on and off.

SmolLM2-135M is trained as in benchmarks/rlm/roots, with cross-entropy, on the same runs of the scripted expert, once as they
are and once with a scripted thought before each block: what the block does and what of the context decides it.
"""

from __future__ import annotations

import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.rlm.roots import plan
from benchmarks.rlm.roots.run import open_root, recipe_of
from eaftdrope.evaluate.rlm.trials import STEPS, TaskTrial, run_trials
from eaftdrope.files import write_atomically
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.experts import expert_rows
from eaftdrope.rlm.protocol import SYSTEM_SHORT
from eaftdrope.rlm.tasks import make_task
from eaftdrope.rlm.tasks.entries import classifier
from eaftdrope.run.train import run_recipe

from .lab import SEEDS, Comparison, Lab, Piece, Reading

ON, OFF = "thoughts on", "thoughts off"
RIGHT, FINISHED, TOKENS = "right", "finished", "thousand tokens per trial"
# a thought has at most 20 tokens, a block 60
NEW_TOKENS = 96

_SEARCH = re.compile(r'if "(.+)" in line\]')
_COUNT = re.compile(r'sum\("(.+)" in line for line in lines\)')
_VALUE = re.compile(r'answer\["content"\] = "(.+)"')


def lab(quick: bool) -> Lab:
    seeds = SEEDS[:2] if quick else SEEDS
    sizes = {"rows": plan.ROWS, "trials": plan.TRIALS, "chars": plan.CHARS, "new_tokens": NEW_TOKENS}
    sizes |= {"iterations": plan.ITERATIONS}
    if quick:
        sizes = {"rows": 4, "trials": 1, "chars": 8_000, "new_tokens": 8, "iterations": 1}
    settings = sizes | {"model": plan.MODEL}
    pieces = [Piece(arm, seed, settings, partial(_measure, arm, seed, sizes)) for seed in seeds for arm in (ON, OFF)]
    names = [f"{task}: {RIGHT}" for task in plan.TASKS]
    smallest = {RIGHT: 0.05, FINISHED: 0.05, TOKENS: 0.02} | dict.fromkeys(names, 0.05)
    compared = [
        Comparison(f"{ON} minus {OFF}: {name}", (ON, name), (OFF, name), least) for name, least in smallest.items()
    ]
    return Lab(
        "u8c",
        "U8 (c): thoughts before the turns of an RLM",
        f"SmolLM2-135M-Instruct, LoRA, cross-entropy, {plan.ROWS} rows; {plan.TRIALS} trials of each task with contexts of "
        f"{plan.CHARS:,} characters.",
        "share of trials",
        "wrote a block, ran, finished, right",
        pieces,
        compared,
        {},
    )


def thought(reply: str) -> str:
    """The reply with a thought before its block; a mistake of the expert, or a reply without code, stays as it is."""
    if found := _SEARCH.search(reply):
        text = f"I look for the lines with {found[1]}."
    elif found := _COUNT.search(reply):
        text = f"In these lines it is written {found[1]}. I count them."
    elif found := _VALUE.search(reply):
        text = f"The line has the number {found[1]}."
    else:
        return reply
    return f"<think>\n{text}\n</think>\n{reply}"


def rows_with_thoughts(count: int) -> list[dict[str, Any]]:
    """Rows of the expert, all of whose trained replies begin with a thought."""
    rows = list(expert_rows(count))
    for row in rows:
        for message in row["messages"]:
            if message["role"] == "assistant" and message.get("weight") != 0:
                message["content"] = thought(message["content"])
    return rows


def _measure(arm: str, seed: int, sizes: dict[str, int], weights: Path) -> dict[str, Reading]:
    root = open_root(str(_trained(arm, seed, sizes["rows"], weights)))
    limits = Limits(iterations=sizes["iterations"], root_tokens=sizes["new_tokens"], seconds=10.0**7)
    rlm = RLM(root, classifier(), limits=limits, system=SYSTEM_SHORT)
    by_task: dict[str, list[TaskTrial]] = {}
    for kind in plan.TASKS:
        tasks = [(number, make_task(kind, number, sizes["chars"])) for number in range(sizes["trials"])]
        by_task[kind] = run_trials("rlm", tasks, rlm)
    trials = [trial for found in by_task.values() for trial in found]
    steps = [sum(bool(getattr(trial, step)) for trial in trials) / len(trials) for step in STEPS]
    return {
        RIGHT: Reading([trial.right for trial in trials], steps),
        FINISHED: Reading([trial.finished for trial in trials]),
        TOKENS: Reading([trial.tokens / 1000 for trial in trials]),
        **{f"{kind}: {RIGHT}": Reading([trial.right for trial in found]) for kind, found in by_task.items()},
    }


def _trained(arm: str, seed: int, rows: int, weights: Path) -> Path:
    """The folder of the trained root; a training that was interrupted resumes."""
    folder = weights / f"{arm.replace(' ', '-')}-{rows}-{seed}"
    if (folder / "adapter_model.safetensors").is_file():
        return folder
    source = "package:rlm_expert"
    if arm == ON:
        source = str(weights / f"expert-with-thoughts-{rows}.jsonl")
        lines = [json.dumps(row) + "\n" for row in rows_with_thoughts(rows)]
        write_atomically(Path(source), "".join(lines))
    recipe = recipe_of(plan.TrainedRoot("cross-entropy", seed), folder, source=source, rows=rows)
    run_recipe(recipe, Console(file=io.StringIO()), command="python -m benchmarks.interactions u8c run")
    return folder
