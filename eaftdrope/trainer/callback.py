"""`EAFTCallback`: metrics and conflict checks for the plain `transformers.Trainer`."""

from __future__ import annotations

from transformers import TrainerCallback

from ..errors import UserError
from .patch import is_active, is_applied, pop_metrics


class EAFTCallback(TrainerCallback):
    """
    Pass it to a plain [`~transformers.Trainer`] whose model went through [`apply_eaft`]: it adds the gate's metrics to
    every log (those of this process's batches) and refuses, before the first step, what would silently train another loss.

    Raises:
        UserError: at the start of training, for label smoothing, Liger's fused cross-entropy, `nn.DataParallel`, or a
            model whose forward was replaced after `apply_eaft`.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
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

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        logs.update(pop_metrics(model, training=model.training))
