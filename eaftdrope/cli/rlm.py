"""`eaftdrope rlm`: recursive language models. `ask` answers a query about files of any length, `replay` shows a journal,
`rows` turns journals into training rows, and `bench` measures a model beside its baselines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eaftdrope.errors import UserError, printable, raise_problems
from eaftdrope.files import write_atomically

from .measure import DeviceName, Dtype, Overwrite
from .rlm_bench import bench
from .rlm_context import JOURNALS, read_context
from .rlm_options import Endpoint, Model, ShortPrompt, SubModel, Window, served_problems
from .terminal import echo

if TYPE_CHECKING:
    from rich.console import Console

    from eaftdrope.rlm import RLM, Limits, Result
    from eaftdrope.rlm import models as chat
    from eaftdrope.rlm.protocol import Context

rlm = typer.Typer(
    help="Recursive language models: ask about texts of any length, replay a run, train on runs, measure.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

_UNSHOWN = {"show_default": False}
_SubCalls = Annotated[int, typer.Option(min=0, help="Limit of calls of the sub-model.")]
_Tokens = Annotated[int, typer.Option(min=1, help="Limit of tokens, read and written, of all models.")]
_ROUTES = ("rlm", "plain", "auto")

rlm.command("bench")(bench)


@rlm.command()
def ask(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE... QUERY", help="Files, folders or globs; last the query.", **_UNSHOWN)
    ],
    model: Model,
    sub_model: SubModel = None,
    endpoint: Endpoint = None,
    window: Window = None,
    route: Annotated[
        str, typer.Option(help="rlm, plain (one call; the middle is cut out), or auto: plain for what it can hold.")
    ] = "rlm",
    sandbox: Annotated[str, typer.Option(help="Where code runs: monty, monty+bubblewrap or cpython.")] = "monty",
    sub_calls: _SubCalls = 200,
    tokens: _Tokens = 2_000_000,
    seconds: Annotated[float, typer.Option(min=0.1, help="Limit of time.")] = 600.0,
    depth: Annotated[int, typer.Option(min=1, help="Levels of REPLs; 1: sub-calls are plain calls.")] = 1,
    iterations: Annotated[int, typer.Option(min=1, help="Limit of replies of the root.")] = 20,
    short_prompt: ShortPrompt = False,
    journal: Annotated[
        Path | None, typer.Option(help="File to write, or to resume from.", show_default="runs/rlm/<digest>.jsonl")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the result, as JSON.")] = False,
    device: DeviceName = "auto",
    dtype: Dtype = None,
) -> None:
    """Answer QUERY about files of any length: the model writes Python that reads them, and asks a sub-model about parts.

    One file is a text; several, a folder or a glob are a list of documents. The same command resumes a killed run. It
    ends with the answer, the journal, and a page with every turn; both contain pieces of the files. The code runs in an
    interpreter without files, network or processes; for code that you do not trust, choose a sandbox of the operating
    system.
    """
    from eaftdrope.rlm import Limits
    from eaftdrope.rlm.engine import SANDBOXES
    from eaftdrope.rlm.protocol import SYSTEM, SYSTEM_SHORT

    if route not in _ROUTES:
        raise UserError(f"--route {route}: not one of {', '.join(_ROUTES)}.")
    if len(files) < 2:
        raise UserError("ask needs files and a query: eaftdrope rlm ask report.txt 'Which quarter was the best?'")
    if route == "plain" and journal is not None:
        raise UserError("--route plain is one call, which has no journal. Leave --journal out.")
    *patterns, query = files
    if not query.strip():
        raise UserError("the query, which comes last, is empty. Write a question, in quotes.")
    # before weights are loaded
    if sandbox not in SANDBOXES:
        raise UserError(f"--sandbox {sandbox}: not one of {', '.join(SANDBOXES)}.")
    raise_problems(served_problems(endpoint, window, device, dtype))
    SANDBOXES[sandbox].require()
    context = read_context(patterns, journal)
    limits = Limits(iterations=iterations, depth=depth, sub_calls=sub_calls, tokens=tokens, seconds=seconds)
    # a request that takes longer than the run may take is of no use
    served = {"endpoint": endpoint, "window": window, "timeout": seconds}
    models = _open(model, sub_model, served, device, dtype)
    system = SYSTEM_SHORT if short_prompt else SYSTEM
    _ask(context, query, models, limits, system, route=route, sandbox=sandbox, journal=journal, as_json=as_json)


def _open(
    model: str, sub_model: str | None, served: dict[str, Any], device: str, dtype: str | None
) -> tuple[chat.Model, chat.Model]:
    from eaftdrope.evaluate.rlm.chat_models import open_models

    from .measure import device_and_dtype
    from .terminal import silence_libraries

    silence_libraries(bars=False)
    device, dtype, problems = device_and_dtype(device, dtype)
    raise_problems(problems)
    return open_models(model, sub_model, **served, device=device, dtype=dtype)


def _ask(
    context: Context,
    query: str,
    models: tuple[chat.Model, chat.Model],
    limits: Limits,
    system: str,
    *,
    route: str,
    sandbox: str,
    journal: Path | None,
    as_json: bool,
) -> None:
    from eaftdrope.rlm import RLM
    from eaftdrope.rlm.baselines import answer_many
    from eaftdrope.rlm.baselines import route as choose

    from .terminal import make_console, show_report

    root = models[0]
    if route == "auto":
        route = choose(root, context, query, max_tokens=limits.root_tokens)
    console = make_console()
    if route == "plain":
        is_whole = choose(root, context, query, crossover=root.window, max_tokens=limits.root_tokens) == "plain"
        (answer,) = answer_many("plain", root, [(context, query)], max_tokens=limits.root_tokens)
        if as_json:
            usage = {"tokens": answer.tokens, "sub_calls": 0, "seconds": answer.seconds, "replayed": 0}
            found = {"answer": answer.text, "finished": True, "stopped": None, "turns": 1, "usage": usage}
            typer.echo(json.dumps({"route": "plain", **found, "journal": None}))
            return
        console.print(printable(answer.text, lines=True), highlight=False, markup=False)
        cut = "" if is_whole else "; the text does not fit, so its middle was cut out"
        console.print(f"one plain call, {answer.tokens:,} tokens{cut}", style="dim", highlight=False)
        return
    names = [[model.name, model.window] for model in models]
    digest = _digest(context, query, names, sandbox, asdict(limits), system)
    file = journal or JOURNALS / f"{digest}.jsonl"
    engine = RLM(*models, limits=limits, sandbox=sandbox, system=system)
    try:
        result = _run(engine, context, query, file, None if as_json else console)
    except KeyboardInterrupt:
        echo(f"The same command resumes from {file}.", err=True)
        raise
    _show(result, file, console, as_json=as_json)
    if not as_json:
        show_report(file, console)
    if not result.finished:
        raise SystemExit(1)


def _digest(*parts: Any) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _run(engine: RLM, context: Context, query: str, file: Path, console: Console | None) -> Result:
    if console is None:
        return engine.complete(context, query, journal=file)
    with _live(console, file) as watch:
        return engine.complete(context, query, journal=file, watch=watch)


@contextmanager
def _live(console: Console, file: Path) -> Iterator[Any]:
    """Yield a function that prints events above a line with what is left of the budget."""
    from eaftdrope.rlm.journal import read_journal

    from .trajectory import TrajectoryView

    view = TrajectoryView(console)
    with console.status("the root reads the query") as status:

        def watch(event: dict[str, Any]) -> None:
            view.show(event)
            status.update(view.left())

        if file.is_file():
            # replayed calls are not written again: show what the earlier start did
            events = read_journal(file)
            for event in events:
                watch(event)
            has_ended = bool(events) and events[-1]["event"] == "end"
            state = "ended before: no model is called" if has_ended else "resuming"
            console.print(state, style="dim")
        yield watch


def _show(result: Result, file: Path, console: Console, *, as_json: bool) -> None:
    if as_json:
        shown = {name: getattr(result, name) for name in ("answer", "finished", "stopped", "turns", "usage")}
        typer.echo(json.dumps({"route": "rlm", **shown, "journal": str(file)}))
        return
    if result.finished:
        console.rule("answer", align="left")
        console.print(printable(result.answer, lines=True), highlight=False, markup=False)
    else:
        # the limit was shown when it was reached
        console.print(_way_out(result.stopped or ""), style="bold red", highlight=False, markup=False)
    usage = result.usage
    console.print(
        f"{result.turns} turns, {usage['sub_calls']:,} sub-calls, {usage['tokens']:,} tokens, {usage['seconds']:.1f} s",
        style="dim",
        highlight=False,
    )
    console.print(f"journal: {file}", style="dim", highlight=False, markup=False, soft_wrap=True)


def _way_out(stopped: str) -> str:
    """What to do about a limit that ended a run, which has other limits than the run that follows."""
    name = stopped.partition(":")[0]
    if name in ("iterations", "sub_calls", "tokens", "seconds"):
        return f"no answer. A higher --{name.replace('_', '-')} starts another run."
    return f"no answer: {stopped}"


@rlm.command()
def replay(
    journal: Annotated[Path, typer.Argument(help="The journal of a run.", **_UNSHOWN)],
    every: Annotated[bool, typer.Option("--all", help="Do not wait for Enter between replies.")] = False,
    calls: Annotated[
        bool, typer.Option("--calls", help="Show every sub-call, not only the first three of each turn.")
    ] = False,
) -> None:
    """Step through a run: what the root wrote, what its code printed, which sub-calls it made. No model is called."""
    from eaftdrope.rlm.journal import read_journal

    from .terminal import make_console
    from .trajectory import TrajectoryView

    console = make_console()
    events = read_journal(journal)
    view = TrajectoryView(console, every_call=calls)
    waits = not every and console.is_terminal and sys.stdin.isatty()
    for event in events:
        is_reply = event["event"] == "call" and event["prompt"] is None
        if is_reply and view.turns and waits:
            try:
                console.input(f"[dim]{view.left()} · Enter: next reply, Ctrl-D: end[/dim]")
            except EOFError:
                console.print()
                return
        view.show(event)
    end = events[-1] if events and events[-1]["event"] == "end" else None
    if end is not None and end["finished"]:
        console.rule("answer", align="left")
        console.print(printable(end["answer"], lines=True), highlight=False, markup=False)
    elif end is None:
        console.print("the run has not ended: the command that began it resumes it", style="dim")
    console.print(view.used(), style="dim", highlight=False)


@rlm.command()
def rows(
    journals: Annotated[list[Path], typer.Argument(help="Journals, folders of them, or logs of rlms.", **_UNSHOWN)],
    output: Annotated[Path, typer.Option(help="The JSONL file to write.", **_UNSHOWN)],
    per: Annotated[str, typer.Option(help="A row per conversation, or per turn.")] = "conversation",
    min_turns: Annotated[int, typer.Option(min=1, help="Replies of a conversation, at least.")] = 2,
    max_chars: Annotated[int, typer.Option(min=1, help="Characters of a row, at most.")] = 100_000,
    scores: Annotated[
        Path | None, typer.Option(help="JSON of scores by file name (a bench writes it): 0 is left out.", **_UNSHOWN)
    ] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Keep runs without an answer.")] = False,
    no_repair: Annotated[bool, typer.Option("--no-repair", help="Keep wrong FINAL and FINAL_VAR markers.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Turn runs into chat rows for `data.format: messages`: what the root saw and replied, with the filters of the paper.

    A run that answers in its first reply is left out: keep it with --min-turns 1.
    """
    from eaftdrope.files import read_json
    from eaftdrope.rlm.rows import PER, RowFilters, training_rows

    if per not in PER:
        raise UserError(f"--per {per}: not one of {', '.join(PER)}.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists. Choose another file with --output, or pass --overwrite.")
    files = [file for path in journals for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"{' '.join(map(str, journals))}: no journals, which end in .jsonl. Pass others.")
    filters = RowFilters(unfinished=unfinished, min_turns=min_turns, max_chars=max_chars, repair=not no_repair)
    known = None if scores is None else read_json(scores)
    if scores is not None and not isinstance(known, dict):
        raise UserError(f"--scores {scores}: not a JSON object of scores by file name.")
    found, counts = training_rows(files, filters, per=per, scores=known)
    for reason, count in sorted(counts.items()):
        echo(f"{count:,} {reason}")
    if not found:
        raise UserError(f"no row is left of {len(files)} files, so nothing was written.")
    write_atomically(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    echo(f"written: {output}: {len(found):,} rows")


@rlm.command()
def expert(
    output: Annotated[Path, typer.Option(help="The JSONL file to write.", **_UNSHOWN)],
    rows: Annotated[int, typer.Option(min=1, help="Number of rows.")] = 400,
    names: Annotated[str, typer.Option(help="Set of names: train or test.")] = "train",
    chars: Annotated[int, typer.Option(min=1_000, help="Length of the contexts in characters.")] = 8_000,
    journals: Annotated[
        Path | None, typer.Option(help="Folder for the journals of the runs, for `rlm replay`.", **_UNSHOWN)
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make chat rows from runs of a scripted root, which searches for a name and reads what it finds.

    A recipe has them without a file: data.train: {path: package:rlm_expert, limit: 400}.
    """
    from eaftdrope.rlm.experts import expert_rows
    from eaftdrope.rlm.tasks import SETS

    if names not in SETS:
        raise UserError(f"--names {names}: not one of {', '.join(SETS)}.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists. Choose another file with --output, or pass --overwrite.")
    made = expert_rows(rows, names=names, chars=chars, journals=journals)
    write_atomically(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
    echo(f"written: {output}: {rows:,} rows")
