"""Seals each checkpoint once every process has written it, and deletes those that are too many."""

from __future__ import annotations

from accelerate import PartialState
from transformers import TrainerCallback

from .checkpoints import Checkpoints


class SealCheckpoints(TrainerCallback):
    """Manifest and rotation of checkpoints. The Trainer's own rotation must be off (`save_total_limit=None`): it would
    delete the last complete checkpoint before the new one is.

    Args:
        checkpoints (`Checkpoints`): those of the run.
        keep (`int`): how many are kept.
        passed_over (`tuple[int, ...]`): steps of checkpoints that were not resumed from. They are the same on every process.
    """

    def __init__(self, checkpoints: Checkpoints, keep: int, passed_over: tuple[int, ...] = ()) -> None:
        self._checkpoints, self._keep, self._passed_over = checkpoints, keep, set(passed_over)

    def on_train_begin(self, args, state, control, **kwargs):
        """Log, evaluate and save as the recipe is now: a resumed state has the intervals of its first start."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        """What is left of a checkpoint that was passed over must not get into the new one of its step."""
        if state.global_step in self._passed_over:
            self._passed_over.discard(state.global_step)
            if state.is_world_process_zero:
                self._checkpoints.discard(state.global_step)
            PartialState().wait_for_everyone()

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            self._checkpoints.seal(state.global_step)
            self._checkpoints.rotate(state.global_step, self._keep, passed_over=tuple(self._passed_over))
