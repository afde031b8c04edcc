"""landscape.jsonl: the landscape of the trained tokens, window by window of steps, over all processes.

    {"step": last step, "first_step": first step, ...Landscape.to_dict()}

About 20 windows per run; a checkpoint ends a window too, so that a resumed run has every step in exactly one window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eaftdrope.loss.landscape import Landscape

from .step_lines import StepLines

_WINDOWS = 20


class LandscapeFileCallback(TrainerCallback):
    """Writes one line at the end of each window, on the main process (see `StepLines`).

    Args:
        path (`Path`):
            The file.
        pop (`Callable[[], Landscape | None]`):
            Returns the landscape of the tokens trained since the last call: [`EAFTTrainer.pop_landscape`]. Called on every
            process.

    Raises:
        UserError: in the event that fails, if the file cannot be written or has a line in another format.
    """

    def __init__(self, path: Path, pop: Callable[[], Landscape | None]) -> None:
        self._lines = StepLines(path, "landscapes of tokens")
        self._pop = pop
        self._written = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines that the run will write again."""
        self._written = state.global_step
        if state.is_world_process_zero:
            self._lines.begin(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        every = math.ceil(state.max_steps / _WINDOWS)
        # before the checkpoint, not after: a run killed in between would lose the window
        if control.should_save or state.global_step % every == 0 or state.global_step >= state.max_steps:
            self._write(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the window at a checkpoint that was decided on after the step."""
        self._write(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(state)

    def _write(self, state: TrainerState) -> None:
        if state.global_step == self._written:
            return
        landscape = self._pop()
        if landscape is not None and state.is_world_process_zero:
            window = {"step": state.global_step, "first_step": self._written + 1}
            self._lines.add({**window, **landscape.to_dict()})
        self._written = state.global_step
