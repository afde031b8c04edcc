"""One recipe, one run: plan, probe, train, probe, table.

    recipe -> plan -> data -> model -> probes before -> training -> result -> probes after -> table and card

Every step leaves its result in the run's folder, so the same command after a kill goes on where the folder ends.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UserError
from .build import (
    RunData,
    build_arguments,
    build_data,
    build_model,
    build_run_probes,
    check_backend,
    let_be_saved,
    stop_where_trained,
    uses_bfloat16,
)
from .dump import dump_recipe
from .machine import keep_freed_memory, training_device
from .plan import make_plan, plan_table, plan_text
from .rundir import RunFolder
from .schema import Recipe
from .stops import RunInterrupted, told_about_disk

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from ..evaluate import Probe, Score
    from ..trainer import EAFTTrainer

_PACKAGES = ("eaftdrope", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class RunResult:
    """Where the run is, and its probes. Scores are empty without probes, and on all but the main process."""

    folder: Path
    before: list[Score]
    after: list[Score]


def show_plan(recipe: Recipe, console: Console, *, overwrite: bool = False) -> None:
    """`--dry-run`: the plan with the data read and the model's configuration, no weights, nothing written.

    Raises:
        UserError: everything that would stop the run before its weights are read, the state of the output folder
            included.
    """
    RunFolder(recipe.output.dir, recipe, overwrite=overwrite)
    _prepare(recipe, console)


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
    folder = RunFolder(recipe.output.dir, recipe, overwrite=overwrite)
    place = _Place("while loading")
    started = time.monotonic()
    try:
        with told_about_disk(recipe.output.dir):
            result = _run(recipe, console, command, folder, place)
    except KeyboardInterrupt:
        raise RunInterrupted(_how_to_go_on(folder, place, overwrite)) from None
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.print(f"\ndone in {minutes}:{seconds:02d}; the result is in {folder.path}", highlight=False)
    if main_process and recipe.output.push_to_hub:
        _push(recipe, folder)
    return result


@dataclass
class _Place:
    """How far a run is, in words; `begun` once its folder holds it."""

    words: str
    begun: bool = False


def _how_to_go_on(folder: RunFolder, place: _Place, overwrite: bool) -> str:
    if not place.begun:
        return f"Interrupted {place.words}, before anything was changed. Start the same command again."
    command = "The same command without --overwrite" if overwrite else "The same command"
    checkpoint = folder.last_checkpoint()
    way = f"goes on from {checkpoint.name}" if checkpoint else "trains from the beginning"
    return f"Interrupted {place.words}. {command} {way}."


def _run(recipe: Recipe, console: Console, command: str, folder: RunFolder, place: _Place) -> RunResult:
    if training_device().kind == "cpu":
        keep_freed_memory()
    tokenizer, data, probes = _prepare(recipe, console)
    trainer = build_trainer(recipe, data, tokenizer, folder)
    main_process = trainer.accelerator.is_main_process
    if main_process:
        folder.begin(dump_recipe(recipe, folder=folder.path), _versions(), data.stats)
    trainer.accelerator.wait_for_everyone()
    place.begun = True

    place.words = "while probing before training"
    before = _probe("before", trainer, tokenizer, probes, recipe, folder, console)
    _train(trainer, folder.last_checkpoint(), console, place)
    place.words = "after training"
    _save_result(trainer, tokenizer, folder)
    after = _probe("after", trainer, tokenizer, probes, recipe, folder, console)
    if main_process:
        _finish(recipe, folder, before, after, command, console)
    trainer.accelerator.wait_for_everyone()
    return RunResult(folder.path, before, after)


def _prepare(recipe: Recipe, console: Console):
    """Tokenizer, data and probes, with the plan and what the data's audit found on the screen."""
    from ..models import load_tokenizer, needs_dequantising

    check_backend(recipe)
    model = recipe.model
    if needs_dequantising(model.reference):
        console.print("dequantising the model once, about half a minute ...", highlight=False)
    tokenizer = load_tokenizer(model.reference, revision=model.revision, trust_remote_code=model.trust_remote_code)
    data = build_data(recipe, tokenizer)
    probes = build_run_probes(recipe, data)
    _print_plan(recipe, data, console)
    _print_audit(data, console)
    return tokenizer, data, probes


