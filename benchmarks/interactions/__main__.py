"""`python -m benchmarks.interactions`: see the package's docstring."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.command import as_typed, run_typer

from .lab import Lab

HERE = Path(__file__).resolve().parent
LABS = tuple(sorted(path.stem for path in HERE.glob("u[1-8]*.py")))
Work = Annotated[Path, typer.Option(help="Folder of pieces and trained weights; resumed if it exists.")]
Quick = Annotated[bool, typer.Option("--quick", help="A test of the program: two seeds, a few steps.")]


def folder_of(work: Path, quick: bool) -> Path:
    """A test of the program leaves no weights that a real run would mistake for its own."""
    return work / "quick" if quick else work


def open_lab(name: str, quick: bool) -> Lab:
    return importlib.import_module(f"benchmarks.interactions.{name}").lab(quick)


def main(arguments: list[str]) -> None:
    match arguments:
        case [name, "run" | "report" as verb, *options] if name in LABS:
            run_typer(_run(name) if verb == "run" else _report(name), options)
        case _:
            sys.exit(f"usage: python -m benchmarks.interactions {{{','.join(LABS)}}} {{run,report}} [--help]")


def _run(name: str):
    def run(
        work: Work = HERE / "pieces",
        minutes: Annotated[float, typer.Option(min=0.0, help="Stop after about this time; repeat to resume.")] = 8.0,
        quick: Quick = False,
    ) -> None:
        """Compute what is missing."""
        import torch

        from .run import run_lab

        # small products: more threads only wait for each other
        torch.set_num_threads(1)
        if run_lab(open_lab(name, quick), folder_of(work, quick), minutes, lambda line: print(line, flush=True)):
            typer.echo("nothing is missing")

    return run


def _report(name: str):
    def report(
        work: Work = HERE / "pieces",
        output: Annotated[Path, typer.Option(help="Folder for the results.")] = HERE / "results",
        quick: Quick = False,
    ) -> None:
        """Print the table; write the results and their figure."""
        from .drawing import draw
        from .results import document, write
        from .table import lines

        content = document(
            open_lab(name, quick), folder_of(work, quick), as_typed("benchmarks.interactions", sys.argv[1:])
        )
        output.mkdir(parents=True, exist_ok=True)
        typer.echo("\n".join(lines(content)))
        written = write(content, output / f"{name}.json"), draw(content, output / f"{name}.png")
        typer.echo(f"written  {written[0]}, {written[1]}")

    return report


if __name__ == "__main__":
    main(sys.argv[1:])
