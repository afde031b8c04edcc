"""landscape.jsonl: the landscape of the trained tokens, window by window of steps, over all processes.

    {"step": last step, "first_step": first step, ...Landscape.to_dict()}

About 20 windows a run; a checkpoint ends a window too, so that what a resumed run has trained is all there once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from eaftdrope.loss.landscape import Landscape

from .step_lines import StepLines

_WINDOWS = 20


class LandscapeFileCallback(TrainerCallback):
    """Writes a line whenever a window ends, on the main process (see `StepLines`).

    Args:
        path (`Path`):
            The file.
        pop (`Callable[[], Landscape | None]`):
            What was trained since it was last called: [`EAFTTrainer.pop_landscape`]. Called on every process.

    Raises:
        UserError: in the event that fails, where the file cannot be written or has a line that is not ours.
    """

    def __init__(self, path: Path, pop: Callable[[], Landscape | None]) -> None:
        self._lines = StepLines(path, "landscapes of tokens")
        self._pop = pop
        self._written = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Drop what the run will write again."""
        self._written = state.global_step
        if state.is_world_process_zero:
            self._lines.begin(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        every = math.ceil(state.max_steps / _WINDOWS)
        # before the checkpoint, not after: a run killed in between would lose the window
        if control.should_save or state.global_step % every == 0 or state.global_step >= state.max_steps:
            self._write(state)

    def on_save(self, args, state, control, **kwargs):
        """A checkpoint that was decided on after the step."""
        self._write(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._write(state)

    def _write(self, state) -> None:
        if state.global_step == self._written:
            return
        landscape = self._pop()
        if landscape is not None and state.is_world_process_zero:
            window = {"step": state.global_step, "first_step": self._written + 1}
            self._lines.add({**window, **landscape.to_dict()})
        self._written = state.global_step
