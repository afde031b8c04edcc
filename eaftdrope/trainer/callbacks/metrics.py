"""metrics.jsonl: one JSON object per log of the trainer, {"step", "epoch", "time", ...the log}."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .step_lines import StepLines

# Entries of the trainer's own history that are kept: each takes some 6 KB of memory, and 1 KB of every checkpoint.
_HISTORY = 100
# Running totals, which the next log continues from its last entry.
_TOTALS = "eaft/trained_tokens"
# Only the summary at the end of a run has this key. A resumed run writes a new summary.
_SUMMARY_KEY = "train_runtime"


class MetricsFileCallback(TrainerCallback):
    """Appends every log to a JSON Lines file (see `StepLines`), on the main process only. The file of a resumed run has the
    same lines as that of an uninterrupted run, except for times and speeds.

    `time` is in seconds since 1970 (UTC). NaN and infinity, which JSON does not have, are written as null.

    Args:
        path (`str` or `Path`):
            The file. Missing folders are created; a run that starts at step 0 replaces the file.

    Raises:
        UserError: in the event that fails, if the file cannot be written or has a line in another format.
    """

    def __init__(self, path: str | Path) -> None:
        self._lines = StepLines(Path(path), "training metrics")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines that the run will log again; an unwritable file raises here, before the first step."""
        if state.is_world_process_zero:
            self._lines.begin(state.global_step, again=lambda row: _SUMMARY_KEY in row)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if not state.is_world_process_zero:
            return
        assert logs is not None
        line = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 3), **logs}
        self._lines.add({key: _json_value(value) for key, value in line.items()})


def _json_value(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, np.generic)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class BoundedHistory(TrainerCallback):
    """Keeps the last 100 entries of `state.log_history`, and the last one with the running totals of the tokens.

    For a run that has all of its logs in metrics.jsonl: memory and checkpoints then do not grow with the steps.
    """

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        older, kept = state.log_history[:-_HISTORY], state.log_history[-_HISTORY:]
        if older:
            totals = [entry for entry in older if _TOTALS in entry][-1:]
            state.log_history[:] = kept if any(_TOTALS in entry for entry in kept) else totals + kept
