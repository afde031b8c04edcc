"""Endurance: memory of a run over many steps, and over many rows.

    python -m benchmarks.endurance steps --steps 5000          memory per 1,000 steps after the first 300
    python -m benchmarks.endurance rows --rows 2000000         peak memory above the model with 2 million rows

Both train a Llama of 27,000 weights with LoRA on one thread of a CPU, through `eaftdrope train` in a process of its own,
whose private memory (RssAnon, without the pages of files, which the system can drop) is read every half second. `rows`
writes its rows (of 200 tokens) to a temporary folder, and what is made of them: 4 GB for 2 million.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import yaml

from eaftdrope.files import write_atomically
from tests.tiny_models import save_model

from .command import ROOT, child_environment

RESULTS = ROOT / "benchmarks" / "results" / "endurance.json"
_MB = 2**20


def memory_of(process: subprocess.Popen, progress: Path) -> list[tuple[float, int, float]]:
    """(seconds, step, MB of private memory) of a process, every half second until it ends."""
    started, found = time.monotonic(), []
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            step = progress.read_bytes().count(b"\n") if progress.is_file() else 0
        except (FileNotFoundError, ProcessLookupError):
            break
        anonymous = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
        if anonymous:
            found.append((time.monotonic() - started, step, anonymous[0] / 1024))
        time.sleep(0.5)
    assert process.wait() == 0, f"the run ended with {process.returncode}"
    return found


def train(folder: Path, recipe: dict) -> list[tuple[float, int, float]]:
    """Run a recipe in a process of its own; its memory."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    environment = child_environment(
        {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}
    )
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "eaftdrope", "train", str(file)], env=environment, stdout=log)
        return memory_of(process, folder / "run" / "metrics.jsonl")


def recipe_of(folder: Path, steps: int, **train: object) -> dict:
    save_model(folder / "model")
    return {
        "model": str(folder / "model"),
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 256},
        "lora": {"r": 4},
        "train": {"steps": steps, "batch_size": 2, "precision": "float32", "learning_rate": 0.001, **train},
        "probes": {"target": [], "general": []},
        "output": {"dir": str(folder / "run")},
    }


def write_rows(file: Path, count: int, words: int) -> None:
    """Conversations, each of its own words. A token of the model is a byte."""
    rng = np.random.default_rng(0)
    with open(file, "w", encoding="utf-8") as rows:
        for index in range(count):
            answer = " ".join(f"{word:x}" for word in rng.integers(0, 2**20, words))
            messages = [{"role": "user", "content": f"Row {index}?"}, {"role": "assistant", "content": answer}]
            rows.write(json.dumps({"messages": messages}) + "\n")


def steps(folder: Path, count: int) -> dict:
    """The slope of the memory from step 300 on, in MB per 1,000 steps."""
    write_rows(folder / "rows.jsonl", 200, 8)
    found = train(folder, recipe_of(folder, count, save_every=50))
    late = np.array([(step, memory) for _, step, memory in found if step >= 300])
    # the report, drawn after the last step, is no part of the slope
    late = late[late[:, 0] < count]
    slope = np.polyfit(late[:, 0], late[:, 1], 1)[0] * 1000
    state = max((folder / "run" / "checkpoints").glob("checkpoint-*/trainer_state.json")).stat().st_size
    return {
        "steps": count,
        "MB per 1,000 steps": round(float(slope), 2),
        "MB at step 300": round(float(late[0, 1]), 1),
        "MB at the last step": round(float(late[-1, 1]), 1),
        "KB of trainer_state.json": round(state / 1024),
    }


def rows(folder: Path, count: int) -> dict:
    """The peak while rows are read, encoded and drawn from, above the memory before the first is read."""
    write_rows(folder / "rows.jsonl", count, 28)
    found = train(folder, recipe_of(folder, 20))
    few = folder / "few"
    few.mkdir()
    write_rows(few / "rows.jsonl", 100, 28)
    base = train(few, recipe_of(few, 20))
    peak, without = (max(memory for *_, memory in part) for part in (found, base))
    return {
        "rows": count,
        "MB at the peak": round(peak),
        "MB at the peak with 100 rows": round(without),
        "seconds": round(found[-1][0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "rows"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=2_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure, count = (steps, options.steps) if options.what == "steps" else (rows, options.rows)
        result = measure(Path(folder), count)
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    stored[options.what] = {**result, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    write_atomically(RESULTS, json.dumps(stored, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
