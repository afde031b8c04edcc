"""`EAFTCallback`: metrics and conflict checks for the plain `transformers.Trainer`."""

from __future__ import annotations

import inspect
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from eaftdrope.errors import UserError

from ..patch import gate_of, is_active, is_applied, latest, pop_metrics
from ..step_rows import describe_rows, rows_of_step
from .divergence import Fault, Guard, check_saved

# The metrics of an evaluation, whose loss is plain cross-entropy.
_EVALUATION_METRICS = ("entropy", "mean_token_accuracy", "eaft/conflict_share")


class EAFTCallback(Guard):
    """
    Metrics and checks for a plain [`~transformers.Trainer`] whose model was patched by [`apply_eaft`].

    It adds the gate's metrics to every log (of this process's batches), also in `state.log_history` and for trackers;
    refuses, before the first step, settings that would silently train another loss; and stops the training, before a
    checkpoint is written, if a loss, a gradient or a weight becomes NaN or infinite.

    Raises:
        UserError: at the start of training, for label smoothing, Liger's fused cross-entropy, `nn.DataParallel`, a model
            whose forward was replaced after `apply_eaft`, weights that contain NaN or infinity, or a trainable parameter
            that is not in the optimiser; during training, if it diverges.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move before the trackers, which send a log as it is when they are called."""
        _move_forward(self, inspect.currentframe())

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse settings that would train another loss, and weights that are not finite."""
        _move_forward(self, inspect.currentframe())
        if not is_applied(model):
            raise UserError("EAFTCallback needs a model patched by apply_eaft(model).")
        if not is_active(model):
            raise UserError(
                "the model's forward was replaced after apply_eaft (Liger's use_liger_kernel, TRL's SFTTrainer), so the "
                "gate would not be used. Disable Liger's fused_linear_cross_entropy; in TRL scripts use EAFTTrainer."
            )
        if args.label_smoothing_factor:
            raise UserError(
                "label_smoothing_factor removes the labels from the model's inputs: set it to 0 to train EAFT."
            )
        if args.n_gpu > 1:
            raise UserError("nn.DataParallel is not supported: launch with accelerate or torchrun.")
        self._gate = gate_of(model).formula
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Record a micro-batch that is not the last of its step."""
        self._add_loss(model, state)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the last micro-batch of a step, and this process's part of its gradients."""
        super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)
        self._add_loss(model, state)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        # under float16 the scaler skips a step whose gradients overflow, which is no fault
        if gradients and not args.fp16:
            local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
            self.watch.add_gradient(state.global_step + 1, get_total_norm(local))
        if self.watch.is_free:
            self._check(model, args, state, train_dataloader)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """Check before a checkpoint is written."""
        if control.should_save:
            self._check(model, args, state, train_dataloader)
            check_saved(model, args, state)

    on_epoch_end = on_step_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to the log and to the entry that the Trainer has already stored."""
        metrics = pop_metrics(model, training=model.training)
        if not model.training:
            metrics = {f"eval_{name}": metrics[name] for name in _EVALUATION_METRICS if name in metrics}
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)
        if "loss" in logs:
            self._check(model, args, state, train_dataloader)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """Check before the script saves the model."""
        self._check(model, args, state, train_dataloader)
        check_saved(model, args, state)

    def _add_loss(self, model: nn.Module, state: TrainerState) -> None:
        if seen := latest(model):
            self.watch.add_loss(state.global_step + 1, *seen)

    def _check(self, model: nn.Module, args: TrainingArguments, state: TrainerState, loader: DataLoader) -> None:
        def rows(fault: Fault) -> str:
            found = rows_of_step(
                loader, fault.step, args.gradient_accumulation_steps, replicas=args.world_size, batch=fault.batch
            )
            return describe_rows(found, loader.dataset)

        self.check(model, args, state, rows)


def _move_forward(callback: EAFTCallback, frame: FrameType | None) -> None:
    """Move the callback right behind the one that decides what happens at the end of a step.

    The Trainer appends callbacks after its trackers and passes them no reference to its list, so the list is found in the
    calling frames: these events give no other access to it.
    """
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is None:
        return
    callbacks = frame.f_locals["self"].callbacks
    callbacks.remove(callback)
    first = [isinstance(other, DefaultFlowCallback) for other in callbacks]
    callbacks.insert(first.index(True) + 1 if True in first else 0, callback)
