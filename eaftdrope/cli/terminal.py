"""The terminal of a verb: its console, and the messages of libraries that no user of a command can act on."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from eaftdrope.errors import missing_package, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment


def make_console(width: int | None = 140) -> Console:
    """A rich console as wide as the terminal; `width` columns where the output is a file or a pipe (None: rich's default).

    Whatever is shown on it, a name of a file or a model's answer, cannot control the terminal: its control characters are
    escaped.
    """
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
            for segment in super().render(*args, **kwargs):
                shown = segment.text if segment.control else printable(segment.text, lines=True)
                yield segment if shown == segment.text else Segment(shown, segment.style)

    return SafeConsole() if width is None or sys.stdout.isatty() else SafeConsole(width=width)


def echo(text: str, *, err: bool = False) -> None:
    """Print text that may contain names and answers of others, with its control characters escaped."""
    typer.echo(printable(text, lines=True), err=err)


def silence_libraries(*, bars: bool) -> None:
    """Hide messages of libraries that no user of the command can act on; progress bars too, unless `bars`."""
    from transformers.utils.logging import disable_progress_bar

    # between transformers and peft
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning, "transformers")
    # the plan has printed it in the recipe's terms
    warnings.filterwarnings("ignore", "bf16 is on, as TRL has it by default", UserWarning)
    # peft, where it cannot look up on the hub whether the vocabulary was changed: it never is here
    warnings.filterwarnings("ignore", "(Could not find a config file in|Unable to fetch remote file)", UserWarning)
    # the newest checkpoint is found by its number, whatever the clock of the disk
    logging.getLogger("transformers.trainer_utils").addFilter(_not_about_mtime)
    # packed rows are as long as a batch: one of them is a choice, and the plan states when it is the better one
    logging.getLogger("trl.trainer.sft_trainer").addFilter(_not_about_one_row)
    if not bars:
        disable_progress_bar()
        if importlib.util.find_spec("datasets"):
            from datasets import disable_progress_bars

            disable_progress_bars()


def _not_about_mtime(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("mtime may not be reliable")


def _not_about_one_row(record: logging.LogRecord) -> bool:
    return "You are using a per_device_train_batch_size of 1 with padding-free" not in record.getMessage()


def show_report(source: Path, console: Console) -> None:
    """Write the report of a complete result (a folder, or a journal); a package that only reports need may be missing."""
    try:
        from eaftdrope.report.page import try_write_report
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        console.print(f"no report: {missing}", highlight=False, markup=False, soft_wrap=True)
        return
    try_write_report(source, console)
