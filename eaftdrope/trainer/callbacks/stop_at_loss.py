"""End a training once its evaluation loss is low enough."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopAtLoss(TrainerCallback):
    """Ends the training, with a checkpoint, after the first evaluation whose loss is at most `level`.

    Args:
        level (`float`):
            Nats per trained token.
    """

    def __init__(self, level: float) -> None:
        self.level = level

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        assert metrics is not None
        if metrics["eval_loss"] <= self.level:
            control.should_save = control.should_training_stop = True

    def stopped_at(self, step: int, history: list[dict[str, Any]]) -> bool:
        """Return whether a training ended after this step for its loss, by the `log_history` of its checkpoint."""
        return any(entry["step"] == step and entry.get("eval_loss", float("inf")) <= self.level for entry in history)
