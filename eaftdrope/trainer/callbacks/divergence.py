"""Divergence: training stops at the first loss, gradient or weight that is NaN or infinite, before any of it is saved.

A `Watch` records on the device where a number first stopped being finite, at every micro-batch and every optimiser step;
it is read (which waits for the device) at a log, before a save and at the end. One process on a CPU reads it at every
step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eaftdrope.errors import UserError

from ..finite import (
    largest_weight,
    listed,
    non_finite_states,
    non_finite_weights,
    over_processes,
    refuse_non_finite_weights,
)
from ..optimizer import check_gradients, check_optimizer

_NEVER = torch.iinfo(torch.int64).max
# Weights of trained models are at most some hundreds.
_ORDINARY_WEIGHT = 1e4
# A damaged optimiser state causes a fault within this many steps.
_AFTER_RESUMING = 5


@dataclass(frozen=True)
class Fault:
    """The first number that was not finite.

    Attributes:
        step: optimiser step, from 1.
        what: "the loss" or "the gradient norm".
        batch: micro-batch of the step (from 0) and process; None for a gradient, which belongs to all of them.
        by_gate: the gate's own values were not finite, or extreme, by then.
    """

    step: int
    what: str
    batch: tuple[int, int] | None
    by_gate: bool


class Watch:
    """The first position of each kind of number that was not finite. Positions count micro-batches over steps and processes.

    Args:
        device: the device of the losses.
        accumulation: micro-batches of an optimiser step.
    """

    def __init__(self, device: torch.device, accumulation: int) -> None:
        started = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank = torch.distributed.get_rank() if started else 0
        self._processes = torch.distributed.get_world_size() if started else 1
        self._accumulation = accumulation
        # loss, gate, gradient norm
        self._first = torch.full((3,), _NEVER, dtype=torch.int64, device=device)
        self._step, self._micro_batch = 0, 0

    @property
    def is_free(self) -> bool:
        """True if reading costs nothing: no device to wait for, and no other process."""
        return self._first.device.type == "cpu" and self._processes == 1

    def add_loss(self, step: int, loss: Tensor, extreme_gate: Tensor) -> None:
        """Record `loss` (number []) and `extreme_gate` (bool [], see `Meter.latest`) of the next micro-batch of an optimiser
        step; steps count from 1."""
        self._micro_batch = min(self._micro_batch + 1, self._accumulation - 1) if step == self._step else 0
        self._step = step
        device = self._first.device
        bad = torch.stack([~loss.detach().isfinite().to(device), extreme_gate.to(device)])
        position = self._position(step, self._micro_batch, self._rank)
        self._first[:2] = torch.minimum(self._first[:2], torch.where(bad, position, _NEVER))

    def add_gradient(self, step: int, norm: Tensor | float) -> None:
        """Record the norm of the gradients of a step, after all of its losses."""
        norm = torch.as_tensor(norm.to_local() if isinstance(norm, DTensor) else norm, device=self._first.device)
        position = self._position(step, self._accumulation - 1, self._processes - 1)
        self._first[2] = torch.minimum(self._first[2], torch.where(norm.isfinite(), _NEVER, position))

    def read(self) -> Fault | None:
        """Return the first fault over all processes, which must all call; waits for the device."""
        loss, gate, gradient = over_processes(self._first.clone(), "MIN").tolist()
        first = min(loss, gradient)
        if first == _NEVER:
            return None
        rest, rank = divmod(first, self._processes)
        step, micro_batch = divmod(rest, self._accumulation)
        batch = (micro_batch, rank) if loss <= gradient else None
        return Fault(step, "the gradient norm" if batch is None else "the loss", batch, by_gate=gate <= first)

    def _position(self, step: int, micro_batch: int, rank: int) -> int:
        return (step * self._accumulation + micro_batch) * self._processes + rank


class Guard(TrainerCallback):
    """Checks a training for divergence. Its owner reports to `watch` and calls `check` on all processes."""

    def __init__(self, device: torch.device, accumulation: int = 1, gate: str = "") -> None:
        self.watch = Watch(device, accumulation)
        self._gate = gate
        self._resumed = 0
        self._optimizer_checked = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Check that weights and optimiser are finite before the first step."""
        self.watch = Watch(args.device, args.gradient_accumulation_steps)
        self._resumed = state.global_step
        self._optimizer_checked = False
        _check_start(model, optimizer, args, state)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the optimiser once, after the first backward: shards are in place by then, also after an evaluation."""
        if not self._optimizer_checked and not isinstance(optimizer, DeepSpeedOptimizerWrapper):
            check_optimizer(model, optimizer, str(args.optim))
            check_gradients(model)
        self._optimizer_checked = True

    def check(
        self, model: nn.Module, args: TrainingArguments, state: TrainerState, rows: Callable[[Fault], str]
    ) -> None:
        """Read the watch and stop the training at a fault.

        Args:
            rows: describes the rows of a fault; "" if they cannot be found.

        Raises:
            UserError: a loss or a gradient was not finite; with its step, rows and likely cause, and the checkpoints that
                remain.
        """
        if fault := self.watch.read():
            where = f" ({found})" if (found := rows(fault)) else ""
            raise UserError(
                f"training diverged: {fault.what} became NaN or infinite in step {fault.step}{where}. "
                f"{self._cause(fault, model, args)} {_remaining_checkpoint(args, fault.step - 1)}"
            )

    def _cause(self, fault: Fault, model: nn.Module, args: TrainingArguments) -> str:
        if fault.by_gate:
            return f"The gate's own values are out of range: check the options of the gate {self._gate}."
        largest = largest_weight(model)
        if largest <= _ORDINARY_WEIGHT:
            return (
                f"All weights are still finite and of ordinary size (at most {largest:.3g}), so check these rows first, "
                f"then the learning rate ({args.learning_rate:g})."
            )
        suspect = f"the learning rate ({args.learning_rate:g}): lower it, or warm it up over more steps"
        if self._resumed and fault.step <= self._resumed + _AFTER_RESUMING:
            return (
                f"It came within {_AFTER_RESUMING} steps of resuming, so the first suspect is a damaged optimiser state in "
                f"checkpoint-{self._resumed}: move that folder away to resume from the checkpoint before it. The second is "
                f"{suspect}."
            )
        return f"The first suspect is {suspect}. The second is that step's rows."


def _check_start(
    model: nn.Module, optimizer: torch.optim.Optimizer, args: TrainingArguments, state: TrainerState
) -> None:
    """Check the weights and, in a resumed run, the optimiser's state. All processes must call."""
    if state.global_step == 0:
        refuse_non_finite_weights(model, together=True)
        return
    what, names = "weights of", non_finite_weights(model, together=True)
    if not names and not isinstance(optimizer, DeepSpeedOptimizerWrapper):
        what, names = "optimiser state of", non_finite_states(model, optimizer)
    if names:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        raise UserError(
            f"NaN or infinity in the {what} {checkpoint}: {listed(names)}. Nothing was trained. Move that folder away, and "
            "the same command resumes from the checkpoint before it."
        )


