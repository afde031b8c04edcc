"""`eaftdrope context`: how far the context of a model reaches, beside the usual ways to stretch it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .measure import BatchTokens, DeviceName, Dtype, Overwrite, Text, TrainedLength, Windows

if TYPE_CHECKING:
    from eaftdrope.evaluate.long_context.plan import ContextOptions

_UNSHOWN = {"show_default": False}
_Lengths = Annotated[str, typer.Option(help="Tokens (2048,4096), or multiples of the trained length (1x,2x).")]
_Baselines = Annotated[
    str | None,
    typer.Option(
        help="From rope,pi,ntk,yarn,crop: each model again with that rotary embedding; crop sees only the last tokens.",
        **_UNSHOWN,
    ),
]
_Probes = Annotated[
    str | None,
    typer.Option(help="From perplexity,niah,multi-query,multi-key,multi-value,passkey,attention.", show_default="all"),
]


def context(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Folders, hub ids, package:NAME.", **_UNSHOWN)],
    lengths: _Lengths = "1x,2x,4x",
    baselines: _Baselines = None,
    probes: _Probes = None,
    suite: Annotated[str | None, typer.Option(help="ruler,longbench (run by lm-eval).", **_UNSHOWN)] = None,
    text: Text = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Trials of each needle probe at each length (the paper: 500).")
    ] = 100,
    depths: Annotated[int, typer.Option(min=1, help="Depths that the trials of niah are spread over.")] = 10,
    windows: Windows = 8,
    attention_trials: Annotated[int, typer.Option(min=1, help="Trials for the attention on the needle.")] = 4,
    trained_length: TrainedLength = None,
    device: DeviceName = "auto",
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 16384,
    seed: Annotated[int, typer.Option(help="Seed of keys, numbers and positions.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder.", show_default="runs/context/<first model>")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and what they cost; load no weights.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure loss by length, needles by depth and length, and attention on the needle, for each model and baseline.

    Writes probe.json, probe.csv and report.html. Run the same command again to resume an interrupted measurement. For the
    baselines of a recalibrated model pass the original one too: its weights are those that its rotary embedding was
    trained with.
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
    _context(options, problems, output, dry_run=dry_run, overwrite=overwrite)


def _context(
    options: ContextOptions, problems: list[str], output: Path | None, *, dry_run: bool, overwrite: bool
) -> None:

    from eaftdrope.evaluate.long_context.plan import make_plan
    from eaftdrope.evaluate.long_context.results import ContextResults
    from eaftdrope.evaluate.long_context.table import cost_table, csv_of, result_table, rows_of, suite_table
    from eaftdrope.models import short_name

    from .measure import run_with_progress
    from .terminal import make_console, show_report, silence_libraries

    silence_libraries(bars=False)
    console = make_console()
    plan = make_plan(options, problems)
    folder = output or Path("runs") / "context" / short_name(options.models[0])
    results = ContextResults(folder, plan, overwrite=overwrite)
    if dry_run:
        console.print(cost_table(plan))
    else:
        run_with_progress(plan, results, console)
        rows = rows_of(results.document)
        results.write("probe.csv", csv_of(rows))
        for table in filter(None, (result_table(rows), suite_table(rows))):
            console.print(table)
        console.print(f"written: {folder}: probe.json, probe.csv", highlight=False, markup=False, soft_wrap=True)
        show_report(folder, console)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
