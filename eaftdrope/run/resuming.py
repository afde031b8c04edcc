"""From which checkpoint a training resumes, on every process the same, and what of its records is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from eaftdrope.errors import UserError

from .probing import is_sharded
from .samples import SAMPLES_FILE, kept_samples

if TYPE_CHECKING:
    from eaftdrope.trainer import EAFTTrainer

    from .folder import RunFolder
    from .prepare import Prepared


def agreed_checkpoint(trainer: EAFTTrainer, folder: RunFolder) -> tuple[Path | None, tuple[int, ...]]:
    """The checkpoint to resume from, which the main process has verified (None: from the beginning), and the steps of
    those that were passed over. For every process."""
    chosen = [None, ()]
    if trainer.accelerator.is_main_process:
        found = folder.resume_point()
        chosen = [found.checkpoint and found.checkpoint.name, tuple(passed.step for passed in found.passed_over)]
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    name, passed_over = chosen
    return name and folder.checkpoints / name, passed_over


def check_measured_before(trainer: EAFTTrainer, prepared: Prepared, folder: RunFolder) -> None:
    """
    Raises:
        UserError: scores or samples of the base model are lost, and it is sharded: it was measured when the training began.
    """
    if not prepared.probes or not is_sharded(trainer):
        return
    measured = {"probes_before.json": folder.load_scores("before"), SAMPLES_FILE: kept_samples(folder)}
    lost = [str(folder.path / name) for name, content in measured.items() if content is None]
    if lost:
        raise UserError(
            f"{' and '.join(lost)} is damaged or missing, and a sharded base model cannot be measured again "
            "once its training has begun. Put back a copy and run the same command again, or pass --overwrite to delete "
            "the run and start from scratch."
        )


def lost_lines(folder: Path, state: dict) -> list[str]:
    """Sentences about the logs of a run that is resumed from a checkpoint with `state`, where lines before it are lost."""
    step = state["global_step"]
    notes = []
    for name, interval in (("metrics.jsonl", state.get("logging_steps") or 1), ("landscape.jsonl", 1)):
        last = _last_step(folder / name, step)
        if last + interval <= step:
            notes.append(f"{folder / name} has no lines of steps {last + 1} to {step}: its curves will lack them")
    return notes


def _last_step(file: Path, until: int) -> int:
    """The last step up to `until` that a file has a line of, 0 without one. Lines that are not ours are not looked at: the
    file's own reader names them."""
    last = 0
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if type(step) is int and last < step <= until:
            last = step
    return last


def only_load(trainer: EAFTTrainer, checkpoint: Path) -> None:
    """Loads the model of a checkpoint after which nothing is left to train, sharded as the engine shards it. The Trainer
    would take one step more."""
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
    def on_train_begin(self, args, state, control, **kwargs):
        raise _Loaded
