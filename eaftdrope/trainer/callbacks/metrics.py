"""metrics.jsonl: one JSON object per log of the trainer, {"step", "epoch", "time", ...the log}."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from .step_lines import StepLines

# Only the summary that ends a run has this key. A run that goes on writes a new summary.
_SUMMARY_KEY = "train_runtime"


class MetricsFileCallback(TrainerCallback):
    """Appends every log to a JSON Lines file (see `StepLines`), on the main process only. A resumed run's file has the
    same lines as an undisturbed run's, but for times and speeds.

    `time` is in seconds since 1970 (UTC). NaN and infinity, which JSON does not have, are written as null.

    Args:
        path (`str` or `Path`):
            The file. Missing folders are made; a run that starts at step 0 starts the file anew.

    Raises:
        UserError: in the event that fails, where the file cannot be written or has a line that is not ours.
    """

    def __init__(self, path: str | Path) -> None:
        self._lines = StepLines(Path(path), "training metrics")

    def on_train_begin(self, args, state, control, **kwargs):
        """Drop what the run will log again; an unwritable file is noticed here, before the first step."""
        if state.is_world_process_zero:
            self._lines.begin(state.global_step, again=lambda row: _SUMMARY_KEY in row)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append one line."""
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 3), **logs}
        self._lines.add({key: _json_value(value) for key, value in line.items()})


def _json_value(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, np.generic)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
