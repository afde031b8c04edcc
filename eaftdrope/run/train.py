"""From a recipe to its result: every stage planned first, then run one after the other.

    recipe -> plan -> data -> model -> probes before -> training -> result -> probes after -> table and card

Every step leaves its result in the stage's folder, so the same command after a kill goes on where the folders end.
"""

from __future__ import annotations

import gc
import json
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from eaftdrope.recipe.dump import dump_recipe
from eaftdrope.recipe.schema import Recipe

from .build import RunData, build_arguments, build_model, let_be_saved, stop_where_trained
from .fingerprint import fingerprints
from .finish import about_run, finish, versions
from .folder import RunFolder
from .interrupts import RunInterrupted, only_start, told_about_disk
from .machine import keep_freed_memory, training_device
from .prepare import Prepared, prepare
from .probing import during_callback, is_sharded, probe_run
from .recovery import RECOVERY_FILE
from .result import gather_on_save, save_result
from .stages.chain import Stage, open_stages, training_recipe
from .stages.drope import convert_stage, show_conversion, wait_for_everyone

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from eaftdrope.evaluate import Score
    from eaftdrope.trainer import EAFTTrainer


@dataclass(frozen=True)
class RunResult:
    """Where the run's last stage is, and its probes. Scores are empty without probes, and on all but the main process."""

    folder: Path
    before: list[Score]
    after: list[Score]


def show_plan(recipe: Recipe, console: Console, *, overwrite: bool = False) -> None:
    """`--dry-run`: the plan with the data read and the model's configuration, no weights, nothing written.

    Raises:
        UserError: everything that would stop the run before its weights are read, the state of the output folder
            included.
    """
    _prepare(open_stages(recipe, overwrite=overwrite), console)


def run_recipe(recipe: Recipe, console: Console, *, command: str, overwrite: bool = False) -> RunResult:
    """Runs a recipe to its end, or goes on with the run that its folder holds.

    Args:
        console: where the main process prints; the other processes are silent.
        command: what the user typed, for the model card.
        overwrite: delete a run that the folder holds and start anew, once recipe, data and model are known to be good.

    Raises:
        UserError: anything the user can correct: the folder, the data, the model, a full disk, a diverged training.
        RunInterrupted: Ctrl-C.
    """
    console.quiet = not _is_main()
    # what is refused is refused before a lock is made in it
    open_stages(recipe, overwrite=overwrite)
    with only_start(recipe.output.dir) if _is_main() else nullcontext():
        return _run_stages(recipe, console, command=command, overwrite=overwrite)


def _is_main() -> bool:
    """Whether this is the main process; known before the processes meet."""
    return int(os.environ.get("RANK", "0")) == 0


def _run_stages(recipe: Recipe, console: Console, *, command: str, overwrite: bool) -> RunResult:
    stages = open_stages(recipe, overwrite=overwrite)
    place = _Place(stages[0])
    started = time.monotonic()
    try:
        with told_about_disk(recipe.output.dir):
            result = _run(stages, console, command, place)
    except KeyboardInterrupt:
        raise RunInterrupted(_how_to_go_on(place, overwrite)) from None
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.print(f"\ndone in {minutes}:{seconds:02d}; the result is in {result.folder}", highlight=False, markup=False)
    return result


@dataclass
class _Place:
    """How far a run is: at which stage, in words, and whether anything was changed since the command was started."""

    stage: Stage
    words: str = "while loading"
    changed: bool = False


def _how_to_go_on(place: _Place, overwrite: bool) -> str:
    if not place.changed:
        return f"Interrupted {place.words}, before anything was changed. Start the same command again."
    stage = place.stage
    command = "The same command without --overwrite" if overwrite else "The same command"
    checkpoint = stage.folder.last_checkpoint()
    if checkpoint:
        way = f"goes on from {checkpoint.name}"
    else:
        way = "trains from the beginning" if stage.folder.begun else f"begins the stage {stage.name}"
    where = f" of the stage {stage.name}" if stage.heading else ""
    return f"Interrupted {place.words}{where}. {command} {way}."


