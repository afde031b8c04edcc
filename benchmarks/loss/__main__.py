"""`python -m benchmarks.loss`: the gated loss and its peers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.command import as_typed, run_typer
from eaftdrope.errors import UserError
from eaftdrope.recipe.suggest import did_you_mean

from .cases import DTYPES, ISAS, LOGITS, QUICK_ROWS, SHAPES, TRAINS, choose, make_cases, parse_shapes
from .report import bench_loss
from .runner import MeasurementSettings, resolve_device

_UNSHOWN = {"show_default": False}


def loss(
    shape: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(SHAPES)} (all by default), or sizes as HIDDENxVOCABULARY.", **_UNSHOWN),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Tokens; by default 2048 (Gemma: 1024).", **_UNSHOWN)] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)} (both by default).", **_UNSHOWN)] = None,
    methods: Annotated[str | None, typer.Option(help="Names from the table; by default all.", **_UNSHOWN)] = None,
    logits: Annotated[
        str | None, typer.Option(help="random, real (both by default; real: smollm2 only).", **_UNSHOWN)
    ] = None,
    trains: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(TRAINS)}; by default `all`, and every one for the first shape.", **_UNSHOWN),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; with more than one, wall time is compared.")] = 1,
    isa: Annotated[
        str | None,
        typer.Option(
            help="Instructions oneDNN may use (ONEDNN_MAX_CPU_ISA): AVX512_CORE_BF16 excludes AMX.", **_UNSHOWN
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Number of measurements of method and floor.")] = 5,
    seconds: Annotated[
        float, typer.Option(min=0, help="Time limit per method and case; at least one measurement is made.")
    ] = 60.0,
    text: Annotated[
        Path | None, typer.Option(help="File of text for real logits; by default package:bfcl.", **_UNSHOWN)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for loss.csv, loss.json and figures.", **_UNSHOWN)] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help=f"Defaults of smollm2, {QUICK_ROWS} rows, bfloat16, random, all."),
    ] = False,
) -> None:
    """Measure time, peak memory and gradient error of the gated loss and its peers, relative to the bare matrix products
    that every method needs. Each method runs in its own process; one that cannot run is listed with the reason."""
    if quick:
        shape, rows, dtype = _or(shape, "smollm2"), _or(rows, QUICK_ROWS), _or(dtype, "bfloat16")
        logits, trains = _or(logits, "random"), _or(trains, "all")
    cases = make_cases(
        parse_shapes(_or(shape, ",".join(SHAPES))),
        choose(_or(dtype, ",".join(DTYPES)), DTYPES, "--dtype"),
        choose(_or(logits, ",".join(LOGITS)), list(LOGITS), "--logits"),
        None if trains is None else choose(trains, list(TRAINS), "--trains"),
        rows,
    )
    if isa is not None and isa not in ISAS:
        raise UserError(f"--isa {isa}: unknown.{did_you_mean(isa, ISAS)} Known: {', '.join(ISAS)}.")
    if text is not None and not text.is_file():
        raise UserError(f"--text {text}: no such file.")

    measured_by = MeasurementSettings(
        resolve_device(device), threads, repeat, seconds, isa, None if text is None else str(text)
    )
    bench_loss(cases, methods, measured_by, output=output, command=as_typed("benchmarks.loss", sys.argv[1:]))


def _or(value, default):
    """Return the default for an option that was not passed; an empty value is kept, and refused later."""
    return default if value is None else value


if __name__ == "__main__":
    run_typer(loss)
