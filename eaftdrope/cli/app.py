"""`eaftdrope VERB ...`: finds the verb, runs it, and turns errors meant for the user into text and an exit code.

Exit codes: 0 done, 2 something the user can correct (no traceback), 130 interrupted, 1 a fault of ours (traceback).
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
from collections.abc import Callable

import typer

from eaftdrope.errors import UserError

VERBS = {
    "train": "Run a recipe and show what was gained and forgotten.",
    "validate": "Check a recipe in a second, without loading anything.",
    "preview": "Show the tokens a recipe trains on, in colour.",
    "inspect": "See what a model makes of a recipe's training rows.",
    "merge": "Write a run's adapters into the model's weights.",
    "convert": "Drop a checkpoint's rotary embedding, by configuration.",
    "compare": "Train a recipe under several gates; what each gains and forgets.",
    "eval": "Measure models on suites of probes and lm-eval's tasks.",
    "probe": "Measure how far a model's context reaches, with baselines.",
    "drope": "Fit the softmax temperature that a longer context wants.",
    "report": "Draw the report of a result again, or compare runs.",
    "recipes": "List, show or copy the recipes that come with eaftdrope.",
    "schema": "Print the JSON schema of a recipe, for editors.",
    "doctor": "Show what this machine can run.",
    "bench": "Measure the loss against its peers, or training speed.",
}
"""Verb -> its line in `--help`. The verb is the function of that name in the module of that name here."""


def main(arguments: list[str] | None = None) -> None:
    """The console script. Raises SystemExit with the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # what a verb notes as the command that was typed
    sys.argv[1:] = arguments
    # torch's own variable, read at its first tensor: tensors of 2 MB and more begin at a page, a huge one where there is one.
    # Begun inside a page, a freed tensor leaves a hole that glibc finds too small for the next of its size: half as much
    # memory again in training on a processor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    verb = next((word for word in arguments if not word.startswith("-")), None)
    build_app(verb)(args=arguments, prog_name="eaftdrope")


def build_app(verb: str | None) -> typer.Typer:
    """The application with `verb` ready to run; the others only have their line of help, and are not imported."""
    app = typer.Typer(
        help="Entropy-adaptive fine-tuning: train with the EAFT loss and see what was gained and forgotten.",
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
            app.add_typer(_with_guarded_commands(function), name=name)
            continue
        app.command(name, help=_help(function, line), no_args_is_help=False)(_guarded(function))
    return app


def _help(function: Callable, line: str) -> str:
    """The verb's own docstring where it is imported, else its line."""
    return line if function is _not_imported else (function.__doc__ or line)


def _not_imported() -> None:
    raise AssertionError("a verb that was not asked for")


def _with_guarded_commands(verb: typer.Typer) -> typer.Typer:
    """A verb with verbs of its own, as a copy: the module's own keeps raising, for whoever calls it from Python."""
    guarded = copy.copy(verb)
    guarded.registered_commands = [copy.copy(command) for command in verb.registered_commands]
    for command in guarded.registered_commands:
        command.callback = _guarded(command.callback)
    return guarded


def _guarded(function: Callable) -> Callable:
    """`function` with its UserError and Ctrl-C as text on stderr and an exit code."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except UserError as error:
            typer.echo(str(error), err=True)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise SystemExit(130) from None

    return run
