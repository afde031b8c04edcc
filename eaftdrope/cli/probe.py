"""`eaftdrope probe`: how far the context of a model reaches, beside the usual ways to stretch it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .measure import BatchTokens, DeviceName, Dtype, Overwrite, Text, TrainedLength, Windows

if TYPE_CHECKING:
    from eaftdrope.evaluate.long_context.plan import ContextOptions

_UNSHOWN = {"show_default": False}
_Lengths = Annotated[str, typer.Option(help="Tokens (2048,4096), or multiples of the length it was trained on.")]
_Baselines = Annotated[
    str | None,
    typer.Option(
        help="Of rope,pi,ntk,yarn,crop: the same on each model with that rotary embedding; crop sees the last tokens only.",
        **_UNSHOWN,
    ),
]
_Probes = Annotated[
    str | None,
    typer.Option(help="Of perplexity,niah,multi-query,multi-key,multi-value,passkey,attention.", show_default="all"),
]


def probe(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Folders, hub ids, package:NAME.", **_UNSHOWN)],
    lengths: _Lengths = "1x,2x,4x",
    baselines: _Baselines = None,
    probes: _Probes = None,
    suite: Annotated[str | None, typer.Option(help="ruler,longbench: through lm-eval.", **_UNSHOWN)] = None,
    text: Text = None,
    trials: Annotated[int, typer.Option(min=1, help="Of each needle probe at each length (the paper: 500).")] = 100,
    depths: Annotated[int, typer.Option(min=1, help="Depths that the trials of niah are spread over.")] = 10,
    windows: Windows = 8,
    attention_trials: Annotated[int, typer.Option(min=1, help="For the attention on the needle.")] = 4,
    trained_length: TrainedLength = None,
    device: DeviceName = "auto",
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 16384,
    seed: Annotated[int, typer.Option(help="Of keys, numbers and places.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder.", show_default="runs/probe/<first model>")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and what they cost; load no weights.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure loss by length, needles by depth and length, and attention on the needle, for each model and baseline.

    Writes probe.json, probe.csv and report.html. The same command goes on with a probe that was interrupted. For the
    baselines of a recalibrated model name the original one too: its weights are those that its rotary embedding was trained
    with.
    """
    from eaftdrope.evaluate.long_context.plan import PROBES, ContextOptions

    from .measure import device_and_dtype, parse_names

    device, dtype, problems = device_and_dtype(device, dtype)
    options = ContextOptions(
        models=tuple(models),
        lengths=lengths,
        probes=PROBES if probes is None else parse_names(probes),
        baselines=parse_names(baselines or ""),
        suites=parse_names(suite or ""),
        text=text,
        trials=trials,
        depths=depths,
        windows=windows,
        attention_trials=attention_trials,
        trained_length=trained_length,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        seed=seed,
    )
    _probe(options, problems, output, dry_run=dry_run, overwrite=overwrite)


def _probe(
    options: ContextOptions, problems: list[str], output: Path | None, *, dry_run: bool, overwrite: bool
) -> None:
    from rich.console import Console

    from eaftdrope.evaluate.long_context.plan import make_plan
    from eaftdrope.evaluate.long_context.results import ContextResults
    from eaftdrope.evaluate.long_context.table import cost_table, csv_of, result_table, rows_of, suite_table
    from eaftdrope.models import short_name
    from eaftdrope.report.page import report_or_say

    from .measure import run_with_progress
    from .quiet import quieten

    quieten(bars=False)
    # a log is not a terminal 80 columns wide
    console = Console() if sys.stdout.isatty() else Console(width=140)
    plan = make_plan(options, problems)
    folder = output or Path("runs") / "probe" / short_name(options.models[0])
    results = ContextResults(folder, plan, overwrite=overwrite)
    if dry_run:
        console.print(cost_table(plan))
    else:
        run_with_progress(plan, results, console)
        rows = rows_of(results.document)
        results.write("probe.csv", csv_of(rows))
        for table in filter(None, (result_table(rows), suite_table(rows))):
            console.print(table)
        console.print(f"written: {folder}: probe.json, probe.csv", highlight=False, markup=False)
        report_or_say(folder, console)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
