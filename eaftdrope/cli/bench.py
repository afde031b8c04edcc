"""`eaftdrope bench`: what the loss costs beside its peers, how fast the quickstart trains beside TRL, DroPE in miniature."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from eaftdrope.bench.loss.cases import (
    DTYPES,
    ISAS,
    LOGITS,
    QUICK_ROWS,
    SHAPES,
    TRAINS,
    choose,
    make_cases,
    parse_shapes,
)
from eaftdrope.errors import UserError
from eaftdrope.recipe.suggest import did_you_mean

bench = typer.Typer(
    help="Measure the loss against its peers (`bench loss`), training speed against TRL (`bench training`), or how far a "
    "small model without its rotary embedding finds needles (`bench drope`).",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)
_UNSHOWN = {"show_default": False}


@bench.command()
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

    from eaftdrope.bench.loss.report import bench_loss
    from eaftdrope.bench.loss.runner import Settings, resolve_device

    measured_by = Settings(resolve_device(device), threads, repeat, seconds, isa, None if text is None else str(text))
    bench_loss(cases, methods, measured_by, output=output, command=_command(sys.argv[1:]))


def _or(value, default):
    """An option that was not given takes its default; one that was given empty is refused as such."""
    return default if value is None else value


@bench.command()
def training(
    steps: Annotated[int, typer.Option(min=1, help="Counted steps of each arm.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    float32: Annotated[bool, typer.Option("--float32", help="Instead of bfloat16.")] = False,
    model: Annotated[str, typer.Option()] = "package:smollm2-135m-instruct",
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.", **_UNSHOWN)] = None,
) -> None:
    """Tokens a second of the quickstart's training: EAFT, no gate, and TRL's own trainer, step by step in turn."""
    command = [sys.executable, "-m", "eaftdrope.bench.training"]
    command += ["--steps", str(steps), "--batch-size", str(batch_size), "--model", model]
    command += ["--float32"] * float32 + (["--out", str(out)] if out else [])
    raise SystemExit(subprocess.run(command).returncode)


@bench.command()
def drope(
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for pieces, miniature.json, .csv and .png; continued if there.", **_UNSHOWN),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    thetas: Annotated[
        str, typer.Option(help="Rope thetas of the trained models, separated by commas.")
    ] = "40,100,10000",
    steps: Annotated[int, typer.Option(min=50, help="Of each training; recalibration is a share of them.")] = 1000,
    workers: Annotated[int, typer.Option(min=1, help="Trainings at a time, a thread each.")] = 2,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Half a minute, to see that it runs: one seed, theta 40, 30 steps, no AdamW."),
    ] = False,
) -> None:
    """DroPE in miniature: pretrains small RoPE models on text with needles, drops the rotation, recalibrates, and asks
    for the needles at up to eight times the training length: beside position interpolation, NTK, YaRN, a crop, and NoPE
    from scratch, each with and without its fitted temperature. 45 minutes on two cores."""
    from eaftdrope.bench.miniature.arms import QUICK, Settings

    if quick:
        settings = QUICK
    else:
        settings = Settings(_thetas(thetas), seeds, steps, batch=32, sequences=64, fit=24, adamw_seeds=1, compiled=True)

    from eaftdrope.bench.miniature.report import bench_drope

    bench_drope(settings, output=output, workers=workers, command=_command(sys.argv[1:]))


def _thetas(text: str) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) <= 1:
        raise UserError(f"--thetas {text}: name numbers above 1, separated by commas, such as 40,10000.")
    return found


def _command(arguments: list[str]) -> str:
    """What was typed, for the results: without folders, which mean nothing on another machine."""
    return shlex.join(["eaftdrope", *(Path(argument).name if "/" in argument else argument for argument in arguments)])
