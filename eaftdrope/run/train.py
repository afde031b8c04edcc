"""From a recipe to its result: every stage prepared first, then run one after the other."""

from __future__ import annotations

import gc
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from eaftdrope.files import write_atomically
from eaftdrope.processes import is_main_process, process_count, restart_count
from eaftdrope.recipe.dump import dump_serve
from eaftdrope.recipe.schema import Recipe
from eaftdrope.report import page

from .degrees import parallel_environment
from .interrupts import RunInterrupted, Terminated, disk_errors_to_user_errors, run_lock, terminated_by_signal
from .launch import Launch, check_common_folder, joined, refused_together, wait_for_everyone
from .machine import keep_freed_memory, training_device
from .record import SERVE_FILE
from .stages.chain import open_stages
from .stages.stage import Progress, Stage, StageResult


def show_plan(recipe: Recipe, console: Console, *, overwrite: bool = False, processes: int | None = None) -> None:
    """`--dry-run`: print the plan, with the data and the model's configuration read; no weights, nothing written.

    Args:
        processes: plan for so many, by default for those that were started.

    Raises:
        UserError: anything that would stop the run before its weights are read, including the state of the output folder.
    """
    with parallel_environment(recipe.parallel, planned=processes or process_count()):
        _prepare(open_stages(recipe, overwrite=overwrite), console)


def run_recipe(recipe: Recipe, console: Console, *, command: str, overwrite: bool = False) -> StageResult:
    """Run a recipe to its end, or resume the run that its folder holds; returns the result of the last stage.

    Args:
        console: where the main process prints; the other processes are silent.
        command: as the user typed it, for the model card.
        overwrite: delete a run that the folder holds and start over, once recipe, data and model have been checked.

    Raises:
        UserError: anything the user can correct: the folder, the data, the model, a full disk, a diverged training.
        RunInterrupted: Ctrl-C or SIGTERM.
        LaunchEnded: another process of the launch was lost, or ended early.
    """
    console.quiet = not is_main_process()
    if overwrite and restart_count():
        console.print("restarted by the launcher: --overwrite deletes nothing now", highlight=False)
        overwrite = False
    with ExitStack() as held:
        held.enter_context(parallel_environment(recipe.parallel))
        launch = held.enter_context(joined(recipe.parallel.timeout_minutes))
        with refused_together():
            if is_main_process():
                # a folder that is refused is refused before a lock is made in it
                open_stages(recipe, overwrite=overwrite)
                held.enter_context(run_lock(recipe.output.dir))
        check_common_folder(recipe.output.dir)
        return _run(recipe, console, launch, command=command, overwrite=overwrite)


def _run(recipe: Recipe, console: Console, launch: Launch | None, *, command: str, overwrite: bool) -> StageResult:
    started = time.monotonic()
    with refused_together():
        stages = open_stages(recipe, overwrite=overwrite)
    progress = Progress(stages[0])
    if launch is not None:
        launch.how_to_resume = lambda: progress.how_to_resume(overwrite=overwrite)
    try:
        with disk_errors_to_user_errors(recipe.output.dir), terminated_by_signal():
            _run_stages(stages, console, command, progress)
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        raise RunInterrupted(progress.interrupted(overwrite=overwrite), number) from None
    result = stages[-1].result()
    if recipe.serve and is_main_process():
        write_atomically(Path(recipe.output.dir).expanduser() / SERVE_FILE, dump_serve(recipe.serve))
    if recipe.stages and is_main_process():
        page.try_write_report(Path(recipe.output.dir).expanduser(), console)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.print(
        f"\ndone in {minutes}:{seconds:02d}; the result is in {result.folder}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return result


def _prepare(stages: list[Stage], console: Console) -> dict[str, Any]:
    """Prepare the stages that are still to be run, all of them before the first begins; the result is by their names."""
    prepared = {}
    for stage in stages:
        if stage.folder.trained:
            _print_trained(stage, console)
        elif stage.folder.finished:
            console.print(
                f"\n{stage.heading}, finished in {stage.folder.path}", highlight=False, markup=False, soft_wrap=True
            )
        else:
            prepared[stage.name] = stage.prepare(console)
    return prepared


def _print_trained(stage: Stage, console: Console) -> None:
    name = f"{stage.heading}, " if stage.heading else ""
    missing = ", ".join(stage.folder.missing) or "its last entry in run.json"
    console.print(
        f"\n{name}trained in {stage.folder.path}; missing: {missing}", highlight=False, markup=False, soft_wrap=True
    )


def _run_stages(stages: list[Stage], console: Console, command: str, progress: Progress) -> None:
    if training_device().kind == "cpu":
        keep_freed_memory()
    # the processes must agree on which stages to complete and which to run, so this is settled before anything changes
    with refused_together():
        prepared = _prepare(stages, console)
    trained = {stage.name for stage in stages if stage.folder.trained}
    if trained:
        # only the main process completes them; a late one would find them finished
        wait_for_everyone()
    for stage in stages:
        progress.stage = stage
        if stage.name in trained:
            progress.changed = True
            with progress.at("after training"):
                stage.complete(console)
        elif stage.name in prepared:
            # rows and probes of a stage are not needed once it is finished
            stage.run(prepared.pop(stage.name), console, command=command, progress=progress)
            gc.collect()
