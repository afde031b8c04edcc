"""`eaftdrope drope`: the commands of DroPE. `convert` drops the rotary embedding of a checkpoint, `undo` restores it, `check`
verifies a converted checkpoint, and `temperature` fits the factor on its attention scores."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eaftdrope.evaluate.long_context.lengths import slope_text

from .convert import Copy, Target, convert, engines_table, undo_conversion
from .measure import BatchTokens, DeviceName, Dtype, Overwrite, Text, TrainedLength, Windows

if TYPE_CHECKING:
    from rich.table import Table

drope = typer.Typer(
    help="DroPE: drop the rotary embedding of a checkpoint, restore it, check it, or fit its softmax temperature.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)
_FILE, _FIGURE = "temperature.json", "temperature.png"

drope.command("convert")(convert)


@drope.command()
def undo(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A converted folder.", show_default=False)],
    target: Target,
    copy: Copy = False,
) -> None:
    """Restore in the new folder DST the checkpoint that SRC was converted from, to the last bit."""
    undo_conversion(str(source), target, copy=copy)


@drope.command()
def temperature(
    model: Annotated[str, typer.Argument(help="Folder, hub id or package:NAME.", show_default=False)],
    length: Annotated[
        str, typer.Option(help="The length to serve: tokens (8192), or a multiple of the trained length.")
    ] = "2x",
    lengths: Annotated[
        str | None, typer.Option(help="More lengths for the fit of the slope, such as 2x,4x,8x.", show_default=False)
    ] = None,
    text: Text = None,
    windows: Windows = 8,
    trained_length: TrainedLength = None,
    device: DeviceName = "auto",
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 16384,
    output: Annotated[Path | None, typer.Option(help="Folder.", show_default="runs/temperature/<model>")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Find the factor beta on the attention scores with the lowest perplexity on held-out text of each length, and the slope
    c of beta = 1 + c ln(length / trained length); print the command that folds beta into the weights.

    No constants are assumed. For reference, the DroPE paper fitted c = 0.103 on SmolLM-360M (recalibrated) and 0.412
    on a model of 494M trained for it. Each length takes about 16 passes over its windows.
    """

    from eaftdrope.evaluate.long_context.temperature import as_document, fit_all, plan_temperature
    from eaftdrope.files import write_atomically
    from eaftdrope.report.figures.context import draw_temperature

    from .measure import about, bars, device_and_dtype
    from .terminal import make_console, silence_libraries

    silence_libraries(bars=False)
    console = make_console(width=120)
    chosen, precision, problems = device_and_dtype(device, dtype)
    folder = output or Path("runs") / "temperature" / Path(model.removeprefix("package:")).name
    if (folder / _FILE).exists() and not overwrite:
        problems.append(f"{folder} already holds a fit. Choose another folder with --output, or pass --overwrite.")
    plan = plan_temperature(model, length, lengths, text, windows, trained_length, problems)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    with bars(console) as start:
        fits = fit_all(plan, device=chosen, dtype=precision, batch_tokens=batch_tokens, started=start)
    document = {**as_document(plan, fits), "dtype": precision, "about": about(chosen)}
    folder.mkdir(parents=True, exist_ok=True)
    draw_temperature(document, folder / _FIGURE)
    write_atomically(folder / _FILE, json.dumps(document, indent=1) + "\n")
    console.print(_table(document))
    for line in _lines(document):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"written: {folder}: {_FILE}, {_FIGURE}", highlight=False, markup=False, soft_wrap=True)


@drope.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A converted checkpoint, trained since or not.", show_default=False)],
    weights: Annotated[
        bool, typer.Option("--weights", help="Check its own weights (loads them), not a slice.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Restore the keys of transformers 4 if they are lost.")
    ] = False,
) -> None:
    """Verify that FOLDER has no rotary embedding: measured on its class, and by its configuration for every engine.

    A converted checkpoint that any script has trained and saved with transformers 5 no longer has the keys that
    transformers 4 reads, which then silently rotates: --repair restores them.
    """

    from eaftdrope.drope import check_folder, complete
    from eaftdrope.drope.checkpoint import read_json
    from eaftdrope.drope.config import with_v4_keys
    from eaftdrope.drope.engines import serving

    from .terminal import make_console, silence_libraries

    silence_libraries(bars=False)
    console = make_console()
    checks = check_folder(folder, weights=weights)
    for result in checks:
        typer.echo(str(result))
    raw = read_json(folder / "config.json")
    lost = raw != with_v4_keys(raw)
    if lost and repair:
        complete(folder)
        typer.echo("repaired config.json: the rope keys of transformers 4 are restored")
    elif lost:
        typer.echo(
            "FAILED config.json no longer has the rope keys of transformers 4, which would silently rotate: --repair"
        )
    console.print(engines_table(serving(raw)))
    if (lost and not repair) or not all(result.passed for result in checks):
        raise SystemExit(1)


def _table(document: dict) -> Table:
    from rich.table import Table

    from eaftdrope.evaluate.table import error_text

    table = Table(title="Temperature", title_justify="left")
    for column in ("length", "windows", "beta", "perplexity at 1", "at beta", "change", ""):
        table.add_column(column, justify="right")
    for fit in document["fits"]:
        change = f"{fit['perplexity'] - fit['perplexity_at_1']:+.3f}"
        error = error_text(fit["stderr"], "mean")
        numbers = (f"{fit['beta']:.3f}", f"{fit['perplexity_at_1']:.3f}", f"{fit['perplexity']:.3f}")
        mark = "better than 1" if fit["distinguishable"] else "not distinguishable from 1"
        length = f"{fit['length']:,} ({fit['length'] / document['trained_length']:.3g}x)"
        table.add_row(length, str(fit["windows"]), *numbers, change + error, mark)
    return table


def _lines(document: dict) -> list[str]:
    """Lines about the slope, its reliability, and the command that folds in the target's beta."""
    clear = [fit for fit in document["fits"] if fit["distinguishable"]]
    stretch = f"length / {document['trained_length']:,}"
    lines = [f"beta = {slope_text(document['slope'], stretch)}"]
    if not clear:
        lines.append(
            "At no length is beta better than 1 by more than two standard errors: leave the temperature out, or "
            "measure more windows (--windows, a longer --text)."
        )
    for fit in document["fits"]:
        if fit["at_edge"]:
            lines.append(f"At {fit['length']:,} the best beta is at the edge of the search range; do not rely on it.")
        if fit["stderr"] is None:
            lines.append(f"At {fit['length']:,} there was only one window, so the uncertainty of beta is unknown.")
    target = next(fit for fit in document["fits"] if fit["length"] == document["target"])
    if target["distinguishable"] and not target["at_edge"]:
        source, beta = document["model"], target["beta"]
        name = f"{Path(source.removeprefix('package:')).name}-{target['length']}"
        command = ["eaftdrope", "convert", source, name, "--temperature", f"{beta:g}"]
        command += ["--max-length", str(max(target["length"], document["announced_length"]))]
        lines.append(f"To fold it in for {target['length']:,} tokens: {shlex.join(command)}")
    return lines
