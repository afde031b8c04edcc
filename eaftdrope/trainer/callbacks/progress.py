"""The progress display of a training: live in a terminal, one plain line per log elsewhere.

    step 10/25  loss 0.213  ce 0.512  gate 0.31  conflicts 1.2 %  tok/s 212  eta 1:05

`loss` is the weighted loss that is trained, `ce` the plain cross-entropy of the same tokens. Values that a trainer does
not log are left out, so the callback also works for a `transformers.Trainer` without a gate.
"""

from __future__ import annotations

import atexit
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import has_length
from transformers.utils import logging as transformers_logging

from .probes import PREFIX

ROWS_KEPT = 6
_WIDTH = 88


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


# log key -> (label, format of its value), in the order of display.
_FIELDS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", _number),
    "eaft/cross_entropy": ("ce", _number),
    "eaft/gate_mean": ("gate", lambda value: f"{value:.2f}"),
    "eaft/conflict_share": ("conflicts", lambda value: f"{100 * value:.1f} %"),
    "recovery": ("recovery", lambda value: f"{value:.2f}"),
    "eaft/tokens_per_second": ("tok/s", lambda value: f"{value:,.0f}"),
}
# Evaluation logs have these beside the metrics; they do not describe the model.
_NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "num_tokens")


def use_progress_display(trainer: Trainer) -> ProgressCallback:
    """Replace the trainer's own progress bar or printer by a new `ProgressCallback`, and return it."""
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.remove_callback(PrinterCallback)
    display = ProgressCallback()
    trainer.add_callback(display)
    return display


