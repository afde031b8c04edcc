"""Stops a training whose loss is no longer a number: what follows would be lost time and a broken model."""

from __future__ import annotations

import math

from transformers import TrainerCallback

from ..errors import UserError

_WATCHED = {"loss": "the loss", "grad_norm": "the gradient norm"}


class StopWhenDiverged(TrainerCallback):
    """Ends the training at the first log with a NaN or infinite loss or gradient norm, before a checkpoint is written.

    Needs `logging_nan_inf_filter=False` (the filter of transformers hides such losses), and callbacks that show or keep
    the logs must come before it.

    Raises:
        UserError: in `on_log`, on every process.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        bad = [f"{_WATCHED[key]} is {logs[key]}" for key in _WATCHED if not math.isfinite(logs.get(key, 0.0))]
        if bad:
            raise UserError(
                f"training diverged: at step {state.global_step} {' and '.join(bad)}. The first suspect is the "
                f"learning_rate ({args.learning_rate:g}): lower it, or warm it up over more steps. The weights are of no "
                "use any more; start anew (--overwrite)."
            )
