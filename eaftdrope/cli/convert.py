"""`eaftdrope convert`: drop the rotary embedding of a checkpoint, by configuration only; `--undo` restores it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eaftdrope.errors import UserError

from .terminal import echo

if TYPE_CHECKING:
    from rich.table import Table

    from eaftdrope.drope.conversion import Conversion
    from eaftdrope.drope.engines import Serving

_UNSHOWN = {"show_default": False}
_STYLES = {"right": "green", "wrong": "bold red", "refused": "yellow", "unknown": "yellow"}
_WORDS = {"right": "correct", "wrong": "SILENTLY WRONG", "refused": "refuses to load", "unknown": "not known"}


Source = Annotated[
    str, typer.Argument(metavar="SRC", help="Folder, hub id or package:NAME; with --undo, the converted folder.")
]
Target = Annotated[Path, typer.Argument(metavar="DST", help="New folder.")]
MaxLength = Annotated[
    int | None, typer.Option(min=2, help="Context to announce, in tokens; by default the source's.", **_UNSHOWN)
]
LayersText = Annotated[
    str, typer.Option(help="all; or 0,2,4-7, a share such as 0.5, full_attention, where the architecture allows it.")
]
Temperature = Annotated[
    float | None, typer.Option(help="Factor on the attention scores, folded into the query weights.", **_UNSHOWN)
]
TargetLength = Annotated[
    int | None,
    typer.Option(
        min=2, help="Fold in the temperature for this length, 1 + slope ln(length / trained length).", **_UNSHOWN
    ),
]
Slope = Annotated[
    float | None,
    typer.Option(help="For --target-length or --by-position; `eaftdrope drope temperature` measures it.", **_UNSHOWN),
]
ByPosition = Annotated[
    bool,
    typer.Option(
        "--by-position", help="Save a Llama-shaped model as Ministral-3, whose temperature grows with the position."
    ),
]
QkNorm = Annotated[
    bool, typer.Option("--qk-norm", help="Save a Llama-shaped model as Qwen 3, with query and key norms.")
]
Engine = Annotated[str, typer.Option("--for", help="any, or gguf: the form that llama.cpp's converter reads.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", **_UNSHOWN)]
Copy = Annotated[bool, typer.Option("--copy", help="Copy the weights instead of hard-linking them.")]
CheckWeights = Annotated[
    bool, typer.Option("--check-weights", help="Check on the weights themselves (loads them), not on a small slice.")
]
Undo = Annotated[bool, typer.Option("--undo", help="Restore in DST what SRC was converted from.")]


def convert(
    source: Source,
    target: Target,
    max_length: MaxLength = None,
    layers: LayersText = "all",
    temperature: Temperature = None,
    target_length: TargetLength = None,
    slope: Slope = None,
    by_position: ByPosition = False,
    qk_norm: QkNorm = False,
    engine: Engine = "any",
    revision: Revision = None,
    copy: Copy = False,
    check_weights: CheckWeights = False,
    undo: Undo = False,
) -> None:
    """Drop the rotary embedding of SRC into the new folder DST: an ordinary checkpoint that stock libraries load.

    No weights are loaded: it takes seconds for a model of any size. Recalibrate the result (a recipe with
    `stages: [drope, recalibrate]` does both) before it is used.
    """
    if undo:
        changed = (max_length, temperature, target_length, slope, by_position, qk_norm, check_weights)
        if any(option not in (None, False) for option in changed) or (engine, layers) != ("any", "all"):
            raise UserError("--undo restores the source as it was and has no other option than --copy.")
        undo_conversion(source, target, copy=copy)
        return
    _check_temperatures(temperature, target_length, slope, by_position)
    from eaftdrope.drope import convert as convert_checkpoint
    from eaftdrope.drope import resolve_checkpoint

    folder = resolve_checkpoint(source, revision=revision)
    if target_length is not None:
        temperature = _temperature(folder, target_length, slope)
    started = time.monotonic()
    result = convert_checkpoint(
        folder,
        target,
        max_length=max_length,
        layers=layers,
        temperature=temperature,
        slope_by_position=slope if by_position else None,
        qk_norm=qk_norm,
        engine=engine,
        copy=copy,
        check_weights=check_weights,
    )
    _show(result, source, time.monotonic() - started)


def undo_conversion(source: str, target: Path, *, copy: bool) -> None:
    """Restore the source of a conversion, for `convert --undo` and `drope undo`."""
    from eaftdrope.drope import undo

    restored = undo(source, target, copy=copy)
    echo(f"restored   {restored}: every file is as it was before the conversion of {source}")


def _check_temperatures(
    temperature: float | None, target_length: int | None, slope: float | None, by_position: bool
) -> None:
    if (target_length is not None or by_position) != (slope is not None):
        raise UserError(
            "--slope goes with --target-length or --by-position: the temperature is 1 + slope ln(length / trained length). "
            "`eaftdrope drope temperature` measures the slope of your model; the paper's recalibrated SmolLM-360M has 0.103."
        )
    if sum((target_length is not None, temperature is not None, by_position)) > 1:
        raise UserError("--temperature, --target-length and --by-position each set the temperature. Keep only one.")


def _temperature(folder: Path, length: int, slope: float) -> float:
    from eaftdrope.drope.config import trained_length
    from eaftdrope.drope.temperature import beta_for
    from eaftdrope.models import load_config

    config = load_config(str(folder))
    trained = trained_length(config)
    if length <= trained:
        raise UserError(
            f"--target-length {length} is within the trained length of {trained} tokens: its temperature is 1."
        )
    # a temperature that is already in the weights is not folded in twice
    return beta_for(length, trained, slope) / getattr(config, "drope", {}).get("temperature", 1.0)


def engines_table(rows: Iterable[Serving]) -> Table:
    """Table of the engines that serve a converted checkpoint correctly, from `Serving` rows."""
    from rich.table import Table

    table = Table(title="Engine support", title_justify="left", box=None, pad_edge=False)
    for column in ("engine", "version", "result", ""):
        table.add_column(column, no_wrap=column != "")
    for row in rows:
        table.add_row(row.engine, row.version, f"[{_STYLES[row.verdict]}]{_WORDS[row.verdict]}[/]", row.note)
    return table


def _show(result: Conversion, source: str, seconds: float) -> None:

    from .terminal import make_console

    console = make_console()

    def line(name: str, text: str) -> None:
        console.print(f"{name:10} {text}", highlight=False, markup=False, soft_wrap=True)

    line("converted", f"{source} ({result.architecture}) into {result.target} in {seconds:.1f} s")
    line("layers", f"without rotary embedding: {result.layers}")
    line("length", f"trained on {result.trained_length:,} tokens, announces {result.max_length:,}")
    if result.temperature != 1.0:
        line("scores", f"times {result.temperature:g}, folded into the query weights")
    weights = "the source's own files (linked): do not save into this folder, or convert with --copy"
    line("weights", weights if result.linked else "copied")
    if result.left_out:
        line("left out", f"{', '.join(result.left_out)}: the same weights in other formats")
    for note in result.notes:
        line("note", note)
    for check in result.checks:
        line("checked", str(check))
    console.print()
    console.print(engines_table(result.engines))
    console.print()
    line("next", "recalibrate it: `eaftdrope recipes ls` lists the recipes under drope/")
