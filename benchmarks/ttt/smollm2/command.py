"""`python -m benchmarks.ttt smollm2 run` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eaftdrope.errors import UserError

from .plan import PARTS

HERE = Path(__file__).resolve().parent.parent
Output = Annotated[Path, typer.Option(help="Folder for smollm2.json and smollm2.png; resumed if it has results.")]


def run(
    text: Annotated[Path, typer.Option(help="Training text: .jsonl rows with `text`, some hundred pages.")],
    test_text: Annotated[Path, typer.Option(help="Test text of another source.")],
    output: Output = HERE / "results",
    work: Annotated[Path, typer.Option(help="Folder for trained weights and interrupted trainings.")] = HERE
    / "trainings",
    minutes: Annotated[float, typer.Option(min=0.1, help="Stop after about this time; repeat to resume.")] = 9.5,
    parts: Annotated[str, typer.Option(help=f"Which parts to run: {', '.join(PARTS)}.")] = ",".join(PARTS[:3]),
) -> None:
    """Measure every arm on natural text. `short` and `long` train for 20 and 120 CPU minutes per run."""
    wanted = tuple(part.strip() for part in parts.split(","))
    if unknown := [part for part in wanted if part not in PARTS]:
        raise UserError(f"--parts {','.join(unknown)}: choose from {', '.join(PARTS)}.")
    from .run import Sizes
    from .run import run as run_tasks

    if run_tasks(text, test_text, output, work, minutes, wanted, Sizes()):
        typer.echo("nothing is missing")


def report(output: Output = HERE / "results") -> None:
    """Print the tables and draw the figure of what is measured so far."""
    from .document import Document
    from .figure import draw
    from .summary import tables

    document = Document(output / "smollm2.json")
    typer.echo(tables(document))
    typer.echo(f"written  {draw(document, output / 'smollm2.png')}")
