"""`eaftdrope ask`: a question about files of any length, answered by what a run built."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eaftdrope.errors import UserError, printable, raise_problems

from .measure import DeviceName, Dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from eaftdrope.ask import Answered

_UNSHOWN = {"show_default": False}
_METHODS = ("auto", "plain", "ttt", "rlm")


def ask(
    run: Annotated[str, typer.Argument(help="A run's folder, or its recipe.", **_UNSHOWN)],
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE... QUESTION", help="Files, folders or globs; last the question.", **_UNSHOWN),
    ],
    method: Annotated[
        str, typer.Option(help="plain: one call; ttt: read and learn; rlm: code reads; auto: by the number of tokens.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print only the result, as JSON.")] = False,
    device: DeviceName = "auto",
    dtype: Dtype = None,
) -> None:
    """Answer QUESTION about files of any length with the models of a run.

    Which reader answers is decided by the number of tokens and the recipe's section serve; a plain call refuses a text that
    it cannot read whole. An RLM writes a journal and ttt the state of what it read into the run's folder ask/, both as
    private as the files: the same command resumes, or does not read the text again.
    """
    if method not in _METHODS:
        raise UserError(f"--method {method}: not one of {', '.join(_METHODS)}.")
    if len(files) < 2:
        raise UserError(
            "ask needs files and a question: eaftdrope ask runs/mine report.txt 'Which quarter was the best?'"
        )
    *patterns, question = files
    if not question.strip():
        raise UserError("the question, which comes last, is empty. Write one, in quotes.")
    from eaftdrope.ask import answer, find_run

    from .measure import device_and_dtype
    from .rlm_context import read_context
    from .terminal import make_console, silence_libraries

    silence_libraries(bars=False)
    device, dtype, problems = device_and_dtype(device, dtype)
    raise_problems(problems)
    built = find_run(run)
    context = read_context(patterns, None)
    console = make_console()
    with _shown(console, quiet=as_json) as show:
        found = answer(built, context, question, method=method, device=device, dtype=dtype, **show)
    _print(found, console, as_json=as_json)
    if not found.finished:
        raise SystemExit(1)


@contextmanager
def _shown(console: Console, *, quiet: bool) -> Iterator[dict[str, Any]]:
    """Yield the arguments of `answer` that print what happens; none if the result is for a program."""
    if quiet:
        yield {}
        return
    from .trajectory import TrajectoryView

    view = TrajectoryView(console)
    with console.status("counting tokens") as status:

        def chosen(method: str, tokens: int) -> None:
            console.print(f"text and question have {tokens:,} tokens: {method}", style="dim", highlight=False)
            status.update("loading")

        def watch(event: dict[str, Any]) -> None:
            view.show(event)
            status.update(view.left())

        yield {"watch": watch, "chosen": chosen}


def _print(found: Answered, console: Console, *, as_json: bool) -> None:
    if as_json:
        shown = ("method", "finished", "stopped", "text_tokens", "tokens")
        values = {name: getattr(found, name) for name in shown} | {"cpu_seconds": round(found.cpu_seconds, 2)}
        file = None if found.file is None else str(found.file)
        typer.echo(json.dumps({"answer": found.text, **values, "file": file}))
        return
    if found.finished:
        console.rule("answer", align="left")
        console.print(printable(found.text, lines=True), highlight=False, markup=False)
    else:
        console.print(f"no answer: {found.stopped}", style="bold red", highlight=False, markup=False)
    cost = f"{found.method}: {found.tokens:,} tokens read and written, {found.cpu_seconds:.1f} CPU seconds"
    for line in (cost, *found.notes, *([f"file: {found.file}"] if found.file else [])):
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
