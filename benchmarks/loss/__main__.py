"""`python -m benchmarks.loss`: the loss beside every peer."""

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
from .runner import Settings, resolve_device

_UNSHOWN = {"show_default": False}


def loss(
    shape: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(SHAPES)} (all by default), or sizes as HIDDENxVOCABULARY.", **_UNSHOWN),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Tokens; by default 2048, Gemma 1024.", **_UNSHOWN)] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)} (both by default).", **_UNSHOWN)] = None,
    methods: Annotated[str | None, typer.Option(help="Names from the table; by default all.", **_UNSHOWN)] = None,
    logits: Annotated[
        str | None, typer.Option(help="random, real (both by default; smollm2 alone has real ones).", **_UNSHOWN)
    ] = None,
    trains: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(TRAINS)}; by default `all`, and the first shape in all ways.", **_UNSHOWN),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Of the processor; with more than one, wall time counts.")] = 1,
    isa: Annotated[
        str | None,
        typer.Option(
            help="Instructions oneDNN may use (ONEDNN_MAX_CPU_ISA): AVX512_CORE_BF16 leaves AMX out.", **_UNSHOWN
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Pairs of method and floor.")] = 5,
    seconds: Annotated[
        float, typer.Option(min=0, help="A method takes fewer pairs (but one) where they would go beyond this.")
    ] = 60.0,
    text: Annotated[
        Path | None, typer.Option(help="File of text for real logits; by default package:bfcl.", **_UNSHOWN)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for loss.csv, loss.json and figures.", **_UNSHOWN)] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help=f"Unless said otherwise: smollm2, {QUICK_ROWS} rows, bfloat16, random, all."),
    ] = False,
) -> None:
    """Time, peak memory and gradient error of the gated loss and of what else there is, against the bare matrix
    products that no method can do without. Each method runs in a process of its own; one that cannot run keeps its line
    in the table, with the reason."""
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
        raise UserError(f"--text {text}: there is no such file.")

    measured_by = Settings(resolve_device(device), threads, repeat, seconds, isa, None if text is None else str(text))
    bench_loss(cases, methods, measured_by, output=output, command=as_typed("benchmarks.loss", sys.argv[1:]))


def _or(value, default):
    """An option that was not given takes its default; one that was given empty is refused as such."""
    return default if value is None else value


if __name__ == "__main__":
    run_typer(loss)
