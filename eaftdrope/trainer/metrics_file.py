"""metrics.jsonl: one JSON object per log of the trainer, {"step", "epoch", "time", ...the log}.

A run that was killed after step k+n and resumed from the checkpoint of step k logs the steps after k again. So when
training begins, lines that the resumed run will write anew are dropped: a resumed run's file has the same lines as an
undisturbed run's (but for times and speeds).
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from eaftdrope.errors import UserError

# Only the summary that ends a run has this key. A run that goes on writes a new summary.
_SUMMARY_KEY = "train_runtime"


class MetricsFileCallback(TrainerCallback):
    """Appends every log to a JSON Lines file, on the main process only; each line reaches the disk's cache at once.

    `time` is in seconds since 1970 (UTC). NaN and infinity, which JSON does not have, are written as null.

    Args:
        path (`str` or `Path`):
            The file. Missing folders are made; a run that starts at step 0 starts the file anew.

    Raises:
        UserError: in the event that fails, where the file cannot be written or has a line that is not ours.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_begin(self, args, state, control, **kwargs):
        """Drop what the run will log again; an unwritable file is noticed here, before the first step."""
        if not state.is_world_process_zero:
            return
        with _told_to_user(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = _lines_up_to(self.path, state.global_step) if state.global_step else []
            rewritten = self.path.with_name(self.path.name + ".new")
            with open(rewritten, "w", encoding="utf-8") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            # Atomic: killed at any moment, the file is the old one or the new one.
            os.replace(rewritten, self.path)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append one line."""
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 3), **logs}
        text = json.dumps({key: _json_value(value) for key, value in line.items()}, allow_nan=False)
        # Opened for each line: nothing is buffered when the process is killed, and no handle outlives an exception.
        with _told_to_user(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Return the lines (with line ends) that a run resumed from `step` will not write again."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break  # the process was killed, or the disk was full, in the middle of this line
        try:
            row = json.loads(line)
            again = row["step"] > step or _SUMMARY_KEY in row
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}:{number}: not a line of training metrics, so the file cannot be continued. "
                "Move the file away and start again; the run then resumes with a new file."
            ) from error
        if not again:
            kept.append(line)
    return kept


def _json_value(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, np.generic)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _told_to_user(path: Path):
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"cannot write {path}: the disk is full. Free some space and start the same command again; "
                "the run resumes from its last checkpoint."
            ) from error
        raise UserError(
            f"cannot write the training metrics to {path}: {error.strerror}. "
            "Choose an output folder that can be written to."
        ) from error
