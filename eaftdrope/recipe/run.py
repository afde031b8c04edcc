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

from .build import RunData, build_arguments, build_model, let_be_saved, stop_where_trained
from .conversion import convert_stage, show_conversion
from .dump import dump_recipe
from .finish import finish, push, versions
from .lock import only_start
from .machine import keep_freed_memory, training_device
from .prepare import Prepared, prepare
from .probing import during_callback, is_sharded, probe_run
from .recovery import RECOVERY_FILE, show_recovery
from .rundir import RunFolder
from .schema import Recipe
from .stages import Stage, open_stages
from .stops import RunInterrupted, told_about_disk

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from ..evaluate import Score
    from ..trainer import EAFTTrainer


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
    main_process = int(os.environ.get("RANK", "0")) == 0
    console.quiet = not main_process
    with only_start(recipe.output.dir) if main_process else nullcontext():
        result = _run_stages(recipe, console, command=command, overwrite=overwrite)
        if main_process and recipe.output.push_to_hub:
            push(recipe, result.folder)
    return result


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
    console.print(f"\ndone in {minutes}:{seconds:02d}; the result is in {result.folder}", highlight=False)
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
        if stage.folder.finished:
            console.print(f"\n{stage.heading}, finished in {stage.folder.path}", highlight=False)
        elif stage.name == "drope":
            show_conversion(stage, console)
        else:
            prepared[stage.name] = prepare(stage, console)
    return prepared


def _run(stages: list[Stage], console: Console, command: str, place: _Place) -> RunResult:
    if training_device().kind == "cpu":
        keep_freed_memory()
    prepared = _prepare(stages, console)
    # looked at before anything changes: the processes must agree on it
    converting = [stage for stage in stages if stage.name == "drope" and not stage.folder.finished]
    result = RunResult(stages[-1].folder.path, [], [])
    for stage in stages:
        place.stage = stage
        if stage.name in prepared:
            # what it holds (rows, probes) is not needed once the stage is finished
            result = _train_stage(stage, prepared.pop(stage.name), console, command, place)
            gc.collect()
        elif stage in converting:
            place.words = "while converting"
            convert_stage(stage, console)
            place.changed = True
    return result


def _train_stage(stage: Stage, prepared: Prepared, console: Console, command: str, place: _Place) -> RunResult:
    """Trains one stage, or goes on with it, and writes its result."""
    from transformers import set_seed

    from ..models import load_tokenizer

    recipe, data, folder, tokenizer = prepared.recipe, prepared.data, stage.folder, prepared.tokenizer
    place.words = "while loading"
    curve = None
    if stage.heading:
        console.print(f"\n{stage.heading}", highlight=False)
        # the same new weights, whether or not an earlier stage was trained by this process
        set_seed(recipe.train.seed)
        tokenizer = load_tokenizer(
            recipe.model.reference, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
        )
    if prepared.recovery and int(os.environ.get("RANK", "0")) == 0:
        curve = prepared.recovery.begin(console)
    trainer = build_trainer(recipe, data, tokenizer, folder)
    main_process = trainer.accelerator.is_main_process
    if main_process:
        for later in stage.later:
            later.discard()
        folder.begin(dump_recipe(stage.record, folder=folder.path), versions(), data.stats)
        if curve:
            folder.write(RECOVERY_FILE, curve.to_json())
    trainer.accelerator.wait_for_everyone()
    place.changed = True

    place.words = "while probing before training"
    if is_sharded(trainer):
        from ..trainer.probing import ProbeOnceSharded

        probe = partial(probe_run, "before", trainer, tokenizer, prepared, folder, console)
        trainer.add_callback(ProbeOnceSharded(probe))
    else:
        probe_run("before", trainer, tokenizer, prepared, folder, console)
    _train(trainer, tokenizer, prepared, console, place)
    place.words = "after training"
    if prepared.recovery:
        prepared.recovery.note_in(trainer.model.config)
    _save_result(trainer, tokenizer, folder)
    after = probe_run("after", trainer, tokenizer, prepared, folder, console)
    before = (folder.load_scores("before") or []) if main_process else []
    if main_process:
        if prepared.recovery:
            show_recovery(folder, console)
        finish(stage, recipe, before, after, command, console)
    trainer.accelerator.wait_for_everyone()
    return RunResult(folder.path, before, after)


def build_trainer(recipe: Recipe, data: RunData, tokenizer, folder: RunFolder) -> EAFTTrainer:
    """Model and trainer, ready to train."""
    from ..trainer import EAFTTrainer
    from .adapters import lora_config

    arguments = build_arguments(recipe, folder.checkpoints, data.stats)
    model = build_model(recipe)
    adapters = lora_config(recipe.lora, model) if recipe.lora else None
    if adapters:
        # peft notes where the base model is, but not which of its commits
        adapters.revision = recipe.model.revision
    stop_where_trained(model, tokenizer, data.report.stop_tokens)
    let_be_saved(model)
    return EAFTTrainer(
        model,
        arguments,
        train_dataset=data.train,
        eval_dataset=data.held_out if recipe.train.eval_every else None,
        processing_class=tokenizer,
        peft_config=adapters,
    )


def _train(trainer: EAFTTrainer, tokenizer, prepared: Prepared, console: Console, place: _Place) -> None:
    """Trains from the start or from the folder's last checkpoint; one after which nothing is left to train is only
    loaded, because the Trainer would take one step more."""
    from transformers import set_seed

    from ..trainer.landscape_file import LandscapeFileCallback
    from ..trainer.metrics_file import MetricsFileCallback
    from ..trainer.progress import use_progress_display

    folder = place.stage.folder
    checkpoint = folder.last_checkpoint()
    recovery = prepared.recovery.callback() if prepared.recovery else None
    if checkpoint:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        step = state["global_step"]
        console.print(f"going on from {checkpoint.name} of {state['max_steps']}", highlight=False)
        if step >= state["max_steps"] or (recovery and recovery.curve.stopped_after(step)):
            trainer._load_from_checkpoint(str(checkpoint))
            return
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
    display = use_progress_display(trainer)
    place.words = "while training"
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        place.words = f"at step {trainer.state.global_step} of {trainer.state.max_steps}"
        raise
    finally:
        display.close()


def _save_result(trainer: EAFTTrainer, tokenizer, folder: RunFolder) -> None:
    """Adapter or weights, with everything stock loaders look for beside them."""
    from ..drope.config import complete

    trainer.save_model(str(folder.path))
    if trainer.accelerator.is_main_process:
        tokenizer.save_pretrained(folder.path)
        trainer.model.generation_config.save_pretrained(folder.path)
        complete(folder.path)
        # pickled trainer arguments: of no use to anyone who loads the result
        (folder.path / "training_args.bin").unlink(missing_ok=True)
