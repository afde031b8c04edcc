"""A whole run on a tiny random model: folder of the model, rows, recipe, and ways to start it and to kill it."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import yaml

from tests import forked
from tests.tiny_models import save_model

# What differs between two runs of the same recipe.
TIMES = ("time", "eaft/tokens_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
# What only the run that reached the end by training logs: a sum over the steps of its own process.
SUMMARY = "train_runtime"


def save_rows(path: Path, count: int = 24, *, start: int = 0) -> Path:
    """Chat rows of different lengths."""
    rows = []
    for index in range(start, start + count):
        question, answer = f"What is {index} plus {index}?", f"It is {2 * index}." + " Yes." * (index % 3)
        roles = [("user", question), ("assistant", answer)]
        rows.append({"messages": [{"role": role, "content": text} for role, text in roles]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_project(folder: Path, **model) -> Path:
    """`folder` with model/, rows.jsonl, held_out.jsonl, text.txt and recipe.yaml; returns the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "model", **model)
    save_rows(folder / "rows.jsonl")
    save_rows(folder / "held_out.jsonl", 6, start=40)
    (folder / "text.txt").write_text("The rain fell on the town, and nobody minded. " * 8, encoding="utf-8")
    recipe = {
        "model": "model",
        "data": {"train": "rows.jsonl", "held_out": "held_out.jsonl", "max_length": 128},
        "lora": {"r": 4, "dropout": 0.1},
        "train": {
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 0.01,
            "precision": "float32",
            "save_every": 2,
            "keep_checkpoints": 10,
        },
        "probes": {
            "target": ["held_out_loss"],
            "general": [
                {"perplexity": {"files": ["text.txt"], "max_tokens": 256}},
                {"multiple_choice": {"limit": 4}},
            ],
        },
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def save_text(path: Path, count: int = 60, *, seed: int = 0) -> Path:
    """Documents of 10 to 50 words."""
    words = (
        "the",
        "rain",
        "fell",
        "on",
        "a",
        "town",
        "and",
        "nobody",
        "minded",
        "but",
        "one",
        "old",
        "cat",
        "sat",
        "by",
    )
    rng = random.Random(seed)
    documents = [" ".join(rng.choices(words, k=rng.randint(10, 50))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def make_staged_project(folder: Path) -> Path:
    """As `make_project`, and text, and staged.yaml: drope, recalibrate and eaft of four steps each, without probes; returns
    the latter. short.yaml has no eaft."""
    plain = yaml.safe_load(make_project(folder).read_text(encoding="utf-8"))
    save_text(folder / "text.jsonl")
    save_text(folder / "held_out_text.jsonl", 6, seed=1)
    train = {key: plain["train"][key] for key in ("batch_size", "precision", "save_every", "keep_checkpoints")}
    recipe = {
        "model": "model",
        "stages": ["drope", "recalibrate", "eaft"],
        "drope": {"max_length": 1024},
        "recalibrate": {
            "tokens": 4 * 4 * 64,
            "data": {"train": "text.jsonl", "held_out": "held_out_text.jsonl", "max_length": 64},
            "train": {**train, "learning_rate": 0.003},
            "recovery": {"every": 2, "max_tokens": 256},
            "probes": {"target": [], "general": []},
        },
        "data": {"train": "rows.jsonl", "max_length": 128},
        "lora": plain["lora"],
        "train": {**train, "learning_rate": 0.01, "steps": 4},
        "probes": {"target": [], "general": []},
        "output": {"dir": str(folder / "run")},
    }
    short = {key: recipe[key] for key in ("model", "drope", "recalibrate", "output")}
    short["stages"] = ["drope", "recalibrate"]
    for name, data in {"staged.yaml": recipe, "short.yaml": short}.items():
        (folder / name).write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return folder / "staged.yaml"


class Ended(NamedTuple):
    """A finished process. `code` is negative for a signal; `out` is what it wrote to stdout and stderr."""

    code: int
    out: str


def train(
    *arguments: object,
    moment: str | None = None,
    signal_number: int = signal.SIGKILL,
    tty: str | None = None,
    killed: Callable[[], bool] | None = None,
    report: bool = False,
):
    """`eaftdrope train ...` in a process of its own, forked from one that has the libraries loaded.

    Args:
        moment: a name in `MOMENTS`, `STAGE_MOMENTS` or `TTT_MOMENTS`, where the process sends itself `signal_number`.
        tty: device to use as its terminal; `out` is then empty.
        killed: called again and again while it runs; the process is killed from outside once it returns true.
        report: draw the report, which takes twice as long as the rest of so small a run; else an empty page stands for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        work = (list(map(str, arguments)), moment, signal_number, report)
        process = forked.start(_train, *work, out=Path(tty) if tty else output)
        while killed and process.exitcode is None:
            if killed():
                process.kill()
                break
            process.join(0.002)
        process.join(400)
        assert process.exitcode is not None, "the run hangs"
        return Ended(process.exitcode, output.read_text(encoding="utf-8") if output.exists() else "")


def train_in_ranks(*arguments: object, **environment: str) -> list[forked.Ended]:
    """`eaftdrope train ...` as two processes; no report."""
    return forked.run_ranks(2, _train, list(map(str, arguments)), None, None, False, **environment)


def no_report(folder: Path, output: object) -> Path:
    """Replaces `report.page._write`: an empty page, without figures."""
    (folder / "report.html").write_text("")
    return folder / "report.html"


def _train(arguments, moment, signal_number, report):
    from eaftdrope.cli import main

    if not report:
        from eaftdrope.report import page

        mock.patch.object(page, "_write", no_report).start()
    if moment:
        {**MOMENTS, **STAGE_MOMENTS, **TTT_MOMENTS}[moment][1](lambda: os.kill(os.getpid(), signal_number))
    main(["train", *arguments])


# ---- moments: each patches this process so that `die` is called there ----


def _before(owner: object, name: str, die, call: int = 1) -> None:
    """Die at the beginning of the given call of a function."""
    original, calls = getattr(owner, name), itertools.count(1)

    def patched(*args, **kwargs):
        if next(calls) == call:
            die()
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def _after(owner: object, name: str, die, call: int = 1) -> None:
    """Die at the end of the given call of a function."""
    original, calls = getattr(owner, name), itertools.count(1)

    def patched(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(calls) == call:
            die()
        return result

    setattr(owner, name, patched)


def _in_step(step: int):
    def patch(die):
        from eaftdrope.trainer import EAFTTrainer

        _before(EAFTTrainer, "compute_loss", die, step)

    return patch


def _trainer_method(name: str, call: int):
    def patch(die):
        from transformers import Trainer

        _before(Trainer, name, die, call)

    return patch


def _half_a_state(die):
    """trainer_state.json of the second checkpoint is cut in the middle."""
    from transformers import TrainerState

    original = TrainerState.save_to_json

    def patched(self, path):
        original(self, path)
        if self.global_step == 4:
            text = Path(path).read_text()
            Path(path).write_text(text[: len(text) // 2])
            die()

    TrainerState.save_to_json = patched


def _run_function(name: str, where, call: int = 1, module: str = "stages.training"):
    def patch(die):
        where(importlib.import_module(f"eaftdrope.run.{module}"), name, die, call)

    return patch


def _folder_method(name: str, where):
    def patch(die):
        from eaftdrope.run.folder import RunFolder

        where(RunFolder, name, die)

    return patch


def _while_rotating(die):
    from eaftdrope.run.checkpoints import Checkpoints

    _before(Checkpoints, "rotate", die, 2)


def _while_probing(call: int):
    def patch(die):
        from eaftdrope.evaluate.probes.perplexity import PerplexityProbe

        _before(PerplexityProbe, "run", die, call)

    return patch


# name -> (step of the checkpoint that a run killed there goes on from, patch)
MOMENTS = {
    "while loading": (0, _run_function("build_model", _before, module="arguments")),
    "after run.json": (0, _folder_method("_write_run", _after)),
    "while probing before": (0, _while_probing(1)),
    "in step 2, before a checkpoint": (0, _in_step(2)),
    "in step 3, after a checkpoint": (2, _in_step(3)),
    "in step 4, after a checkpoint": (2, _in_step(4)),
    "in a checkpoint, before its weights": (2, _trainer_method("_save", 2)),
    "in a checkpoint, before its optimizer": (2, _trainer_method("_save_optimizer_and_scheduler", 2)),
    "in a checkpoint, before its random state": (2, _trainer_method("_save_rng_state", 2)),
    "in a checkpoint, in its state": (2, _half_a_state),
    "in step 6, after two checkpoints": (4, _in_step(6)),
    "while deleting old checkpoints": (4, _while_rotating),
    "after training": (6, _run_function("save_result", _before)),
    "after the result": (6, _run_function("save_result", _after)),
    "while probing after": (6, _while_probing(2)),
    "before the last word": (6, _folder_method("finish", _before)),
}


# name -> (what the second start of `make_staged_project`'s recipe does, patch)
STAGE_MOMENTS = {
    "while the converted folder is made": (["drope", "recalibrate", "eaft"], _folder_method("take", _before)),
    "after the conversion": (["recalibrate", "eaft"], _folder_method("take", _after)),
    "while the original is measured": (["recalibrate", "eaft"], _run_function("build_trainer", _before)),
    "in step 4 of the recalibration": (["recalibrate from 2", "eaft"], _in_step(4)),
    "after the recalibration's training": (["recalibrate from 4", "eaft"], _run_function("save_result", _before)),
    "between recalibration and eaft": (["eaft"], _folder_method("finish", _after)),
    "in step 4 of eaft": (["eaft from 2"], _in_step(8)),
}
# as the others, of the recipe of tests/run/test_ttt_runs.py with two trainings
TTT_MOMENTS = {
    "in step 8": (["ttt from 2"], _in_step(8)),
    "after the second training": (["ttt from 4"], _run_function("save_result", _before, 2)),
}


def train_in_a_shell(*arguments: object, command: tuple[str, ...] = (), **environment: str) -> tuple[int, str, str]:
    """The command as people start it: (exit code, stdout, stderr)."""
    command = command or (sys.executable, "-m", "eaftdrope", "train")
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return done.returncode, done.stdout, done.stderr


def metrics(run: Path, *, without=TIMES) -> list[dict]:
    """metrics.jsonl without what two runs of a recipe may differ in, and without the summary at its end."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in without} for row in rows if SUMMARY not in row]


def hashes(folder: Path) -> dict[str, str]:
    """Every file below `folder` with the hash of its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def results(run):
    """Hashes of all that a run leaves, checkpoints apart; the logs without times."""
    found = {name: value for name, value in hashes(run).items() if not name.startswith("checkpoints/")}
    found["metrics.jsonl"] = metrics(run)
    # the command's folder is in the card and the recipe, and in the report of both
    for name in ("README.md", "recipe.yaml", "run.json", "report.html"):
        del found[name]
    return found