def check_saved(model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
    """Check the weights before they are written. If the model is sharded over processes, all of them must call.

    Raises:
        UserError: lists the parameters that contain NaN or infinity; nothing is written.
    """
    if names := non_finite_weights(model):
        raise UserError(
            f"the weights contain NaN or infinity after step {state.global_step} ({listed(names)}) and are not saved. The "
            f"first suspect is the learning rate ({args.learning_rate:g}): lower it, or warm it up over more steps. "
            + _remaining_checkpoint(args, state.global_step)
        )


def _remaining_checkpoint(args: TrainingArguments, step: int) -> str:
    """Describe the newest checkpoint up to a step: its weights were finite, or it would not have been written."""
    folders = {int(path.name.rsplit("-", 1)[1]): path for path in Path(args.output_dir).glob("checkpoint-*[0-9]")}
    newest = max((number for number in folders if number <= step), default=None)
    if newest is None:
        return "No checkpoint was written before it: start over (a recipe with --overwrite)."
    text = (
        f"Nothing was deleted: {folders[newest]} has finite weights, and the same command resumes from it (in a script: "
        "trainer.train(resume_from_checkpoint=True)). With other settings, train in another output folder."
    )
    # its weights are finite, but the next forward with them was not
    return text + (" If it stops at this step again, move that folder away too." if newest == step else "")
