"""`eaftdrope bench`: what the gated loss costs on this machine beside full logits and Liger (`loss`), and what test-time
training costs beside a plain window and full attention (`ttt`).

The programs behind the committed figures, with every peer and a process for each method, are in the repository's
`benchmarks/` folder, which is not part of the installed package.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eaftdrope.errors import UserError

if TYPE_CHECKING:
    from eaftdrope.loss.cost import Measurement
    from eaftdrope.ttt.cost import CostShape, ReadingCost, StepCost

bench = typer.Typer(
    help="Measure what the loss (`bench loss`) and test-time training (`bench ttt`) cost on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)
_UNSHOWN = {"show_default": False}
_MOVED = "needs the repository: run `python -m benchmarks.{name}` in a clone of eaftdrope."


@bench.command()
def loss(
    shape: Annotated[str, typer.Option(help="Size of the LM head, as HIDDENxVOCABULARY.")] = "576x49152",
    rows: Annotated[int, typer.Option(min=2, help="Tokens of a batch.")] = 1024,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    gate: Annotated[str, typer.Option(help="Gate of the loss; none for plain cross-entropy.")] = "eaft",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; in each, every method runs once.")] = 5,
) -> None:
    """Time the loss with its gradients against the three bare matrix products that no method can avoid.

    Every method runs once in each round, so that a machine that slows down slows all of them. Reported are the median
    ratio to the products of the same round, the memory beyond the gradients (GPU only), and the largest relative error
    of the gradients against float64.
    """
    hidden, _, vocabulary = shape.partition("x")
    if not (hidden.isdigit() and vocabulary.isdigit() and int(hidden) and int(vocabulary) > 1):
        raise UserError(f"--shape {shape}: pass two sizes, such as 576x49152.")
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"--dtype {dtype}: pass bfloat16 or float32.")

    from eaftdrope.loss.cost import measure
    from eaftdrope.loss.gates import resolve_gate

    from .measure import choose_device

    try:
        resolve_gate(gate)
    except ValueError as error:
        raise UserError(f"--gate {gate}: {error}") from None
    from .terminal import make_console

    console = make_console()
    chosen = choose_device(device)
    with console.status("measuring"):
        measured = measure(int(hidden), int(vocabulary), rows, dtype, gate, chosen, repeat)
    console.print(_table(measured, f"{rows} tokens, head {shape}, {dtype}, {chosen}, median of {repeat}"))


@bench.command()
def ttt(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; in each, every arm runs once.")] = 7,
    quick: Annotated[
        bool, typer.Option("--quick", help="A smaller model and three positions, to see that it runs.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.", **_UNSHOWN)] = None,
) -> None:
    """Time training steps and reading with test-time training, beside a plain window and full attention.

    The model has Qwen 3's shape with random weights. Every arm runs once in each round, so that a machine that slows down
    slows all of them. On the CPU a second is one of CPU time, and memory is the peak above the start of the step. Full
    attention is measured after each number of tokens, and the position is printed from which TTT reads faster.
    """
    from eaftdrope.files import write_atomically
    from eaftdrope.ttt.cost import (
        POSITIONS,
        READING,
        TRAINING,
        crossover,
        reading_costs,
        training_costs,
    )

    from .measure import about, bars, choose_device
    from .terminal import make_console

    console, chosen = make_console(), choose_device(device)
    trained, read, positions = TRAINING, READING, POSITIONS
    if quick:
        small = {
            "blocks": 4,
            "hidden": 128,
            "width": 256,
            "vocabulary": 1024,
            "window": 128,
            "chunk": 64,
            "fast_blocks": 1,
        }
        trained, read, positions = replace(trained, tokens=512, **small), replace(read, **small), (256, 1024, 4096)
    with bars(console) as start:
        steps = training_costs(trained, chosen, repeat, start("training"))
        costs = reading_costs(read, positions, chosen, repeat, start("reading"))
    document = {
        "about": about(chosen) | {"threads": _threads(), "repeat": repeat},
        "training": {"shape": vars(trained), "rows": [vars(row) for row in steps]},
        "reading": {"shape": vars(read), "rows": [vars(row) for row in costs], "crossover": crossover(costs)},
    }
    console.print(_step_table(steps, f"A training step, one row of {trained.tokens:,} tokens; {_described(trained)}"))
    console.print(_reading_table(costs, f"Reading; {_described(read)}"))
    found = document["reading"]["crossover"]
    where = "at none of these positions" if found is None else f"from about {found:,.0f} tokens on"
    console.print(f"With TTT a chunk is read faster than with full attention {where}.", highlight=False)
    if output is not None:
        write_atomically(output, json.dumps(document, indent=1) + "\n")
        console.print(f"written: {output}", highlight=False, markup=False, soft_wrap=True)


@bench.command(hidden=True)
def training() -> None:
    """Moved to the repository's benchmarks."""
    raise UserError("bench training " + _MOVED.format(name="training"))


@bench.command(hidden=True)
def drope() -> None:
    """Moved to the repository's benchmarks."""
    raise UserError("bench drope " + _MOVED.format(name="miniature"))


def _table(measured: list[Measurement], title: str):
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("method", "ms", "x products", "MB beyond gradients", "gradient error"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in measured:
        if row.unavailable:
            table.add_row(row.method, row.unavailable)
            continue
        memory = "-" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:,.0f}"
        error = "-" if row.gradient_error is None else f"{row.gradient_error:.1e}"
        table.add_row(row.method, f"{row.seconds * 1e3:,.1f}", f"{row.ratio:.2f}", memory, error)
    return table


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _described(shape: CostShape) -> str:
    return (
        f"Qwen 3, {shape.blocks} blocks, hidden size {shape.hidden}, MLP {shape.width}, vocabulary {shape.vocabulary:,}, "
        f"window {shape.window}, chunk {shape.chunk}, {shape.fast_blocks} fast blocks"
    )


def _step_table(steps: list[StepCost], title: str):
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("arm", "s", "x plain window", "MB above the start"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for row in steps:
        memory = "-" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:,.0f}"
        table.add_row(row.arm, f"{row.seconds:.3f}", f"{row.ratio:.2f}", memory)
    return table


def _reading_table(costs: list[ReadingCost], title: str):
    from rich.table import Table

    arms = list(costs[0].chunk_seconds)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    columns = ["tokens read", *(f"ms per chunk, {arm}" for arm in arms), "x window"]
    columns += [*(f"ms per token, {arm}" for arm in arms), "with a chunk learned"]
    for column in columns:
        table.add_column(column, justify="right")
    for row in costs:
        chunk, token = (
            [f"{values[arm] * 1e3:,.1f}" for arm in arms] for values in (row.chunk_seconds, row.token_seconds)
        )
        ratio, learning = f"{row.ratio:.2f}", f"{row.learning_seconds * 1e3:,.1f}"
        table.add_row(f"{row.position:,}", *chunk, ratio, *token, learning)
    return table
