"""Run the tasks that are missing, for a limited time; a later call resumes where this one stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from eaftdrope.models import load_tokenizer
from eaftdrope.run.machine import keep_freed_memory, uses_bfloat16

from . import plan
from .document import Document
from .measure import PassKeys, losses_by_chunk, pass_key
from .models import build
from .plan import Evaluate, PassKey, Task, Train, tasks
from .texts import Texts, load_texts
from .training import Training


@dataclass(frozen=True)
class Sizes:
    """Passages to fit rates on, test passages, and pass-key trials per gap."""

    fit: int = 4
    test: int = 16
    trials: int = 50


class Runner:
    def __init__(
        self, document: Document, texts: Texts, keys: PassKeys, sizes: Sizes, work: Path, deadline: float
    ) -> None:
        self.document, self.texts, self.keys, self.sizes = document, texts, keys, sizes
        self.work, self.deadline = work, deadline

    def run(self, task: Task, report: Callable[[str], None]) -> bool:
        """Run or resume a task; return whether it is finished."""
        entry = self.document.entry(task)
        if isinstance(task, Train):
            self._train(task, entry, report)
        else:
            self._measure(task, entry)
        self.document.write()
        return entry["finished"]

    def _train(self, task: Train, entry: dict, report: Callable[[str], None]) -> None:
        training = Training(task, self.texts.rows, self.texts.digest, self.work)
        training.run(self.deadline, report)
        entry |= {
            "rows": len(training.losses),
            "values": training.losses,
            "cpu_seconds": round(training.cpu_seconds, 1),
        }
        entry["threads"] = torch.get_num_threads()
        if training.finished:
            self.document.finish(entry)

    def _measure(self, task: Evaluate | PassKey, entry: dict) -> None:
        """Add a value per passage or trial; each is written at once, so that a kill loses one of them."""
        model = build(task.weights, task.reads, task.rate, self.work)
        count = self.sizes.trials if isinstance(task, PassKey) else len(self._passages(task))
        entry["threads"] = torch.get_num_threads()
        while len(entry["values"]) < count and time.monotonic() < self.deadline:
            started, number = time.process_time(), len(entry["values"])
            if isinstance(task, PassKey):
                value = pass_key(model, *self.keys.trial(task.gap, number))
            else:
                value = losses_by_chunk(model, self._passages(task)[number])
            entry["values"].append(value)
            entry["cpu_seconds"] = round(entry["cpu_seconds"] + time.process_time() - started, 1)
            self.document.write()
        if len(entry["values"]) == count:
            self.document.finish(entry)

    def _passages(self, task: Evaluate) -> torch.Tensor:
        return self.texts.test if task.text == "test" else self.texts.fit


def run(
    train: Path, test: Path, output: Path, work: Path, minutes: float, parts: tuple[str, ...], sizes: Sizes
) -> bool:
    """Run what is missing of `parts`, at most about `minutes`; return whether nothing is.

    Raises:
        UserError: a text is missing or too short, or `output` has results of other settings.
    """
    deadline = time.monotonic() + 60 * minutes
    console = Console(width=160)
    keep_freed_memory()
    tokenizer = load_tokenizer(plan.MODEL)
    texts = load_texts(tokenizer, train, test, sizes.fit, sizes.test)
    output.mkdir(parents=True, exist_ok=True)
    document = Document(output / "smollm2.json", _settings(train, test, texts, sizes))
    runner = Runner(document, texts, PassKeys(tokenizer, texts.novel), sizes, work, deadline)
    for task in tasks(document, parts):
        if document.has(task):
            continue
        if time.monotonic() >= deadline:
            console.print(f"next: {task.key}", highlight=False)
            return False
        started = time.monotonic()
        finished = runner.run(task, lambda line: console.print(line, highlight=False))
        word = "finished" if finished else "interrupted"
        console.print(f"{word}  {task.key}  {time.monotonic() - started:.0f} s", highlight=False)
        if not finished:
            return False
    return True


def _settings(train: Path, test: Path, texts: Texts, sizes: Sizes) -> dict:
    return {
        "model": plan.MODEL,
        "text": train.name,
        "test_text": test.name,
        "digest": texts.digest,
        "training_rows": len(texts.rows),
        **{f"{name}_passages": count for name, count in asdict(sizes).items() if name != "trials"},
        "trials": sizes.trials,
        "window": plan.WINDOW,
        "sink": plan.SINK,
        "chunk": plan.CHUNK,
        "fast_blocks": plan.FAST_BLOCKS,
        "bfloat16": uses_bfloat16("auto"),
    }
