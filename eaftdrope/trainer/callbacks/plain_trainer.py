"""`EAFTCallback`: metrics and conflict checks for the plain `transformers.Trainer`."""

from __future__ import annotations

import inspect
from types import FrameType

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from eaftdrope.errors import UserError

from ..patch import gate_of, is_active, is_applied, latest, pop_metrics
from ..step_rows import rows_in_words, rows_of_step
from .divergence import Fault, Guard, check_saved

# Of the metrics, those that an evaluation has: it is of plain cross-entropy.
_OF_EVALUATION = ("entropy", "mean_token_accuracy", "eaft/conflict_share")


class EAFTCallback(Guard):
    """
    Pass it to a plain [`~transformers.Trainer`] whose model went through [`apply_eaft`]: it adds the gate's metrics to
    every log (those of this process's batches), also in `state.log_history` and for trackers; refuses, before the first
    step, what would silently train another loss; and stops the training, before a checkpoint is written, where a loss, a
    gradient or a weight became NaN or infinite.

    Raises:
        UserError: at the start of training, for label smoothing, Liger's fused cross-entropy, `nn.DataParallel`, a model
            whose forward was replaced after `apply_eaft`, weights that hold NaN or infinity, or a trainable parameter
            that is not in the optimiser; while training, where it diverged.
    """

    def __init__(self):
        super().__init__(torch.device("cpu"))

    def on_init_end(self, args, state, control, **kwargs):
        """Come before the trackers, which send a log as they find it."""
        _move_forward(self, inspect.currentframe())

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Refuse what would train another loss, or no number."""
        _move_forward(self, inspect.currentframe())
        if not is_applied(model):
            raise UserError("EAFTCallback needs a model that went through apply_eaft(model).")
        if not is_active(model):
            raise UserError(
                "the model's forward was replaced after apply_eaft (Liger's use_liger_kernel, TRL's SFTTrainer), so the "
                "gate would not be used. Switch Liger's fused_linear_cross_entropy off; in TRL scripts use EAFTTrainer."
            )
        if args.label_smoothing_factor:
            raise UserError("label_smoothing_factor takes the labels away from the model: set it to 0 to train EAFT.")
        if args.n_gpu > 1:
            raise UserError("nn.DataParallel is not supported: launch with accelerate or torchrun.")
        self._gate = gate_of(model).formula
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        """A micro-batch that is not the last of its step."""
        self._add_loss(model, state)

    def on_pre_optimizer_step(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        """The last micro-batch of a step, and its gradients; they are the process's own part of them."""
        super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)
        self._add_loss(model, state)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        # under float16 the scaler skips a step whose gradients overflow, which is no fault
        if gradients and not args.fp16:
            local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
            self.watch.add_gradient(state.global_step + 1, get_total_norm(local))
        if self.watch.is_free:
            self._check(model, args, state, train_dataloader)

    def on_step_end(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        """Before a checkpoint is written."""
        if control.should_save:
            self._check(model, args, state, train_dataloader)
            check_saved(model, args, state)

    on_epoch_end = on_step_end

    def on_log(self, args, state, control, logs=None, model=None, train_dataloader=None, **kwargs):
        """Add the metrics to the log and to what the Trainer has kept of it already."""
        metrics = pop_metrics(model, training=model.training)
        if not model.training:
            metrics = {f"eval_{name}": metrics[name] for name in _OF_EVALUATION if name in metrics}
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)
        if "loss" in logs:
            self._check(model, args, state, train_dataloader)

    def on_train_end(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        """What the script saves next is finite."""
        self._check(model, args, state, train_dataloader)
        check_saved(model, args, state)

    def _add_loss(self, model: nn.Module, state) -> None:
        if seen := latest(model):
            self.watch.add_loss(state.global_step + 1, *seen)

    def _check(self, model: nn.Module, args, state, loader) -> None:
        def rows(fault: Fault) -> str:
            found = rows_of_step(
                loader, fault.step, args.gradient_accumulation_steps, replicas=args.world_size, batch=fault.batch
            )
            return rows_in_words(found, loader.dataset)

        self.check(model, args, state, rows)


def _move_forward(callback: EAFTCallback, frame: FrameType | None) -> None:
    """Puts the callback right behind the one that decides what a step ends with. The Trainer appends callbacks to its
    trackers and hands them no reference to its list, so it is found in the frames that called: in these events no other
    way leads to it."""
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is None:
        return
    callbacks = frame.f_locals["self"].callbacks
    callbacks.remove(callback)
    first = [isinstance(other, DefaultFlowCallback) for other in callbacks]
    callbacks.insert(first.index(True) + 1 if True in first else 0, callback)