def _prepare(stages: list[Stage], console: Console) -> dict[str, Prepared]:
    """What the stages that are still to be run need, by their names: all of it is checked before the first begins."""
    prepared = {}
    for stage in stages:
        if stage.folder.trained:
            _print_trained(stage, console)
        elif stage.folder.finished:
            console.print(f"\n{stage.heading}, finished in {stage.folder.path}", highlight=False, markup=False)
        elif stage.name == "drope":
            show_conversion(stage, console)
        else:
            if _is_main():
                _print_notes([*stage.folder.resume_point().notes(), *stage.folder.pop_notes()], console)
            prepared[stage.name] = prepare(stage, console)
    return prepared


def _print_trained(stage: Stage, console: Console) -> None:
    name = f"{stage.heading}, " if stage.heading else ""
    missing = ", ".join(stage.folder.missing) or "its last entry in run.json"
    console.print(
        f"\n{name}trained in {stage.folder.path}; missing: {missing}", highlight=False, markup=False, soft_wrap=True
    )


def _print_notes(notes: list[str], console: Console) -> None:
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _run(stages: list[Stage], console: Console, command: str, place: _Place) -> RunResult:
    if training_device().kind == "cpu":
        keep_freed_memory()
    prepared = _prepare(stages, console)
    # looked at before anything changes: the processes must agree on it
    converting = [stage for stage in stages if stage.name == "drope" and not stage.folder.finished]
    if any(stage.folder.trained for stage in stages):
        # the main process alone completes it; a slow one would find it finished
        wait_for_everyone()
    result = RunResult(stages[-1].folder.path, [], [])
    for stage in stages:
        place.stage = stage
        if stage.folder.trained:
            result = _complete_stage(stage, console, place)
        elif stage.name in prepared:
            # what it holds (rows, probes) is not needed once the stage is finished
            result = _train_stage(stage, prepared.pop(stage.name), console, command, place)
            gc.collect()
        elif stage in converting:
            place.words = "while converting"
            convert_stage(stage, console)
            place.changed = True
    return result


def _complete_stage(stage: Stage, console: Console, place: _Place) -> RunResult:
    """Writes what a stage lacks whose training and measuring are done: a start was killed after them, or somebody has
    deleted it."""
    place.words, place.changed = "after training", True
    if not _is_main():
        return RunResult(stage.folder.path, [], [])
    before, after = (stage.folder.load_scores(when) or [] for when in ("before", "after"))
    finish(stage, training_recipe(stage), before, after, console)
    return RunResult(stage.folder.path, before, after)


def _train_stage(stage: Stage, prepared: Prepared, console: Console, command: str, place: _Place) -> RunResult:
    """Trains one stage, or goes on with it, and writes its result."""
    from transformers import set_seed

    from eaftdrope.models import load_tokenizer

    recipe, data, folder, tokenizer = prepared.recipe, prepared.data, stage.folder, prepared.tokenizer
    place.words = "while loading"
    curve = None
    if stage.heading:
        console.print(f"\n{stage.heading}", highlight=False, markup=False)
        # the same new weights, whether or not an earlier stage was trained by this process
        set_seed(recipe.train.seed)
        tokenizer = load_tokenizer(
            recipe.model.reference, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
        )
    if prepared.recovery and _is_main():
        curve = prepared.recovery.begin(console)
    trainer = build_trainer(recipe, data, tokenizer, folder)
    main_process = trainer.accelerator.is_main_process
    if main_process:
        for later in stage.later:
            later.discard()
        record = dump_recipe(stage.record, folder=folder.path)
        folder.begin(record, versions(), data.stats, fingerprints(prepared))
        _print_notes(folder.pop_notes(), console)
        if curve:
            folder.write(RECOVERY_FILE, curve.to_json())
    trainer.accelerator.wait_for_everyone()
    place.changed = True

    place.words = "while probing before training"
    if is_sharded(trainer):
        from eaftdrope.trainer.callbacks.probes import ProbeOnceSharded

        probe = partial(probe_run, "before", trainer, tokenizer, prepared, folder, console)
        trainer.add_callback(ProbeOnceSharded(probe))
    else:
        probe_run("before", trainer, tokenizer, prepared, folder, console)
    _train(trainer, tokenizer, prepared, console, place)
    place.words = "after training"
    if prepared.recovery:
        prepared.recovery.note_in(trainer.model.config)
    save_result(trainer, tokenizer, folder, recipe)
    after = probe_run("after", trainer, tokenizer, prepared, folder, console)
    before = (folder.load_scores("before") or []) if main_process else []
    if main_process:
        folder.note_trained(about_run(stage, recipe, command))
        finish(stage, recipe, before, after, console)
    trainer.accelerator.wait_for_everyone()
    return RunResult(folder.path, before, after)


