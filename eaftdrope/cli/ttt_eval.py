"""`eaftdrope ttt eval`: what learning while reading adds, beside every control."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .measure import DeviceName, Dtype, Overwrite

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from eaftdrope.evaluate.ttt.options import TTTEvalOptions
    from eaftdrope.evaluate.ttt.plan import TTTEvalCell, TTTEvalPlan
    from eaftdrope.evaluate.ttt.results import TTTEvalResults

_UNSHOWN = {"show_default": False}
_Texts = Annotated[
    list[Path] | None,
    typer.Option(help="Text files, or JSONL with `text`; repeatable.", show_default="a short novel"),
]
_FitTexts = Annotated[
    list[Path] | None,
    typer.Option(help="Other text to fit the inner rate on; repeatable.", show_default="the end of the texts"),
]
_Control = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Trained on the same tokens without TTT.", **_UNSHOWN)
]
_Base = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="What MODEL was trained from.", show_default="MODEL without its TTT"),
]
_Arms = Annotated[
    str | None,
    typer.Option(help="From full,window,sink,naive,control,control-naive,ttt,off.", show_default="all possible"),
]
_Rates = Annotated[
    str | None,
    typer.Option(help="Inner rates that naive TTT chooses from; a single one is used.", show_default="0.03,0.1,0.3,1"),
]
_Probes = Annotated[str | None, typer.Option(help="From loss,needle,latency,retention.", show_default="all")]
_Positions = Annotated[
    str | None, typer.Option(help="Context positions of the latency.", show_default="512,2048,8192,32768")
]
_Quick = Annotated[bool, typer.Option("--quick", help="A first look: few passages, rates, needles and positions.")]


_Length = Annotated[int | None, typer.Option(min=2, help="Tokens of a passage.", show_default="4 windows")]
_Passages = Annotated[
    int | None, typer.Option(min=1, help="At most this many passages for the test.", show_default="16")
]
_FitPassages = Annotated[
    int | None, typer.Option(min=1, help="At most this many passages for the fit of the inner rate.", show_default="4")
]
_Window = Annotated[
    int | None, typer.Option(min=1, help="Tokens in view, of a model without TTT.", show_default="1024")
]
_Sink = Annotated[
    int | None, typer.Option(min=0, help="First tokens kept in view, of a model without TTT.", show_default="4")
]
_Chunk = Annotated[
    int | None, typer.Option(min=1, help="Tokens learned at once, of a model without TTT.", show_default="512")
]
_Trials = Annotated[int | None, typer.Option(min=1, help="Needles inside and outside the window.", show_default="50")]
_Read = Annotated[int | None, typer.Option(min=1, help="Tokens that the retention reads.", show_default="16384")]


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or package:NAME.", **_UNSHOWN)],
    text: _Texts = None,
    fit_text: _FitTexts = None,
    control: _Control = None,
    base: _Base = None,
    arms: _Arms = None,
    probes: _Probes = None,
    length: _Length = None,
    passages: _Passages = None,
    fit_passages: _FitPassages = None,
    lr: _Rates = None,
    window: _Window = None,
    sink: _Sink = None,
    chunk: _Chunk = None,
    trials: _Trials = None,
    read: _Read = None,
    positions: _Positions = None,
    device: DeviceName = "auto",
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="Seed of needles and their places.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder.", show_default="runs/ttt/<model>")] = None,
    quick: _Quick = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and what they cost; load no weights.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure TTT by position beside full attention, windows, a fine-tuned control, naive TTT and TTT off.

    Also a needle inside and outside the window, latency and memory by context position, and what reading costs the model.
    The inner rate of naive TTT is fitted on other text, never on the test text. Writes ttt.json and report.html. Run the
    same command again to resume an interrupted measurement.
    """
    from eaftdrope.evaluate.ttt.options import PROBES, QUICK, TTTEvalOptions

    from .measure import device_and_dtype, parse_names

    device, dtype, problems = device_and_dtype(device, dtype)
    chosen = {
        "length": length,
        "passages": passages,
        "fit_passages": fit_passages,
        "rates": _numbers("--lr", lr, float, problems),
        "trials": trials,
        "read": read,
        "positions": _numbers("--positions", positions, int, problems),
    }
    options = TTTEvalOptions(
        model=model,
        base=base,
        control=control,
        texts=tuple(text or ()),
        fit_texts=tuple(fit_text or ()),
        window=window,
        sink=sink,
        chunk=chunk,
        arms=parse_names(arms or ""),
        probes=PROBES if probes is None else parse_names(probes),
        device=device,
        dtype=dtype,
        seed=seed,
        **{**(QUICK if quick else {}), **{name: value for name, value in chosen.items() if value is not None}},
    )
    _evaluate(options, problems, output, dry_run=dry_run, overwrite=overwrite)


def _numbers(option: str, text: str | None, kind: type, problems: list[str]) -> tuple | None:
    """Parse `0.1,0.3`; None if the option was not passed."""
    from .measure import parse_names

    if text is None:
        return None
    try:
        return tuple(sorted({kind(part) for part in parse_names(text)}))
    except ValueError:
        problems.append(f"{option} {text}: not numbers with commas between them.")
        return None


def _evaluate(
    options: TTTEvalOptions, problems: list[str], output: Path | None, *, dry_run: bool, overwrite: bool
) -> None:
    from eaftdrope.evaluate.table import as_table
    from eaftdrope.evaluate.ttt.plan import make_plan
    from eaftdrope.evaluate.ttt.results import NAME, TTTEvalResults
    from eaftdrope.evaluate.ttt.table import LIMITS, cost_table, tables_of
    from eaftdrope.models import short_name

    from .terminal import make_console, show_report, silence_libraries

    silence_libraries(bars=False)
    console = make_console()
    plan = make_plan(options, problems)
    folder = output or Path("runs") / "ttt" / short_name(options.model)
    results = TTTEvalResults(folder, plan, overwrite=overwrite)
    if dry_run:
        console.print(cost_table(plan))
    else:
        _run(plan, results, console)
        for table in tables_of(results.document):
            console.print(as_table(table))
        console.print(LIMITS.format(chunk=plan.models.config.chunk), highlight=False, markup=False)
        console.print(f"written: {folder / NAME}", highlight=False, markup=False, soft_wrap=True)
        show_report(folder, console)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _run(plan: TTTEvalPlan, results: TTTEvalResults, console: Console) -> None:
    """Measure the remaining cells: a bar in a terminal, elsewhere one line per arm and probe."""
    from eaftdrope.evaluate.ttt.arms import ARMS
    from eaftdrope.evaluate.ttt.run import run_plan

    from .measure import about, bars

    results.begin(about(plan.options.device), shlex.join(["eaftdrope", *sys.argv[1:]]))
    left, total = len(results.left()), len(plan.cells)
    if 0 < left < total:
        console.print(f"resuming: {total - left} of {total} cells are already measured", highlight=False)
    with bars(console) as start:
        counted = iter(range(total - left, total))
        step, shown = None, ""

        def started(cell: TTTEvalCell) -> Callable[[int, int], None]:
            nonlocal step, shown
            title = f"{ARMS[cell.arm].title}: {cell.probe}" if cell.arm else cell.probe
            if step is None or title != shown:
                step, shown = start(title), title
            step(next(counted), total)
            return lambda done, count: None

        run_plan(plan, results, started=started)
