"""Probes that are measured while training goes on; kept in probes_during.jsonl, one line a time:

{"step": k, "scores": [{"probe", "group", "metric", "value", "stderr", "n", "better", "kind"}]}
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import TrainerCallback

from .step_lines import StepLines

PREFIX = "probe/"


class ProbeOnceSharded(TrainerCallback):
    """Calls `probe` when the training begins: the model is then spread over the devices, none of which could hold it."""

    def __init__(self, probe: Callable[[], object]) -> None:
        self._probe = probe

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._probe()


class ProbesCallback(TrainerCallback):
    """Measures before the first step and every `every` steps; the values go into the log of the step (which is logged in
    any case) as `probe/<metric>`.

    It must come before the callbacks that show, keep or send the logs, trackers included. Every process measures the same,
    so that models sharded over processes can be measured too; the main process's result is kept.

    Args:
        path (`Path`):
            probes_during.jsonl. Lines that a resumed run will write again are dropped.
        measure (`Callable[[nn.Module], list[dict]]`):
            Scores of a model, which is left as it was, and no random number drawn: the training is the same with it.
        every (`int`):
            Steps between measurements.

    Raises:
        UserError: in the event that fails, where the file cannot be written or has a line that is not ours.
    """

    def __init__(self, path: Path, measure: Callable[[nn.Module], list[dict]], every: int) -> None:
        self._lines = StepLines(path, "probes during training")
        self._measure = measure
        self._every = every
        self._is_new = self._due = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Drop what the run will measure again."""
        self._is_new = state.global_step == 0
        if state.is_world_process_zero:
            self._lines.begin(state.global_step)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Measure a run that begins: not earlier, because a base model that is sharded is asked when the training begins."""
        if self._is_new:
            self._is_new = False
            self._add(model, state)

    def on_step_end(self, args, state, control, **kwargs):
        """Have the step logged where a measurement is due."""
        self._due = state.global_step % self._every == 0
        if self._due:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        """Measure, once the trainer has counted the step's tokens and seconds."""
        if self._due and "num_tokens" in logs:
            self._due = False
            logs.update({PREFIX + score["metric"]: score["value"] for score in self._add(model, state)})

    def _add(self, model: nn.Module, state) -> list[dict]:
        scores = self._measure(model)
        if state.is_world_process_zero:
            self._lines.add({"step": state.global_step, "scores": scores})
        return scores
