"""`eaftdrope VERB ...`: find the verb, run it, and turn errors meant for the user into text and an exit code.

Exit codes: 0 done; 2 something the user can correct (no traceback); 130 Ctrl-C and 143 SIGTERM, after which the same command
resumes; 3 another process of the launch was lost, likewise; 1 a bug in eaftdrope (traceback), and for `eval --fail-if-worse`
a metric that is worse.
"""

from __future__ import annotations

import copy
import errno
import functools
import importlib
import os
import sys
from collections.abc import Callable

import typer

from eaftdrope.errors import ReportedByAnother, UserError, missing_package, printable

VERBS = {
    "train": "Run a recipe and show what was gained and forgotten.",
    "validate": "Check a recipe in a second, without loading anything.",
    "preview": "Show the tokens a recipe trains on, in colour.",
    "inspect": "Show where the model disagrees with a recipe's training labels.",
    "merge": "Merge a run's adapter into the weights of its base model.",
    "convert": "Drop a checkpoint's rotary embedding, by configuration.",
    "compare": "Train by several methods; show what each gains and forgets.",
    "ablate": "Run a pipeline with stages left out; show what each is worth.",
    "eval": "Measure models on suites of probes and lm-eval's tasks.",
    "context": "Measure how far a model's context reaches, with baselines.",
    "drope": "DroPE: convert, undo, check, or fit the softmax temperature.",
    "ttt": "TTT: read a text into a state, ask about it, measure it.",
    "rlm": "Answer queries over long texts with a model that writes code.",
    "ask": "Answer questions about long texts with what a run built.",
    "report": "Render the report of a result again, or compare runs.",
    "recipes": "List, show or copy recipes; translate those of other tools.",
    "schema": "Print the JSON schema of a recipe, for editors.",
    "doctor": "Show what this machine can run.",
    "bench": "Measure what the loss costs on this machine.",
}
"""Verb -> its line in `--help`. The verb is the function of that name in the module of that name here."""

RENAMED = {"probe": "context"}
"""Earlier name of a verb -> its name."""

SINGLE_PROCESS = ("inspect", "merge", "convert", "eval", "context", "drope", "ttt", "rlm", "ask", "ablate", "report")
"""Verbs that write a result and run in one process only. (compare has its own check.)"""


def main(arguments: list[str] | None = None) -> None:
    """The console script. Raises SystemExit with the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = _current_names(arguments)
    # a verb records them as the command that was typed
    sys.argv[1:] = arguments
    # torch's own variable, read at its first tensor: tensors of 2 MB and more begin at a page, a huge one if possible.
    # Begun inside a page, a freed tensor leaves a hole that glibc finds too small for the next of its size: half as much
    # memory again in training on a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # of a lost process, one message instead of pages of warnings from each of the others
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    verb = next((word for word in arguments if not word.startswith("-")), None)
    build_app(verb)(args=_with_values(arguments), prog_name="eaftdrope")


def _current_names(arguments: list[str]) -> list[str]:
    """`arguments` with a renamed verb replaced by its new name, which is printed."""
    place = next((index for index, word in enumerate(arguments) if not word.startswith("-")), None)
    if place is None or arguments[place] not in RENAMED:
        return arguments
    old, new = arguments[place], RENAMED[arguments[place]]
    typer.echo(f"`eaftdrope {old}` is now `eaftdrope {new}`.", err=True)
    return [*arguments[:place], new, *arguments[place + 1 :]]


def _with_values(arguments: list[str]) -> list[str]:
    """`arguments` with an empty value for a --fail-if-worse that has none; click would use the word after it, a model."""
    option = "--fail-if-worse"
    if option not in arguments:
        return arguments
    from eaftdrope.evaluate.suites.regressions import LIMIT

    followed = zip(arguments, [*arguments[1:], ""])
    return [f"{option}=" if word == option and not LIMIT.fullmatch(after) else word for word, after in followed]


def build_app(verb: str | None) -> typer.Typer:
    """The application with `verb` ready to run; the others only have their line of help, and are not imported."""
    app = typer.Typer(
        help="Fine-tune a language model and see what it gained and forgot; lengthen its context; ask it about long texts.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    @app.callback(invoke_without_command=True)
    def top(
        context: typer.Context,
        version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    ) -> None:
        if version:
            from importlib.metadata import version as installed

            typer.echo(installed("eaftdrope"))
            raise typer.Exit()
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    for name, line in VERBS.items():
        function = _not_imported
        if name == verb:
            function = getattr(importlib.import_module(f"eaftdrope.cli.{name}"), name)
        if isinstance(function, typer.Typer):
            app.add_typer(_with_guarded_commands(function, name), name=name)
            continue
        app.command(name, help=_help(function, line), no_args_is_help=False)(_guarded(function, name))
    return app


def _help(function: Callable, line: str) -> str:
    """The verb's own docstring where it is imported, else its line."""
    return line if function is _not_imported else (function.__doc__ or line)


def _not_imported() -> None:
    raise AssertionError("a verb that was not imported was called")


def _with_guarded_commands(verb: typer.Typer, name: str) -> typer.Typer:
    """A copy of a verb that has commands of its own, guarded; the module's own keeps raising, for callers in Python."""
    guarded = copy.copy(verb)
    guarded.registered_commands = [copy.copy(command) for command in verb.registered_commands]
    for command in guarded.registered_commands:
        command.callback = _guarded(command.callback, name)
    return guarded


def _guarded(function: Callable, verb: str) -> Callable:
    """`function` with its UserError and Ctrl-C as text on stderr and an exit code."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        try:
            if verb in SINGLE_PROCESS:
                _refuse_several_processes(verb)
            return function(*args, **kwargs)
        except ReportedByAnother:
            raise SystemExit(2) from None
        except UserError as error:
            _print_error(str(error))
            raise SystemExit(2) from None
        except ModuleNotFoundError as error:
            if (missing := missing_package(error)) is None:
                raise
            _print_error(str(missing))
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            _print_error("Interrupted.")
            raise SystemExit(130) from None
        except EOFError as error:
            # click would take it for Ctrl-D and print one word, "Aborted!"; it is a bug in eaftdrope
            raise RuntimeError("a file ended before it should") from error
        except OSError as error:
            if error.errno not in _ENVIRONMENT or error.filename is None:
                raise
            _print_error(f"{error.filename}: {error.strerror}. Choose another place, or change this one.")
            raise SystemExit(2) from None

    return run


# Errors of a path or a disk that can meet any verb and that only the user can change.
_ENVIRONMENT = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
}


def _print_error(text: str) -> None:
    """Print `text` on stderr, control characters escaped.

    Of the processes of a machine only the first prints, since all read the same recipe and the same disk. Once they train
    together, one process may fail while the others do not, so each prints, with its rank.
    """
    rank = os.environ.get("RANK", "0")
    if os.environ.get("LOCAL_RANK", rank) != "0":
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
            return
        text = f"rank {rank}: {text}"
    typer.echo(printable(text, lines=True), err=True)


def _refuse_several_processes(verb: str) -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UserError(
            f"{verb} runs in one process, and this is one of {processes} (WORLD_SIZE): each would do and write the same. "
            f"Run `eaftdrope {verb}` without accelerate launch or torchrun; only train uses several processes."
        )