def build_trainer(recipe: Recipe, data: RunData, tokenizer, folder: RunFolder) -> EAFTTrainer:
    """Model and trainer, ready to train."""
    from ..trainer import EAFTTrainer
    from ..trainer.metrics_file import MetricsFileCallback
    from .adapters import lora_config

    arguments = build_arguments(recipe, folder.checkpoints)
    adapters = lora_config(recipe.lora) if recipe.lora else None
    if adapters:
        # peft notes where the base model is, but not which of its commits
        adapters.revision = recipe.model.revision
    model = build_model(recipe)
    stop_where_trained(model, tokenizer, data.report.stop_tokens)
    let_be_saved(model)
    return EAFTTrainer(
        model,
        arguments,
        train_dataset=data.train,
        eval_dataset=data.held_out if recipe.train.eval_every else None,
        processing_class=tokenizer,
        peft_config=adapters,
        callbacks=[MetricsFileCallback(folder.path / "metrics.jsonl")],
    )


def _train(trainer: EAFTTrainer, checkpoint: Path | None, console: Console, place: _Place) -> None:
    """Trains from the start or from a checkpoint; a checkpoint of the last step is only loaded, because the Trainer
    would take one step more."""
    from transformers import set_seed

    from ..trainer.divergence import StopWhenDiverged
    from ..trainer.progress import use_progress_display

    if checkpoint:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        console.print(f"going on from {checkpoint.name} of {state['max_steps']}", highlight=False)
        if state["global_step"] >= state["max_steps"]:
            trainer._load_from_checkpoint(str(checkpoint))
            return
    # The order of the rows is drawn here, also by a run that goes on and has not probed before.
    set_seed(trainer.args.seed)
    display = use_progress_display(trainer)
    # after those that show and keep the step it stops at
    trainer.add_callback(StopWhenDiverged())
    place.words = "while training"
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        place.words = f"at step {trainer.state.global_step} of {trainer.state.max_steps}"
        raise
    finally:
        display.close()


def _probe(
    when: str, trainer: EAFTTrainer, tokenizer, probes: list[Probe], recipe: Recipe, folder: RunFolder, console: Console
) -> list[Score]:
    """Scores, measured by the main process; those of before from the folder if a former start measured them."""
    import torch

    from ..evaluate import run_probes

    scores = folder.load_scores(when) if when == "before" else None
    if scores is None and probes and trainer.accelerator.is_main_process:
        device = trainer.accelerator.device.type
        with (
            _probe_progress(console, when) as progress,
            torch.autocast(device, torch.bfloat16, enabled=uses_bfloat16(recipe)),
        ):
            model = trainer.accelerator.unwrap_model(trainer.model)
            scores = run_probes(model, tokenizer, probes, batch_tokens=recipe.probes.batch_tokens, progress=progress)
        folder.save_scores(when, scores)
    # on every process, whoever measured: others may see the file before they come here
    trainer.accelerator.wait_for_everyone()
    return scores or []


