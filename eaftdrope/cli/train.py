"""`eaftdrope train`: one recipe, from validation to the table of what was gained and forgotten."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from eaftdrope.recipe import load_recipe

from .launching import is_launcher, start_processes
from .terminal import echo, make_console, silence_libraries


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of its keys, such as train.steps=10.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the data, print the plan, load no weights, write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete output.dir with the run in it, and start over.")
    ] = False,
    launch: Annotated[
        int | None,
        typer.Option(
            "--launch",
            min=1,
            metavar="N",
            show_default=False,
            help="Start N processes of this command on this machine.",
        ),
    ] = None,
) -> None:
    """Run a recipe: probe the model, fine-tune it, probe it again, and show what was gained and what was forgotten.

    Run the same command again to resume an interrupted run. A finished run is not changed without --overwrite.
    On several devices: --launch N, or `accelerate launch -m eaftdrope train RECIPE`, or torchrun.
    """
    checked = load_recipe(recipe, overrides or [])
    if launch is not None and not dry_run and is_launcher(launch):
        flags = ["--overwrite"] if overwrite else []
        start_processes(launch, ["train", str(recipe), *(overrides or []), *flags, "--launch", str(launch)])
        return

    from eaftdrope.run.heartbeat import EXIT_CODE, LaunchEnded
    from eaftdrope.run.interrupts import RunInterrupted
    from eaftdrope.run.train import run_recipe, show_plan

    console = make_console(width=120)
    silence_libraries(bars=sys.stdout.isatty())
    if dry_run:
        show_plan(checked, console, overwrite=overwrite, processes=launch)
        return
    launched = [] if launch is None else ["--launch", str(launch)]
    command = shlex.join(["eaftdrope", "train", str(recipe), *(overrides or []), *launched])
    try:
        run_recipe(checked, console, command=command, overwrite=overwrite)
    except RunInterrupted as stop:
        if not console.quiet:
            echo(str(stop), err=True)
        raise SystemExit(stop.exit_code) from None
    except LaunchEnded as end:
        if str(end):
            echo(str(end), err=True)
        raise SystemExit(EXIT_CODE) from None
