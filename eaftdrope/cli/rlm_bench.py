"""`eaftdrope rlm bench`: a model as an RLM beside its baselines."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .measure import DeviceName, Dtype, Overwrite
from .rlm_options import Endpoint, Model, ShortPrompt, SubModel, Window, served_problems

if TYPE_CHECKING:
    from eaftdrope.evaluate.rlm.plan import BenchOptions

_UNSHOWN = {"show_default": False}


def bench(
    model: Model,
    sub_model: SubModel = None,
    endpoint: Endpoint = None,
    window: Window = None,
    classifier_errors: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Use a scripted sub-model with this error rate (aggregate, pairs).", **_UNSHOWN
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="needle,count,aggregate,pairs,multi-hop,code", show_default="all but count")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Lengths of the contexts in characters.")] = "8k,64k,1m",
    arms: Annotated[
        str | None, typer.Option(help="rlm,plain,map-reduce,summary,bm25,guess,oracle", show_default="all")
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Trials of a cell; at most 10 of map-reduce and summary, 3 from 500k on.")
    ] = 50,
    iterations: Annotated[int, typer.Option(min=1, help="Limit of replies of a root.")] = 8,
    root_tokens: Annotated[int, typer.Option(min=1, help="Limit of tokens of a reply of a root.")] = 256,
    names: Annotated[str, typer.Option(help="The set of names in the tasks: train or test.")] = "test",
    phrasings: Annotated[str, typer.Option(help="The set of phrasings of the queries: train or test.")] = "train",
    short_prompt: ShortPrompt = False,
    device: DeviceName = "auto",
    dtype: Dtype = None,
    output: Annotated[Path | None, typer.Option(help="Folder.", show_default="runs/rlm-bench/<model>")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells; load no weights.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure a model as an RLM beside a plain call, map-reduce, a rolling summary, BM25, a guess and an oracle.

    Prints scores with intervals, how far the root came, what trials cost, and the length from which on the RLM is better.
    The same command resumes an interrupted measurement.
    """
    from eaftdrope.evaluate.rlm.plan import DEFAULT_TASKS, BenchOptions
    from eaftdrope.evaluate.rlm.trials import ARMS
    from eaftdrope.models import short_name
    from eaftdrope.rlm import Limits

    from .measure import device_and_dtype, parse_names

    chosen, precision, problems = device_and_dtype(device, dtype)
    problems += served_problems(endpoint, window, device, dtype)
    options = BenchOptions(
        model=model,
        sub_model=sub_model,
        endpoint=endpoint,
        window=window,
        classifier_errors=classifier_errors,
        tasks=DEFAULT_TASKS if tasks is None else parse_names(tasks),
        lengths=lengths,
        arms=ARMS if arms is None else parse_names(arms),
        trials=trials,
        names=names,
        phrasings=phrasings,
        device=chosen,
        dtype=precision,
        short_prompt=short_prompt,
        # trials in lockstep share the time of the clock, so it does not limit them
        limits=Limits(iterations=iterations, root_tokens=root_tokens, seconds=10.0**7),
    )
    folder = output or Path("runs") / "rlm-bench" / short_name(model)
    _bench(options, problems, folder, dry_run=dry_run, overwrite=overwrite)


def _bench(options: BenchOptions, problems: list[str], folder: Path, *, dry_run: bool, overwrite: bool) -> None:
    from eaftdrope.evaluate.rlm.plan import make_plan
    from eaftdrope.evaluate.rlm.results import BenchResults
    from eaftdrope.evaluate.rlm.run import run_plan
    from eaftdrope.evaluate.rlm.table import cells_of, crossover_sentences, tables_of
    from eaftdrope.evaluate.table import as_table

    from .measure import about, bars
    from .terminal import make_console, show_report, silence_libraries

    silence_libraries(bars=False)
    console = make_console(width=180)
    plan = make_plan(options, problems)
    results = BenchResults(folder, plan, overwrite=overwrite)
    if dry_run:
        for cell in plan.cells:
            console.print(f"{cell.task}, {cell.chars:,} characters, {cell.arm}: {cell.trials} trials", highlight=False)
        trials = sum(cell.trials for cell in plan.cells)
        console.print(f"{len(plan.cells)} cells, {trials:,} trials. Nothing was measured.", highlight=False)
        return
    results.begin(about(options.device), shlex.join(["eaftdrope", *sys.argv[1:]]))
    with bars(console) as start:
        run_plan(plan, results, started=lambda cell: start(f"{cell.task}, {cell.chars:,} characters: {cell.arm}"))
    assert results.document is not None
    for table in tables_of(results.document):
        console.print(as_table(table))
    if text := crossover_sentences(cells_of(results.document)):
        console.print(text, highlight=False, markup=False)
    console.print(f"written: {folder}", highlight=False, markup=False, soft_wrap=True)
    show_report(folder, console)
