"""Probes measured during training, kept in probes_during.jsonl, one line per measurement:

{"step": k, "scores": [{"probe", "group", "metric", "value", "stderr", "n", "better", "kind"}]}
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .step_lines import StepLines

PREFIX = "probe/"


class ProbeOnceSharded(TrainerCallback):
    """Calls `probe` when training begins: the model is then sharded over devices, none of which could hold it whole."""

    def __init__(self, probe: Callable[[], object]) -> None:
        self._probe = probe

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._probe()


class ProbesCallback(TrainerCallback):
    """Measures before the first step and every `every` steps; the values are added to the log of the step (which is always
    logged) as `probe/<metric>`.

    It must come before the callbacks that show, keep or send the logs, trackers included. Every process measures the same,
    so that models sharded over processes can be measured too; the main process's result is kept.

    Args:
        path (`Path`):
            probes_during.jsonl. Lines that a resumed run will write again are dropped.
        measure (`Callable[[nn.Module], list[dict]]`):
            Returns the scores of a model. It must not change the model or draw a random number, so that training is the
            same with it.
        every (`int`):
            Steps between measurements.

    Raises:
        UserError: in the event that fails, if the file cannot be written or has a line in another format.
    """

    def __init__(self, path: Path, measure: Callable[[nn.Module], list[dict]], every: int) -> None:
        self._lines = StepLines(path, "probes during training")
        self._measure = measure
        self._every = every
        self._is_new = self._due = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines that the run will measure again."""
        self._is_new = state.global_step == 0
        if state.is_world_process_zero:
            self._lines.begin(state.global_step)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure before the first step of a new run; a sharded base model is measured when training begins."""
        if self._is_new:
            self._is_new = False
            assert model is not None
            self._add(model, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a log of the step if a measurement is due."""
        self._due = state.global_step % self._every == 0
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
        """Measure after the trainer has counted the step's tokens and seconds."""
        assert logs is not None and model is not None
        if self._due and "num_tokens" in logs:
            self._due = False
            logs.update({PREFIX + score["metric"]: score["value"] for score in self._add(model, state)})

    def _add(self, model: nn.Module, state: TrainerState) -> list[dict]:
        scores = self._measure(model)
        if state.is_world_process_zero:
            self._lines.add({"step": state.global_step, "scores": scores})
        return scores