class ProgressCallback(TrainerCallback):
    """Shows the step, losses, gate, speed and time left; only on the main process (`is_world_process_zero`).

    A training that ends in an exception never reaches `on_train_end`: call `close` in a `finally`, so that the terminal
    is restored before the error is printed (at the end of the process this happens automatically).

    Args:
        console (`rich.console.Console`, *optional*):
            The console of the display. By default standard output; the `NO_COLOR` environment variable is respected.
        clock (`Callable[[], float]`, *optional*, defaults to `time.monotonic`):
            Returns the seconds of a monotonic clock.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._clock = clock
        self._live: Live | None = None
        self._moved_handlers: list[tuple[logging.StreamHandler, Any]] = []
        self._bars_disabled = False
        self._begin(step=0, max_steps=0)

    def _begin(self, *, step: int, max_steps: int) -> None:
        self._started = self._clock()
        self._first_step = self._step = step
        self._max_steps = max_steps
        self._rows: tuple[dict[str, str], ...] = ()  # replaced, never changed: the display's thread reads it
        self._activity = ""
        self._note = f"resumed after step {step}" if step else ""
        self._evaluation = ""
        self._probes = ""
        self._recovery: float | None = None
        self._evaluated = 0

    # ---- events of the trainer ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the display. A resumed run's earlier steps count for the bar, not for the time left."""
        if not state.is_world_process_zero:
            return
        self.close()
        self._begin(step=state.global_step, max_steps=state.max_steps)
        # Saving a checkpoint would print a bar of its own ("Writing model shards") into the display.
        self._bars_disabled = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        # A pipe may be declared a terminal for its colours (FORCE_COLOR): moving the cursor in it would garble it.
        if self._console.is_terminal and not self._console.is_dumb_terminal and self._console.file.isatty():
            self._open()
        elif self._note:
            self._print(f"{self._note}/{self._max_steps}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar. Saving blocks the training loop, so it is announced before it begins."""
        self._step = state.global_step
        self._activity = f"saving checkpoint-{self._step} ..." if control.should_save else ""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show one row of training figures, or the result of an evaluation."""
        if not state.is_world_process_zero:
            return
        assert logs is not None
        evaluation = _evaluation_text(logs)
        if evaluation:
            self._evaluation = f"evaluation at step {state.global_step}: {evaluation}"
            self._print(self._evaluation, unless_live=True)
        probes = _probes_text(logs)
        if probes:
            self._probes = f"probes at step {state.global_step}: {probes}"
            self._print(self._probes, unless_live=True)
        if logs.keys().isdisjoint(_FIELDS):
            return
        # measured at some steps only; shown until it is measured again
        self._recovery = logs.get("recovery", self._recovery)
        shown = logs if self._recovery is None else {**logs, "recovery": self._recovery}
        row = {label: show(shown[key]) for key, (label, show) in _FIELDS.items() if key in shown}
        self._step = state.global_step
        self._rows = (*self._rows, {"step": str(self._step), **row})[-ROWS_KEPT:]
        figures = [f"{label} {text}" for label, text in row.items()]
        self._print(
            "  ".join([f"step {self._step}/{state.max_steps}", *figures, f"eta {self._eta()}"]), unless_live=True
        )

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the progress of an evaluation (in a terminal; elsewhere only its result is printed)."""
        self._evaluated += 1
        total = f"/{len(eval_dataloader)}" if eval_dataloader is not None and has_length(eval_dataloader) else ""
        self._activity = f"evaluating {self._evaluated}{total} ..."

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the evaluation's own display; a save that is due comes next."""
        self._evaluated = 0
        self._activity = f"saving checkpoint-{self._step} ..." if control.should_save else ""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the checkpoint that was written."""
        self._activity = ""
        if state.is_world_process_zero:
            self._note = f"saved {args.output_dir}/checkpoint-{state.global_step}"
            self._print(self._note, unless_live=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last state of the display on the screen and print a summary in one line."""
        if not state.is_world_process_zero:
            return
        self._step = state.global_step
        self._activity = ""
        self.close()
        word = "finished" if self._step >= self._max_steps else "stopped"
        steps = self._step - self._first_step
        self._print(f"{word} at step {self._step}/{self._max_steps}: {steps} steps in {self._elapsed()}")

    # ---- the display ----

    def close(self) -> None:
        """Stop the live display and restore standard output, standard error and transformers' bars. Safe to call twice."""
        if self._bars_disabled:
            transformers_logging.enable_progress_bar()
            self._bars_disabled = False
        if self._live is None:
            return
        for handler, stream in self._moved_handlers:
            handler.setStream(stream)
        self._moved_handlers = []
        self._live.stop()
        self._live = None
        atexit.unregister(self.close)

    def _open(self) -> None:
        streams = (sys.stdout, sys.stderr)
        # Standard error redirected to a file must stay there; in the terminal it is printed above the display.
        self._live = Live(console=self._console, get_renderable=self._render, redirect_stderr=sys.stderr.isatty())
        self._live.start()
        # Existing log handlers have the real streams and would write into the middle of the display.
        for handler in _stream_handlers():
            for real, shown in zip(streams, (sys.stdout, sys.stderr)):
                if handler.stream is real and real is not shown:
                    self._moved_handlers.append((handler, real))
                    handler.setStream(shown)
        atexit.register(self.close)

    def _print(self, line: str, *, unless_live: bool = False) -> None:
        if not (unless_live and self._live):
            # soft_wrap: one log is one line, for any width that the console assumes for a pipe.
            self._console.print(Text(line), soft_wrap=True)
            self._console.file.flush()

    def _render(self) -> Group:
        figures = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for label in dict.fromkeys(label for row in self._rows for label in row):
            figures.add_column(label, justify="right", no_wrap=True)
        for row in self._rows:
            cells = [row.get(column.header, "") for column in figures.columns]
            figures.add_row(*cells, style="bold" if row is self._rows[-1] else "dim")
        bar = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(4):
            bar.add_column(no_wrap=True)
        # The text beside the bar takes some 48 columns; a narrow terminal gets a short bar, never a wrapped line.
        width = max(8, min(_WIDTH, self._console.width) - 50)
        bar.add_row(
            ProgressBar(total=max(self._max_steps, 1), completed=self._step, width=width),
            f"step {self._step}/{self._max_steps}",
            f"elapsed {self._elapsed()}",
            f"eta {self._eta()}",
        )
        notes = [self._evaluation, self._probes, self._activity or self._note]
        lines = [Text(note, style="dim", no_wrap=True, overflow="ellipsis") for note in notes if note]
        return Group(*([figures] if self._rows else []), bar, *lines)

    def _elapsed(self) -> str:
        return _clock_text(self._clock() - self._started)

    def _eta(self) -> str:
        """Time left at the pace of the steps done in this run; a resumed run did not do the earlier ones."""
        done = self._step - self._first_step
        if done <= 0:
            return "-:--"
        return _clock_text((self._clock() - self._started) / done * (self._max_steps - self._step))


def _clock_text(seconds: float) -> str:
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _evaluation_text(logs: dict[str, Any]) -> str:
    """Return "loss 0.512  entropy 0.9" from the `eval_` figures of a log, "" if it has none."""
    metrics = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
    return "  ".join(
        f"{name} {_number(value)}"
        for name, value in metrics.items()
        if isinstance(value, float) and not name.endswith(_NOT_METRICS)
    )


def _probes_text(logs: dict[str, Any]) -> str:
    """Return "held-out loss 0.512  perplexity 12.3" from the `probe/` figures of a log, "" if it has none."""
    return "  ".join(
        f"{name.removeprefix(PREFIX)} {_number(value)}" for name, value in logs.items() if name.startswith(PREFIX)
    )


def _stream_handlers() -> Iterator[logging.StreamHandler]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        if isinstance(logger, logging.Logger):  # the dictionary also holds placeholders, which have no handlers
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler):
                    yield handler