@contextmanager
def _probe_progress(console: Console, when: str) -> Iterator:
    """A bar a probe in a terminal, one line a probe elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:28}"), BarColumn(28), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, int] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"probing {when}: {name}", total=total)
                if not console.is_terminal:
                    console.print(f"probing {when}: {name} ({total})", highlight=False)
            bars.update(tasks[name], completed=done)

        yield progress


def _save_result(trainer: EAFTTrainer, tokenizer, folder: RunFolder) -> None:
    """Adapter or weights, with everything stock loaders look for beside them."""
    trainer.save_model(str(folder.path))
    if trainer.accelerator.is_main_process:
        tokenizer.save_pretrained(folder.path)
        trainer.model.generation_config.save_pretrained(folder.path)
        # pickled trainer arguments: of no use to anyone who loads the result
        (folder.path / "training_args.bin").unlink(missing_ok=True)


def _finish(recipe: Recipe, folder: RunFolder, before, after, command: str, console: Console) -> None:
    from ..evaluate import comparison
    from ..report.card import write_model_card
    from ..trainer.merge import merge_adapter

    write_model_card(
        folder.path,
        recipe_yaml=(folder.path / "recipe.yaml").read_text(encoding="utf-8"),
        base_model=recipe.model.reference,
        method=_method(recipe),
        before=before,
        after=after,
        versions=_versions(),
        hardware=training_device().name,
        command=command,
        is_adapter=recipe.lora is not None,
        datasets=[source.path for source in recipe.data.train],
    )
    if recipe.output.merge and recipe.lora:
        # what a start left that was killed after merging
        shutil.rmtree(folder.path / "merged", ignore_errors=True)
        report = merge_adapter(folder.path, folder.path / "merged")
        console.print(
            f"merged into {report.output_dir}: reloaded logits differ by at most {report.max_abs_difference:.1e}",
            highlight=False,
        )
    folder.finish()
    if after:
        console.print()
        console.print(comparison(before, after))


def _method(recipe: Recipe) -> str:
    from ..loss.gates import resolve_gate

    gate = resolve_gate(recipe.loss.gate, **recipe.loss.gate_kwargs())
    tuned = f"LoRA (r = {recipe.lora.r}, alpha = {recipe.lora.alpha:g})" if recipe.lora else "full fine-tune"
    # what is not the exact gradient is part of the method
    tail = "; gradients of the head's input and weight from the vocabulary columns that matter (sparse tail)"
    return f"{tuned}, each token's cross-entropy weighted by the gate {gate.formula}" + (
        tail if recipe.loss.tail == "sparse" else ""
    )


def _push(recipe: Recipe, folder: RunFolder) -> None:
    """Uploads the result, without what only a resumed run or this machine needs."""
    from huggingface_hub import HfApi

    repository = recipe.output.push_to_hub
    left_out = ["checkpoints/*", "merged/*", "run.json"]
    try:
        api = HfApi()
        name = api.create_repo(repository, private=recipe.output.private, exist_ok=True).repo_id
        api.upload_folder(repo_id=name, folder_path=folder.path, ignore_patterns=left_out)
    # an HTTP library's errors pass through the hub's client, and which library that is depends on its version
    except Exception as error:
        options = " ".join(f"--exclude '{pattern}'" for pattern in left_out)
        raise UserError(
            f"the run is complete in {folder.path}, but uploading it to {repository!r} failed: {error} Once the hub can "
            f"be reached and `hf auth login` was done: hf upload {repository} {folder.path} {options}"
        ) from error


def _print_plan(recipe: Recipe, data: RunData, console: Console) -> None:
    from ..models import load_config

    config = load_config(
        recipe.model.reference, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
    )
    try:
        plan = make_plan(recipe, config, data.stats, autocast=uses_bfloat16(recipe))
    except ValueError as error:
        if "Target modules" not in str(error):
            raise
        raise UserError(
            f"lora.target_modules: {error} Name modules of the model, or leave the key out for all-linear."
        ) from error
    console.print()
    if console.is_terminal:
        console.print(plan_table(plan))
    else:
        console.print(plan_text(plan), highlight=False, soft_wrap=True)
    console.print()


def _print_audit(data: RunData, console: Console) -> None:
    """What may go wrong with the data, and the rows that were left out."""
    report = data.report
    for warning in report.warnings:
        console.print(f"[yellow]warning[/] {warning}", highlight=False, soft_wrap=True)
    for origin, reason in report.skipped[:5]:
        console.print(f"skipped {origin}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if report.skipped_rows > 5:
        console.print(f"... and {report.skipped_rows - 5} more rows skipped", highlight=False)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in _PACKAGES}
