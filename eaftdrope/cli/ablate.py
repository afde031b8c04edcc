"""`eaftdrope ablate`: what each stage of a pipeline is worth."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

_UNSHOWN = {"show_default": False}


def ablate(
    recipe: Annotated[Path, typer.Argument(help="A recipe with stages.", **_UNSHOWN)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides, such as train.steps=10.", **_UNSHOWN)
    ] = None,
    leave_out: Annotated[
        str | None,
        typer.Option(help="Stages, separated by commas, each left out once.", show_default="every stage but pretrain"),
    ] = None,
    orders: Annotated[
        bool, typer.Option("--orders", help="Also eaft before drope, and ttt before eaft (any_order in a recipe).")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the pipelines and the stages that each trains; write nothing.")
    ] = False,
) -> None:
    """Run a pipeline again with stages left out, and show what each stage is worth.

    The whole pipeline is run first, unless it is finished. Each ablation shares the stages before the first difference,
    and is compared with the whole by the probes that both last stages have, with errors over the same units. The table is
    in the section system of output.dir/report.html, and in system.json. The same command resumes.
    """
    from eaftdrope.compare.ablations import plan_ablations, run_ablations
    from eaftdrope.recipe.load import load_recipe

    from .measure import parse_names
    from .terminal import echo, make_console, silence_libraries

    loaded = load_recipe(recipe, overrides or [])
    plan = plan_ablations(loaded, leave_out=None if leave_out is None else parse_names(leave_out), orders=orders)
    if dry_run:
        echo(f"the whole: {' → '.join(loaded.stages)}")
        for ablation in plan:
            trained = ", ".join(ablation.trained) or "nothing"
            echo(f"{ablation.name}: {' → '.join(ablation.stages)} (trains {trained})")
        return
    from eaftdrope.run.interrupts import RunInterrupted

    silence_libraries(bars=False)
    command = shlex.join(["eaftdrope", *sys.argv[1:]])
    try:
        run_ablations(loaded, plan, make_console(), command=command)
    except RunInterrupted as stop:
        echo(str(stop), err=True)
        raise SystemExit(stop.exit_code) from None
