"""Recovery: the share of the original model's perplexity that a recalibration has reached, measured as it trains.

    recovery = perplexity of the original model / perplexity now          (1: all of it; same text, same windows)

Kept in recovery.json, so that a resumed run continues its curve and the original is measured once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eaftdrope.files import write_atomically


@dataclass(frozen=True)
class Point:
    """A measurement after `step` steps and `tokens` tokens; `nll` in nats per token."""

    step: int
    tokens: int
    nll: float


@dataclass(frozen=True)
class RecoveryCurve:
    """The measurements of a run.

    Args:
        original: nats per token of the original model.
        measured: tokens that each measurement scores.
        stop_at: recovery at which the training ends, or None.
    """

    original: float
    measured: int
    stop_at: float | None
    points: tuple[Point, ...] = ()

    def recovery(self, nll: float) -> float:
        return math.exp(self.original - nll)

    def reached(self, nll: float) -> bool:
        return self.stop_at is not None and self.recovery(nll) >= self.stop_at

    def stopped_after(self, step: int) -> bool:
        """True if the training ended after this step because it had reached `stop_at`."""
        return any(point.step == step and self.reached(point.nll) for point in self.points)

    def up_to(self, step: int) -> RecoveryCurve:
        return self.with_points(tuple(point for point in self.points if point.step <= step))

    def with_points(self, points: tuple[Point, ...]) -> RecoveryCurve:
        return RecoveryCurve(self.original, self.measured, self.stop_at, points)

    def to_json(self) -> str:
        """Return the stored text, with perplexities and recoveries for readers."""
        points = [
            {**asdict(point), "perplexity": math.exp(point.nll), "recovery": self.recovery(point.nll)}
            for point in self.points
        ]
        original = {"nll": self.original, "perplexity": math.exp(self.original)}
        data = {"original": original, "measured_tokens": self.measured, "stop_at": self.stop_at, "points": points}
        return json.dumps(data, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> RecoveryCurve:
        data = json.loads(text)
        points = tuple(Point(point["step"], point["tokens"], point["nll"]) for point in data["points"])
        return RecoveryCurve(data["original"]["nll"], data["measured_tokens"], data["stop_at"], points)


class RecoveryCallback(TrainerCallback):
    """Measures before the first step, every `every` steps and after the last one; adds `recovery` and
    `recovery/perplexity` to the log of the step (which is always logged), and ends the training with a checkpoint once
    `stop_at` is reached.

    It must come before the callbacks that show or keep the logs. Every process measures the same, so that models sharded
    over processes can be measured too; the main process's result is used.

    Args:
        path (`Path`):
            recovery.json.
        curve (`RecoveryCurve`):
            The content of the file; written by the caller, at first without points.
        measure (`Callable[[nn.Module], float]`):
            Returns the nats per token of a model, without changing it.
        every (`int`):
            Steps between measurements.
    """

    def __init__(self, path: Path, curve: RecoveryCurve, measure: Callable[[nn.Module], float], every: int) -> None:
        self.path = path
        self.curve = curve
        self._measure = measure
        self._every = every
        self._due = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Drop the points that a resumed run will measure again; measure a new run."""
        self.curve = self.curve.up_to(state.global_step)
        if not self.curve.points:
            assert model is not None
            self._add(Point(state.global_step, 0, self._nll(model)), state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a log of the step if a measurement is due."""
        self._due = state.global_step >= state.max_steps or state.global_step % self._every == 0
        if self._due:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure after the trainer has counted the step's tokens and seconds, and add the result to the log."""
        assert logs is not None and model is not None
        if not self._due or "num_tokens" not in logs:
            return
        self._due = False
        point = Point(state.global_step, round(logs["num_tokens"]), self._nll(model))
        logs["recovery"] = self.curve.recovery(point.nll)
        logs["recovery/perplexity"] = math.exp(point.nll)
        self._add(point, state)
        if self.curve.reached(point.nll):
            control.should_training_stop = True
            control.should_save = True

    def _nll(self, model: nn.Module) -> float:
        measured = [self._measure(model)]
        if PartialState().num_processes > 1:
            broadcast_object_list(measured)
        return measured[0]

    def _add(self, point: Point, state: TrainerState) -> None:
        self.curve = self.curve.with_points((*self.curve.points, point))
        if state.is_world_process_zero:
            write_atomically(self.path, self.curve.to_json())
