"""`eaftdrope bench loss`: what the gated loss costs on this machine, beside full logits and Liger.

The programs behind the committed figures, with every peer and a process for each method, are in the repository's
`benchmarks/` folder, which is not part of the installed package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from eaftdrope.errors import UserError

if TYPE_CHECKING:
    from eaftdrope.loss.cost import Measurement

bench = typer.Typer(
    help="Measure what the loss costs on this machine (`bench loss`).",
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
