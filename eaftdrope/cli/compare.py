"""`eaftdrope compare`: one recipe under several methods, and the gains and losses of each."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from eaftdrope.errors import UserError

_UNSHOWN = {"show_default": False}


def compare(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", **_UNSHOWN)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides for every arm, such as train.steps=10.", **_UNSHOWN)
    ] = None,
    arms: Annotated[
        str,
        typer.Option(
            "--arms",
            "--gates",
            help="Arms, terms joined with +: gates (eaft:alpha=2; constant: the mean gate of the eaft arm), lr/2, "
            "early-stop, replay, repairs of finished arms (none+denoise, none+restore=q_proj,k_proj, none+share=0.5).",
        ),
    ] = "none,eaft,eaft-vocab,dft,conflict-mask",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from the recipe's train.seed upwards.")] = 3,
    lr: Annotated[
        str | None, typer.Option(help="Learning rates, separated by commas.", show_default="the recipe's")
    ] = None,
    match: Annotated[
        str | None, typer.Option(help="target: also compare retention at equal target gain.", **_UNSHOWN)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder.", show_default="runs/compare/<recipe>")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the data, print the arms, load no weights, write nothing.")
    ] = False,
) -> None:
    """Train a recipe under several methods on the same data, order and budget, and show what each gains and forgets.

    The arms are trained one after the other into DIR/arms, each is then measured with the recipe's probes, and a stated
    rule decides which differences are beyond the spread over seeds. Run the same command again to resume an interrupted
    comparison; with more arms or seeds it trains only those.
    """
    if match not in (None, "target"):
        raise UserError(f"--match {match}: only `target` can be matched.")
    from eaftdrope.compare.plan import plan_comparison

    plan = plan_comparison(
        recipe, overrides or [], arms=arms, seeds=seeds, rates=lr, folder=output, match=match is not None
    )

    from eaftdrope.compare.run import print_comparison_plan, run_comparison
    from eaftdrope.run.interrupts import RunInterrupted
    from eaftdrope.run.machine import training_device

    from .measure import about, bars
    from .terminal import echo, make_console, silence_libraries

    console = make_console()
    silence_libraries(bars=False)
    if dry_run:
        print_comparison_plan(plan, console)
        return
    command = shlex.join(["eaftdrope", *sys.argv[1:]])
    try:
        run_comparison(plan, console, command=command, about=about(training_device().kind), bars=lambda: bars(console))
    except RunInterrupted as stop:
        echo(str(stop), err=True)
        raise SystemExit(stop.exit_code) from None