def build_trainer(recipe: Recipe, data: RunData, tokenizer, folder: RunFolder) -> EAFTTrainer:
    """Model and trainer, ready to train."""
    from eaftdrope.trainer import EAFTTrainer

    from .lora import lora_config

    arguments = build_arguments(recipe, folder.checkpoints, data.stats)
    model = build_model(recipe)
    adapters = lora_config(recipe.lora, model) if recipe.lora else None
    if adapters:
        # peft notes where the base model is, but not which of its commits
        adapters.revision = recipe.model.revision
    stop_where_trained(model, tokenizer, data.report.stop_tokens)
    let_be_saved(model)
    trainer = EAFTTrainer(
        model,
        arguments,
        train_dataset=data.train,
        eval_dataset=data.held_out if recipe.train.eval_every else None,
        processing_class=tokenizer,
        peft_config=adapters,
    )
    gather_on_save(trainer)
    return trainer


def _train(trainer: EAFTTrainer, tokenizer, prepared: Prepared, console: Console, place: _Place) -> None:
    """Trains from the start or from the folder's last checkpoint; one after which nothing is left to train is only
    loaded, because the Trainer would take one step more."""
    from transformers import set_seed

    from eaftdrope.trainer.callbacks.landscape import LandscapeFileCallback
    from eaftdrope.trainer.callbacks.metrics import MetricsFileCallback
    from eaftdrope.trainer.callbacks.progress import use_progress_display

    from .checkpoints import SealCheckpoints
    from .resuming import agreed_checkpoint, check_measured_before, lost_lines, only_load

    folder = place.stage.folder
    checkpoint, passed_over = agreed_checkpoint(trainer, folder)
    recovery = prepared.recovery.callback() if prepared.recovery else None
    if checkpoint:
        check_measured_before(trainer, prepared, folder)
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        step = state["global_step"]
        console.print(f"going on from {checkpoint.name} of {state['max_steps']}", highlight=False)
        if step >= state["max_steps"] or (recovery and recovery.curve.stopped_after(step)):
            only_load(trainer, checkpoint)
            return
        _print_notes(lost_lines(folder.path, state), console)
    # The order of the rows is drawn here, also by a run that goes on and has not probed before.
    set_seed(trainer.args.seed)
    if recovery:
        # before those that show or keep what it measures
        trainer.add_callback(recovery)
    if during := during_callback(trainer, tokenizer, prepared, folder):
        # before the trackers too, which the trainer has already
        trainer.callback_handler.callbacks.insert(0, during)
    trainer.add_callback(MetricsFileCallback(folder.path / "metrics.jsonl"))
    trainer.add_callback(LandscapeFileCallback(folder.path / "landscape.jsonl", trainer.pop_landscape))
    # after those that write what belongs to a checkpoint
    trainer.add_callback(SealCheckpoints(folder.sealed, prepared.recipe.train.keep_checkpoints, passed_over))
    display = use_progress_display(trainer)
    place.words = "while training"
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        place.words = f"at step {trainer.state.global_step} of {trainer.state.max_steps}"
        raise
    finally:
        display.close()
