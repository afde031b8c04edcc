"""Resuming: the checkpoint to start from, the same on every process, and notes about logs that are lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eaftdrope.trainer import EAFTTrainer

from .folder import RunFolder


def agreed_checkpoint(trainer: EAFTTrainer, folder: RunFolder) -> tuple[Path | None, tuple[int, ...]]:
    """The checkpoint to resume from, verified by the main process, and the steps of those that were skipped.

    For every process. None starts from the beginning.
    """
    chosen: list[Any] = [None, ()]
    if trainer.accelerator.is_main_process:
        found = folder.resume_point()
        chosen = [found.checkpoint and found.checkpoint.name, tuple(passed.step for passed in found.passed_over)]
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    name, passed_over = chosen
    return name and folder.checkpoints / name, passed_over


def lost_lines(folder: Path, state: dict) -> list[str]:
    """Notes about logs that lack lines of steps before the checkpoint with this trainer state."""
    step = state["global_step"]
    notes = []
    for name, interval in (("metrics.jsonl", state.get("logging_steps") or 1), ("landscape.jsonl", 1)):
        last = _last_step(folder / name, step)
        if last + interval <= step:
            notes.append(f"{folder / name} has no lines of steps {last + 1} to {step}: its curves will lack them")
    return notes


def _last_step(file: Path, until: int) -> int:
    """The last step up to `until` that a file has a line for, 0 without one.

    Lines that cannot be read are skipped: the callback that continues the file reports them.
    """
    last = 0
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if type(step) is int and last < step <= until:
            last = step
    return last


def load_only(trainer: EAFTTrainer, checkpoint: Path) -> None:
    """Load the model of a checkpoint after which nothing is left to train, sharded as the engine shards it.

    The Trainer itself would train one step more.
    """
    stop = _StopOnceLoaded()
    trainer.callback_handler.callbacks.insert(0, stop)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except _Loaded:
        trainer.is_in_train = False
    finally:
        trainer.remove_callback(stop)


class _Loaded(Exception):
    pass


class _StopOnceLoaded(TrainerCallback):
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        raise _Loaded


class PresentSchedule(TrainerCallback):
    """Sets the learning rate of the first resumed step to the present schedule's.

    The optimiser's state has the one of the schedule that it was saved under, which a lengthened run no longer has.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        rates = zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
        for group, (base, factor) in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = base * factor(lr_scheduler.last_epoch)
        # what is logged
        lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
