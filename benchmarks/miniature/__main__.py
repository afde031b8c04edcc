"""`python -m benchmarks.miniature`: DroPE in miniature."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.command import as_typed, run_typer
from eaftdrope.errors import UserError

from .arms import QUICK, MiniatureSettings
from .report import bench_drope

_UNSHOWN = {"show_default": False}


def miniature(
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for pieces, miniature.json, .csv and .png; resumed if it exists.", **_UNSHOWN),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    thetas: Annotated[
        str, typer.Option(help="Rope thetas of the trained models, separated by commas.")
    ] = "40,100,10000",
    steps: Annotated[
        int, typer.Option(min=50, help="Steps of each training; recalibration is a share of them.")
    ] = 1000,
    workers: Annotated[int, typer.Option(min=1, help="Parallel trainings, one thread each.")] = 2,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A test run of half a minute: one seed, theta 40, 30 steps, no AdamW."),
    ] = False,
) -> None:
    """Pretrain small RoPE models on text with needles, drop the rotation, recalibrate, and measure needle accuracy at up
    to eight times the training length, compared with position interpolation, NTK, YaRN, a crop, and NoPE from scratch,
    each with and without a fitted temperature. Takes 45 minutes on two cores."""
    if quick:
        settings = QUICK
    else:
        settings = MiniatureSettings(
            _thetas(thetas), seeds, steps, batch=32, sequences=64, fit=24, adamw_seeds=1, compiled=True
        )

    bench_drope(settings, output=output, workers=workers, command=as_typed("benchmarks.miniature", sys.argv[1:]))


def _thetas(text: str) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) <= 1:
        raise UserError(f"--thetas {text}: pass numbers above 1, separated by commas, such as 40,10000.")
    return found


if __name__ == "__main__":
    run_typer(miniature)
