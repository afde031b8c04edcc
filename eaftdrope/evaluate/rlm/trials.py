"""Trials: tasks under one arm, each with its score, how far it came, and its cost.

Success is split, because a root learns to write a block and to finish before it learns to look: `fence` (it wrote a block of
code), `ran` (a block ran without an error), `finished` (it set an answer), `right` (the answer scores 1).
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.baselines import BASELINES, answer_many
from eaftdrope.rlm.engine import Result
from eaftdrope.rlm.journal import Event, read_journal
from eaftdrope.rlm.models import ScriptedModel
from eaftdrope.rlm.protocol import parse
from eaftdrope.rlm.tasks import Task
from eaftdrope.rlm.tasks.entries import classifier

STEPS = ("fence", "ran", "finished", "right")
_ANSWER_CHARS = 200
FLOOR, CEILING = "guess", "oracle"
ARMS = ("rlm", *BASELINES, FLOOR, CEILING)
"""`guess` does not read the context; `oracle` is a scripted root and sub-model: the ceiling of the harness, not a result."""


@dataclass(frozen=True)
class TaskTrial:
    """A task under an arm.

    Args:
        score: of the answer, 0 to 1.
        fence, ran: of an RLM; None for other arms.
        finished: it gave an answer.
        calls: of all models.
        stopped: the limit that ended an RLM, or None.
        answer: its beginning, to be read by people.
    """

    seed: int
    score: float
    finished: bool
    tokens: int
    calls: int
    seconds: float
    fence: bool | None = None
    ran: bool | None = None
    stopped: str | None = None
    answer: str = ""

    @property
    def right(self) -> bool:
        return self.score == 1.0


def run_trials(
    arm: str, tasks: Sequence[tuple[int, Task]], rlm: RLM, *, journals: Path | None = None, label: str = ""
) -> list[TaskTrial]:
    """Measure tasks, given with their seeds, under an arm.

    Args:
        arm: one of `ARMS`.
        rlm: the arm `rlm`; its model and its limits are those of the other arms.
        journals: folder for the journals of the arm `rlm`, from which a killed trial resumes; None: in memory.
        label: beginning of their names.
    """
    assert arm in ARMS
    if arm == FLOOR:
        return [TaskTrial(seed, task.score(task.guess), True, 0, 0, 0.0) for seed, task in tasks]
    if arm in BASELINES:
        asked = [(task.context, task.query) for _, task in tasks]
        answers = answer_many(arm, rlm.model, asked, max_tokens=rlm.limits.sub_tokens)
        return [
            TaskTrial(
                seed,
                task.score(answer.text),
                bool(answer.text),
                answer.tokens,
                answer.calls,
                answer.seconds,
                answer=answer.text[:_ANSWER_CHARS],
            )
            for (seed, task), answer in zip(tasks, answers, strict=True)
        ]
    if arm == CEILING:
        return [_oracle_trial(seed, task, rlm) for seed, task in tasks]
    return _rlm_trials(tasks, rlm, journals, label)


def _oracle_trial(seed: int, task: Task, rlm: RLM) -> TaskTrial:
    limits = Limits(sub_calls=1_000_000, tokens=10**12, cell_seconds=120.0)
    began = time.perf_counter()
    oracle = RLM(ScriptedModel([task.oracle]), classifier(), limits=limits, sandbox=rlm.sandbox)
    result = oracle.complete(task.context, task.query)
    calls, seconds = result.turns + int(result.usage["sub_calls"]), time.perf_counter() - began
    return TaskTrial(seed, task.score(result.answer), result.finished, int(result.usage["tokens"]), calls, seconds)


def _rlm_trials(tasks: Sequence[tuple[int, Task]], rlm: RLM, journals: Path | None, label: str) -> list[TaskTrial]:
    with contextlib.ExitStack() as stack:
        folder = journals or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = [folder / f"{label}{seed}.jsonl" for seed, _ in tasks]
        asked = [(task.context, task.query) for _, task in tasks]
        results = rlm.complete_many(asked, journals=files)
        return [
            _trial_of(seed, task, result, read_journal(file))
            for (seed, task), result, file in zip(tasks, results, files, strict=True)
        ]


def _trial_of(seed: int, task: Task, result: Result, events: Sequence[Event]) -> TaskTrial:
    calls = [event for event in events if event["event"] == "call"]
    return TaskTrial(
        seed,
        task.score(result.answer) if result.finished else 0.0,
        result.finished,
        int(result.usage["tokens"]),
        len(calls),
        # of the models: trials in lockstep share the time of the clock
        sum(event["seconds"] for event in calls),
        fence=any(parse(m["content"]).blocks for m in result.messages if m["role"] == "assistant"),
        ran=any(e["event"] == "cell" and e["place"] == "root" and e["error"] is None for e in events),
        stopped=result.stopped,
        answer=result.answer[:_ANSWER_CHARS],
    )
