"""Saving between the regular checkpoints: when SIGTERM or Ctrl-C asks the training to end, and by the clock."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# what the all-reduce carries: the number of a signal (SIGTERM is above SIGINT), and whether a save is due by the clock
_NOTHING = (0, 0)


class SaveAndStop(TrainerCallback):
    """
    Saves a checkpoint at the end of the step in which SIGTERM or the first Ctrl-C arrives, and ends the training there; with
    `minutes` also saves by the clock. A second Ctrl-C raises KeyboardInterrupt at once.

    The processes of a distributed training agree by an all-reduce of two numbers per step, so that all of them save after
    the same step, whichever received the signal. On an accelerator its result is read a step later, so that no step waits
    for the device. The step is always logged: what was measured up to a checkpoint is not lost with it.

    `trainer.train()` returns as after the last step; a script looks at `received`:

    ```python
    stop = SaveAndStop()
    trainer = Trainer(..., callbacks=[stop])
    trainer.train()
    if stop.received:
        sys.exit(128 + stop.received)
    ```

    Args:
        minutes (`float`, *optional*):
            Minutes after which a checkpoint is saved, counted from the last one.

    Attributes:
        received (`int` or `None`): the signal that ended the training, on every process.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.received: int | None = None
        self._seconds = None if minutes is None else 60 * minutes
        self._saved_at = time.monotonic()
        self._pending = 0
        self._handlers: dict[int, Any] = {}
        self._process = os.getpid()
        self._agreement = StepAgreement(torch.device("cpu"))
        self._is_main = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Receive the signals, in the main thread, which alone can."""
        self.received, self._pending = None, 0
        self._saved_at, self._process = time.monotonic(), os.getpid()
        self._agreement = StepAgreement(args.device)
        self._is_main = state.is_world_process_zero
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree on whether to save, and whether to stop."""
        due = self._is_main and self._seconds is not None and time.monotonic() - self._saved_at >= self._seconds
        number, due = self._agreement.largest((self._pending, int(due)))
        if number or due:
            control.should_save = control.should_log = True
        if number:
            self.received = number
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_at = time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        # after the last step, or on this process only
        self.received = self.received or self._pending or None

    def close(self) -> None:
        """Restore the handlers of the signals. Call it if the training may end in an exception; safe to call twice."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._receive_in_a_child(number)
            return
        if self._pending and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        if not self._pending and self._is_main:
            again = ", or Ctrl-C again to end at once" if number == signal.SIGINT else ""
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            # not `print`: the signal may arrive inside of one
            os.write(2, f"\n{name}: saving at the end of this step{again}\n".encode())
        self._pending = max(self._pending, number)

    def _receive_in_a_child(self, number: int) -> None:
        """A worker of a data loader inherits the handlers. It is needed until the step ends, and then ended by its parent."""
        if self._pending and number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._pending = number


class StepAgreement:
    """The largest numbers over all processes.

    Args:
        device: where the processes communicate. On a CPU the result is this step's, on an accelerator the step's before.
        deferred: whether it is the step's before, whatever the device.
    """

    def __init__(self, device: torch.device, *, deferred: bool | None = None) -> None:
        started = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._shared = started and torch.distributed.get_world_size() > 1
        self._device = device
        self._deferred = device.type != "cpu" if deferred is None else deferred
        self._before: tuple[torch.Tensor, torch.Event | None] | None = None

    def largest(self, numbers: tuple[int, int]) -> tuple[int, int]:
        """Return the largest of each number. Every process must call, in every step."""
        if not self._shared:
            return numbers
        values = torch.tensor(numbers, dtype=torch.int32, device=self._device)
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        if not self._deferred:
            return _pair(values)
        before, self._before = self._before, _copied(values)
        if before is None:
            return _NOTHING
        copy, event = before
        if event is not None:
            event.synchronize()
        return _pair(copy)


def _copied(values: torch.Tensor) -> tuple[torch.Tensor, torch.Event | None]:
    """A copy on the CPU, which is complete once the event is."""
    if values.device.type == "cpu":
        return values, None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    event = torch.Event(values.device)
    event.record()
    return copy, event


def _pair(values: torch.Tensor) -> tuple[int, int]:
    first, second = values.tolist()
    return first, second
